"""The command line, thin: each command imports what it needs when it runs, so that `--help` answers at once."""

import logging
from typing import Annotated

import typer

from ..__about__ import __version__


app = typer.Typer(
    name="trl-unigrpo",
    help="UniGRPO with TRL: train the thinking and the painting of one unified model from one reward on the picture.",
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
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options that stand before the command."""
    # PEFT imports bitsandbytes where it is installed, and that warns of slow 4-bit weights on any CPU.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@app.command()
def version() -> None:
    """Show the versions of this package and of those it builds on."""
    import platform

    from ..__about__ import versions

    for package, found in {"python": platform.python_version(), **versions()}.items():
        typer.echo(f"{package} {found}")


@app.command()
def demo(
    output_dir: Annotated[
        str, typer.Option(help="Folder for the report, the numbers and the trained model.")
    ] = "shapeworld-demo",
    steps: Annotated[int, typer.Option(min=1, help="Rollouts of 192 trajectories; each is trained on twice.")] = 140,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the training; held-out prompts stay the same.")] = 0,
    num_prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts scored before and after.")] = 1050,
) -> None:
    """Train a tiny BAGEL on coloured shapes, on a CPU in minutes, and write report.html."""
    from ..experiments.demo.demo import run_demo

    run_demo(output_dir, steps, seed, num_prompts)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def train(context: typer.Context) -> None:
    """Train with UniGRPO: --config file.yaml, or options; train --help lists them."""
    from .train import main as run

    run(context.args)


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of a BAGEL; without it, the released 7B's sizes.")
    ] = None,
    image_size: Annotated[int, typer.Option(help="Side of the images, in pixels.")] = 512,
    num_generations: Annotated[int, typer.Option(help="Trajectories per prompt.")] = 24,
    num_prompts: Annotated[int, typer.Option(help="Prompts per generation batch.")] = 1,
    prompt_length: Annotated[int, typer.Option(help="Tokens of a prompt, system prompt included.")] = 128,
    completion_length: Annotated[int, typer.Option(help="Thinking tokens.")] = 512,
    num_inference_steps: Annotated[int, typer.Option(help="Denoising steps.")] = 25,
    sde_window_size: Annotated[int, typer.Option(help="Stochastic, trained steps per image.")] = 3,
    num_iterations: Annotated[int, typer.Option(help="Passes over each generation batch.")] = 2,
    micro_batch_size: Annotated[int, typer.Option(help="Trajectories per forward of the update.")] = 4,
    image_batch_size: Annotated[int, typer.Option(help="Images denoised at once.")] = 8,
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapters; 0: full fine-tuning.")] = 32,
    quantization: Annotated[str, typer.Option(help="Of the frozen experts: none, nf4 or nf4-double.")] = "none",
    gradient_checkpointing: Annotated[bool, typer.Option(help="Compute activations again in the update.")] = True,
    memory: Annotated[float | None, typer.Option(help="GiB to fit into; without it, the GPU's.")] = None,
    tflops: Annotated[float | None, typer.Option(help="TFLOP/s; without it, measured on the GPU.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="TB/s of memory; without it, measured on the GPU.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Also run one step with random weights.")] = False,
) -> None:
    """Estimate memory and time of a run, and say whether it fits on this machine."""
    from .doctor import run_doctor

    try:
        run_doctor(
            model,
            memory,
            tflops,
            bandwidth,
            dry_run,
            image_size=image_size,
            num_generations=num_generations,
            num_prompts=num_prompts,
            prompt_length=prompt_length,
            completion_length=completion_length,
            num_inference_steps=num_inference_steps,
            sde_window_size=sde_window_size,
            num_iterations=num_iterations,
            micro_batch_size=micro_batch_size,
            image_batch_size=image_batch_size,
            lora_ranks=(lora_rank, lora_rank) if lora_rank else None,
            quantization=None if quantization == "none" else quantization,
            gradient_checkpointing=gradient_checkpointing,
        )
    except (ValueError, OSError) as error:
        typer.echo(f"trl-unigrpo doctor: {error}", err=True)
        raise typer.Exit(1) from error


@app.command()
def decompose(
    input: Annotated[str, typer.Option(help="Prompts: a csv, json, jsonl, parquet or txt file, a folder or hub id.")],
    output: Annotated[
        str, typer.Option(help="jsonl file of the rows with their questions; a later run goes on with it.")
    ],
    model: Annotated[str | None, typer.Option(help="Name of the model at the endpoint.")] = None,
    base_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible endpoint; its key is read from OPENAI_API_KEY.")
    ] = None,
    geneval: Annotated[
        bool, typer.Option("--geneval", help="Rows are GenEval's metadata: questions by rule, without a model.")
    ] = False,
    quality: Annotated[bool, typer.Option(help="Also ask for questions about the image's quality.")] = True,
    split: Annotated[str, typer.Option(help="Split of a folder or hub dataset.")] = "train",
    concurrency: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 16,
    attempts: Annotated[int, typer.Option(min=1, help="Answers per prompt before it counts as failed.")] = 3,
    timeout: Annotated[float, typer.Option(help="Seconds without an answer before a request is repeated.")] = 120.0,
    max_retries: Annotated[int, typer.Option(min=0, help="Repetitions of a request that the endpoint failed on.")] = 4,
) -> None:
    """Turn prompts into yes-no questions for DVReward and QuestionReward."""
    from ..rewards.questions.decompose import decompose_with_progress, failures_file
    from .prompt_files import read_rows

    options = {"quality": quality, "attempts": attempts, "timeout": timeout, "max_retries": max_retries}
    try:
        report = decompose_with_progress(
            read_rows(input, split),
            output,
            model=model,
            base_url=base_url,
            geneval=geneval,
            concurrency=concurrency,
            **options,
        )
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"trl-unigrpo decompose: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(
        f"{output}: {report.written} decomposed, {report.skipped} there already, {report.repeated} repeated, "
        f"{report.failed} failed, {report.left} not tried."
    )
    if report.failed:
        typer.echo(f"{failures_file(output)} says why. The same command tries them again.", err=True)
        raise typer.Exit(1)


@app.command("eval")
def evaluate(
    benchmark: Annotated[
        str | None, typer.Option(help="geneval or shapeworld; with --data: dpg, tiif, wise, geneval2 or gedit.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="The benchmark's file or folder.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Own prompts instead: a csv, json, jsonl, parquet or txt file.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id: a model, a checkpoint, or adapters; or 'shapeworld'.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="What adapters were trained on, if they don't say.")] = None,
    thinker: Annotated[str | None, typer.Option(help="Language model of a pipeline.")] = None,
    painter: Annotated[
        str | None, typer.Option(help="diffusers pipeline, instead of a model or below adapters.")
    ] = None,
    output_dir: Annotated[str | None, typer.Option(help="Folder of the results; a later run goes on with it.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Pictures of each prompt; the benchmark's own.")] = None,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="Only so many prompts, spread over the tasks.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; 50, ShapeWorld's 10.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Pixels of a side; 1024, ShapeWorld's 48.")] = None,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance by the prompt; 1 is off.")] = 1.0,
    image_guidance_scale: Annotated[float, typer.Option(help="Guidance by the thinking; 1 is off.")] = 1.0,
    guidance_interval: Annotated[
        tuple[float, float], typer.Option(help="Times at which to guide, low and high; 1 is noise.")
    ] = (0.4, 1.0),
    guidance_renorm: Annotated[str, typer.Option(help="global, channel or text_channel.")] = "global",
    guidance_renorm_min: Annotated[float, typer.Option(help="Least factor of the renorm, 0 to 1.")] = 0.0,
    timestep_shift: Annotated[float, typer.Option(help="Shift of the schedule towards noise.")] = 3.0,
    thinking: Annotated[bool, typer.Option(help="Think before painting.")] = True,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="The most probable thinking instead of a sampled one.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="Of sampled thinkings.")] = 1.0,
    max_completion_length: Annotated[int | None, typer.Option(min=1, help="Thinking tokens; 512.")] = None,
    system_prompt: Annotated[str, typer.Option(help="'auto' for the model's own.")] = "auto",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Pictures at once; 8, ShapeWorld's 210.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of thinkings and noise; 0, ShapeWorld's 1234.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[
        str | None, typer.Option(help="Such as cuda:1 or cpu; by default a GPU if there is one.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="Name of the judge at the endpoint.")] = None,
    judge_base_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible endpoint; its key is read from OPENAI_API_KEY.")
    ] = None,
    judge_mode: Annotated[str, typer.Option(help="logprobs, or score for endpoints without log-probs.")] = "logprobs",
    judge_concurrency: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 32,
    judge_cache: Annotated[str | None, typer.Option(help="sqlite file that keeps the judge's answers.")] = None,
    local_judge: Annotated[str | None, typer.Option(help="Folder or hub id of a judge in this process.")] = None,
    rewards: Annotated[
        list[str] | None, typer.Option(help="Reward functions as module:NAME instead of a judge, repeated.")
    ] = None,
    detector: Annotated[str | None, typer.Option(help="GenEval's Mask2Former, if not the released one.")] = None,
    clip: Annotated[str | None, typer.Option(help="GenEval's CLIP, if not the released one.")] = None,
    no_score: Annotated[bool, typer.Option("--no-score", help="Only paint; a later run scores.")] = False,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Two folders of results, A and B: paired test, and both side by side."),
    ] = None,
    write_prompts: Annotated[
        str | None, typer.Option(help="jsonl file to write GenEval prompts to train on to; --seed, --num-prompts.")
    ] = None,
) -> None:
    """Paint a benchmark's prompts and score them; or compare two results; or write prompts to train on."""
    from pathlib import Path

    from rich.console import Console

    from ..evaluation.command import (
        Judging,
        prepare,
        run_comparison,
        write_training_prompts,
    )
    from ..evaluation.command import evaluate as run
    from ..flow.guidance import Guidance
    from ..rewards.common import DeadRewardError

    console = Console()
    try:
        if compare is not None:
            run_comparison(*compare, Path(output_dir or "eval-compare"), console)
            return
        if write_prompts is not None:
            number = write_training_prompts(Path(write_prompts), seed or 0, num_prompts or 100)
            typer.echo(f"{write_prompts}: {number} prompts, none of them GenEval's.")
            return
        if (benchmark is None) == (prompts is None):
            raise ValueError("Pass either --benchmark or --prompts (or --compare A B, or --write-prompts FILE).")
        name = benchmark or "prompts"
        chosen = prepare(name, prompts or data, num_prompts, seed)
        guidance = Guidance(
            guidance_scale, image_guidance_scale, guidance_interval, guidance_renorm, guidance_renorm_min
        )
        run(
            chosen,
            Judging(
                judge_model=judge_model,
                judge_base_url=judge_base_url,
                judge_mode=judge_mode,
                judge_concurrency=judge_concurrency,
                judge_cache=judge_cache,
                local_judge=local_judge,
                rewards=tuple(rewards or ()),
                detector=detector,
                clip=clip,
                none=no_score,
            ),
            Path(output_dir or f"eval-{name}"),
            console,
            model={
                "source": model,
                "base": base,
                "thinker": thinker,
                "painter": painter,
                "dtype": dtype,
                "device": device,
            },
            options={
                "thinking": thinking,
                "do_sample": not greedy,
                "temperature": temperature,
                "timestep_shift": timestep_shift,
                "system_prompt": system_prompt,
            },
            painting={
                "samples": samples,
                "num_inference_steps": steps,
                "image_size": image_size,
                "max_completion_length": max_completion_length,
                "batch_size": batch_size,
                "seed": seed,
            },
            guidance=guidance,
        )
    except KeyboardInterrupt:
        typer.echo("trl-unigrpo eval: stopped. The same command goes on where it stopped.", err=True)
        raise typer.Exit(130) from None
    except (ValueError, OSError, ImportError, NotImplementedError, DeadRewardError) as error:
        typer.echo(f"trl-unigrpo eval: {error}", err=True)
        raise typer.Exit(1) from error


@app.command()
def paper(
    output_dir: Annotated[
        str | None, typer.Option(help="Folder of the runs; paper-runs, or paper-quick with --quick.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Systems or groups (table1, figure4, figure5, ablations), repeated or with commas."),
    ] = None,
    seeds: Annotated[
        list[str] | None,
        typer.Option(help="Seeds, repeated or with commas; 0 to 4 for table1, 0 to 2 for the others."),
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time, a core each; by default all cores.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few systems, shorter: minutes instead of hours.")] = False,
    search: Annotated[
        bool, typer.Option("--search", help="Choose the learning rates on validation prompts instead.")
    ] = False,
    chosen: Annotated[str | None, typer.Option(help="File of the chosen rates; without it, the shipped one.")] = None,
    page: Annotated[str | None, typer.Option(help="Markdown file to write; paper.md in the output folder.")] = None,
    show: Annotated[
        bool, typer.Option("--list", help="Only show the runs that are done and left, and the time.")
    ] = False,
    steps: Annotated[
        int | None, typer.Option(min=2, help="Rollouts of 192 trajectories per run, to try things out; 70.")
    ] = None,
) -> None:
    """Train every system of the paper's tables on ShapeWorld, and write them as a page. Goes on where it stopped."""
    from pathlib import Path

    from rich.console import Console

    from ..experiments.paper.runner import (
        PaperOptions,
        run_paper,
        show_grid,
        usable_cores,
    )
    from ..experiments.paper.systems import CHOSEN

    try:
        options = PaperOptions(
            output=Path(output_dir or ("paper-quick" if quick else "paper-runs")),
            chosen=Path(chosen) if chosen else CHOSEN,
            jobs=jobs or usable_cores(),
            only=_parts(only),
            seeds=tuple(map(_seed, _parts(seeds))) or ((0, 1) if quick else None),
            quick=quick,
            search=search,
            page=Path(page) if page else None,
            generations=steps,
        )
        if show:
            show_grid(options, Console())
            return
        code = run_paper(options, Console())
    except (ValueError, OSError) as error:
        typer.echo(f"trl-unigrpo paper: {error}", err=True)
        raise typer.Exit(1) from error
    raise typer.Exit(code)


def _parts(values: list[str] | None) -> tuple[str, ...]:
    """The values of an option that is given repeatedly or with commas."""
    return tuple(part.strip() for value in values or () for part in value.split(",") if part.strip())


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"--seeds {text}: expected whole numbers of at least 0, such as 0,1,2.")
    return int(text)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="Output folders of runs: finished, going on, or broken off.")],
    output: Annotated[
        str | None,
        typer.Option(help="The page; gallery.html in the folder of a single run, comparison.html here for several."),
    ] = None,
) -> None:
    """Write the page of a run, or of several side by side: pictures, curves, alarms."""
    from ..reporting.run_page import write_report

    try:
        file = write_report(runs, output)
    except (ValueError, OSError) as error:
        typer.echo(f"trl-unigrpo report: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{file}")


