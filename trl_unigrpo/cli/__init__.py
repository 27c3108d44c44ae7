"""The command line, thin: each command imports what it needs when it runs, so that `--help` answers at once."""

import logging
from typing import Annotated

import typer

from ..__about__ import __version__
from .build import build_command, build_reward_command
from .decompose import decompose_command
from .demo import demo_command
from .doctor import doctor_command
from .eval import eval_command
from .merge import merge_command
from .options import as_command, told_in_a_line
from .paper import paper_command
from .report import report_command
from .serve_rewards import serve_command
from .version import version_command


app = typer.Typer(
    name="trl-unigrpo",
    help="UniGRPO with TRL: train the thinking and the painting of one unified model from one reward on the image.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def before_any_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options that stand before the command."""
    # PEFT imports bitsandbytes where it is installed, and that warns of slow 4-bit weights on any CPU.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def train_command(context: typer.Context) -> None:
    """Train with UniGRPO: --config file.yaml, or options; train --help lists them."""
    from ..monitoring.trust import TrustError
    from ..rewards.common import DeadRewardError
    from .train import prepare_training, run_training

    with told_in_a_line("train", ImportError, OSError, TypeError, ValueError):
        training = prepare_training(context.args)
    with told_in_a_line("train", DeadRewardError, TrustError):
        run_training(*training)


# The options of `train` are TRL's, which its own parser reads.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app.command("version")(version_command)
app.command("demo")(as_command(demo_command))
app.command("train", context_settings=PASS_ON)(train_command)
app.command("merge")(as_command(merge_command))
app.command("doctor")(as_command(doctor_command))
app.command("decompose")(as_command(decompose_command))
app.command("eval")(as_command(eval_command))
app.command("paper")(as_command(paper_command))
app.command("report")(as_command(report_command))
app.command("build-shapeworld")(as_command(build_command))
app.command("build-shapeworld-reward")(as_command(build_reward_command))
app.command("serve-rewards")(as_command(serve_command))


def main() -> None:
    app()
