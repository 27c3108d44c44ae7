"""Options as dataclasses: what a user types is what a command gets, by names of today and by former ones."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from trl_unigrpo.cli import app
from trl_unigrpo.cli.doctor import WorkloadOptions
from trl_unigrpo.cli.options import as_command, told_in_a_line
from trl_unigrpo.cli.paper import GridOptions, grid_options


@dataclass(frozen=True)
class Where:
    folder: Annotated[Path, typer.Argument(help="Where to.")]
    shown: Annotated[bool, typer.Option("--list", help="Only show.")] = False


@dataclass(frozen=True)
class HowMuch:
    rollouts: Annotated[int, typer.Option(min=2, max=9, help="How often."), "--steps"] = 5
    names: Annotated[list[str] | None, typer.Option(help="Repeated.")] = None


def tool(got):
    """An application with one command, which appends to `got` what it was called with."""

    def work(where: Where, much: HowMuch) -> None:
        """Do the work."""
        got.append((where, much))

    one = typer.Typer(rich_markup_mode=None, add_completion=False)
    one.command()(as_command(work))
    return one


def invoke(*arguments):
    got = []
    return CliRunner().invoke(tool(got), list(arguments)), got


def test_each_field_reaches_its_object():
    assert invoke("here")[1] == [(Where(Path("here")), HowMuch())]
    result, got = invoke("here", "--list", "--rollouts", "7", "--names", "a", "--names", "b")
    assert got == [(Where(Path("here"), True), HowMuch(7, ["a", "b"]))] and result.stderr == ""


def test_help_says_what_the_fields_say_and_no_former_name():
    text = " ".join(invoke("--help")[0].output.split())
    for words in ("Do the work.", "Where to.", "--list Only show.", "How often. [default: 5; 2<=x<=9]", "Repeated."):
        assert words in text
    assert "--steps" not in text and "former" not in text


def test_a_former_name_is_taken_with_a_note():
    result, got = invoke("here", "--steps", "3")
    assert got == [(Where(Path("here")), HowMuch(3))]
    assert (
        result.stdout == "" and result.stderr == "Note: --steps is called --rollouts now; the former name will go.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rollouts", "1"], "Invalid value for '--rollouts': "),
        (["--steps", "10"], "Invalid value for '--steps': "),
        (["--steps", "3", "--rollouts", "4"], "--steps is the former name of --rollouts: pass --rollouts alone."),
    ],
)
def test_a_former_name_has_the_same_range_and_stands_alone(arguments, message):
    result, got = invoke("here", *arguments)
    assert (result.exit_code, got) == (2, []) and message in " ".join(result.output.split())


@pytest.mark.parametrize("command", [command.name for command in app.registered_commands if command.name != "train"])
def test_every_option_of_every_command_is_explained(command):
    (found,) = (each for each in typer.main.get_command(app).commands.items() if each[0] == command)
    shown = [option for option in found[1].params if not getattr(option, "hidden", False)]
    assert [option.name for option in shown if not option.help] == [] and found[1].help


def test_errors_are_told_in_a_line(capsys):
    with pytest.raises(typer.Exit) as ended, told_in_a_line("eval", OSError, ValueError):
        raise ValueError("no such thing")
    assert (ended.value.exit_code, capsys.readouterr().err) == (1, "trl-unigrpo eval: no such thing\n")
    with pytest.raises(KeyError), told_in_a_line("eval", OSError, ValueError):
        raise KeyError("a mistake of the program")


# Commands


def test_demo(monkeypatch):
    calls = []
    monkeypatch.setattr("trl_unigrpo.experiments.demo.demo.run_demo", lambda *given: calls.append(given))
    for name in ("--rollouts", "--steps"):
        result = CliRunner().invoke(app, ["demo", name, "3", "--seed", "2", "--num-prompts", "7", "--output-dir", "x"])
        assert result.exit_code == 0, result.output
        assert ("--steps is called --rollouts now" in result.stderr) == (name == "--steps")
    assert CliRunner().invoke(app, ["demo"]).exit_code == 0
    assert CliRunner().invoke(app, ["demo", "--task", "edit"]).exit_code == 0
    assert CliRunner().invoke(app, ["demo", "--reward", "readback"]).exit_code == 0
    assert CliRunner().invoke(app, ["demo", "--method", "both"]).exit_code == 0
    three = ("x", 3, 2, 7, "paint", "rule", "fast")
    others = [
        ("paint", "rule", "fast"),
        ("edit", "rule", "fast"),
        ("paint", "readback", "fast"),
        ("paint", "rule", "both"),
    ]
    assert calls == [three, three, *(("shapeworld-demo", None, 0, 1050, *other) for other in others)]


def test_doctor_s_options_are_a_workload_s():
    from trl_unigrpo.estimate import Workload

    settings = WorkloadOptions(image_size="64x32", lora_rank=8, quantization="nf4").settings()
    assert set(settings) <= {field.name for field in fields(Workload)}
    assert (settings["image_size"], settings["lora_ranks"], settings["quantization"]) == ("64x32", (8, 8), "nf4")
    plain = WorkloadOptions(lora_rank=0).settings()
    assert (plain["lora_ranks"], plain["quantization"]) == (None, None)


def test_paper_s_options_are_the_grid_s():
    grid = grid_options(GridOptions(only=["a,b", " c "], seeds=["0,1", "5"], jobs=3, rollouts=7, page="p.md"))
    assert (grid.only, grid.seeds, grid.jobs, grid.generations) == (("a", "b", "c"), (0, 1, 5), 3, 7)
    assert (grid.output, grid.page) == (Path("paper-runs"), Path("p.md"))
    quick = grid_options(GridOptions(quick=True))
    assert (quick.output, quick.seeds, quick.only) == (Path("paper-quick"), (0, 1), ())
    with pytest.raises(ValueError, match="--seeds x: expected whole numbers"):
        grid_options(GridOptions(seeds=["x"]))