@app.command("build-shapeworld")
def build_shapeworld(
    output_dir: Annotated[str, typer.Option(help="Folder for the model.")] = "shapeworld-base",
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the autoencoder, the corpus, the weights and the order.")
    ] = 0,
) -> None:
    """Pre-train the demo's base model from nothing (about 15 CPU minutes)."""
    from ..experiments.base.build import build_base

    build_base(output_dir, seed)


@app.command("serve-rewards")
def serve_rewards(
    rewards: Annotated[list[str], typer.Argument(help="Rewards as module:NAME, such as my_rewards:redness.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")] = 8000,
    token_env: Annotated[
        str | None, typer.Option(help="Environment variable with the token; needed unless the host is 127.0.0.1.")
    ] = None,
    max_images: Annotated[int, typer.Option(min=1, help="Images in a request.")] = 64,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Size of a request, in MiB.")] = 256,
    max_pixels: Annotated[int, typer.Option(min=1, help="Width x height of an image.")] = 2048 * 2048,
) -> None:
    """Serve reward functions over HTTP, for trl_unigrpo.rewards.RemoteReward."""
    try:
        from ..rewards.remote.server import Limits, serve

        serve(rewards, host, port, token_env, Limits(max_images, max_body_mb * 2**20, max_pixels))
    except (ImportError, ValueError) as error:
        typer.echo(f"trl-unigrpo serve-rewards: {error}", err=True)
        raise typer.Exit(1) from error


def main() -> None:
    app()
