"""`trl-unigrpo eval`: from options to a folder of results, or from two folders to their comparison."""

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..flow.guidance import Guidance
from ..monitoring.files import replace_file
from .benchmark import Benchmark, Painting, evenly_spread
from .benchmarks import load_benchmark
from .compare import compare_folders, comparison_table
from .options import BaseOptions, BenchmarkOptions, Judging, ModelOptions, PaintingOptions, RoundsOptions
from .page import write_comparison, write_index
from .round_table import round_tables
from .scorers import (
    JudgeScorer,
    RewardScorer,
    Scorer,
    ShapeWorldScorer,
    detector_scorer,
    scorer_kind,
)
from .summary import plain, summarize, table


if TYPE_CHECKING:
    from .refining import Look
    from .runner import Options


def prepare(prompts: BenchmarkOptions, seed: int | None) -> Benchmark:
    """Load the benchmark with so many of its prompts."""
    number = prompts.num_prompts
    benchmark = load_benchmark(prompts.name, prompts.prompts or prompts.data, number, seed)
    if prompts.name == "shapeworld" or number is None:
        return benchmark
    if number < 1:
        raise ValueError(f"num_prompts={number}: expected at least 1.")
    return replace(benchmark, items=evenly_spread(benchmark.items, number))


def build_scorer(benchmark: Benchmark, judging: Judging) -> Scorer | None:
    """
    Choose what scores this benchmark: what the user asks for, or else what fits it.

    Raises:
        ImportError: naming the extra to install, before anything is painted.
        ValueError: if there is nothing to score it by, with what to pass.
    """
    if judging.none:
        return None
    asked = judging.judge_model is not None or judging.local_judge is not None
    if judging.detector is not None and (asked or judging.rewards):
        raise ValueError("Pass one of a judge, rewards and a detector: each gives other numbers.")
    if judging.rewards:
        from ..rewards.loading import load_judged

        asker, settings = _judge(judging) if asked else (None, {})
        label = f"rewards {', '.join(judging.rewards)}" + (f", judge {settings['judge']}" if asked else "")
        rewards = load_judged(judging.rewards, asker)
        return RewardScorer(rewards, label, {"rewards": list(rewards), **settings})
    if asked:
        asker, settings = _judge(judging)
        if benchmark.metric is None:  # no questions: the judge is asked about the prompt as a whole
            return RewardScorer({"judge": asker}, f"judge {settings['judge']}", settings, total="judge")
        return JudgeScorer(asker, benchmark.metric, settings["judge"], settings)
    kind = scorer_kind(benchmark)
    if kind == "rule":
        return ShapeWorldScorer()
    if kind == "detector":
        from ..rewards.clip.clip_reward import CLIP_L
        from ..rewards.geneval.geneval_reward import MASK2FORMER

        detector = judging.detector or MASK2FORMER
        return detector_scorer(detector, judging.clip or CLIP_L, detector)
    wanted = "a judge (--judge-model and --judge-base-url, or --local-judge)"
    if kind == "rewards":
        wanted += ", or --rewards module:NAME,"
    raise ValueError(f"{benchmark.title} needs {wanted} to score its images. --no-score only paints them.")


def _judge(judging: Judging) -> tuple[Any, dict[str, Any]]:
    """Make the judge that was asked for, with what its answers depend on."""
    if judging.local_judge is not None:
        from ..rewards.judge.local_judge import LocalVLMJudge

        return LocalVLMJudge(judging.local_judge), {"judge": judging.local_judge, "local": True}
    from ..rewards.judge.vlm_judge import VLMJudge

    name = str(judging.judge_model)
    judge = VLMJudge(
        name,
        judging.judge_base_url,
        mode=judging.judge_mode,
        concurrency=judging.judge_concurrency,
        cache=judging.judge_cache,
    )
    return judge, {"judge": name, "mode": judging.judge_mode}


def evaluate(
    benchmark: Benchmark,
    model: ModelOptions,
    base: BaseOptions,
    painting: PaintingOptions,
    judging: Judging,
    folder: Path,
    console: Console,
    rounds: RoundsOptions | None = None,
) -> dict[str, Any]:
    """
    Paint, score, and write `summary.json` and `index.html`; with several rounds `rounds.json` and `rounds.html`, too.

    Returns:
        The summary.
    """
    from .models import base_revision, fingerprint, load_model, parts_of
    from .round_run import check_rounds_asked, run_rounds
    from .runner import run, without_unfit_prompts

    rounds = rounds or RoundsOptions()
    options = run_options(painting, benchmark.painting, rounds.rounds or 1)
    scorer = build_scorer(benchmark, judging)  # before the model, whose loading takes longer
    if benchmark.name == "shapeworld" and model.dtype == "auto":
        model = replace(model, dtype="float32")  # the demo's, on any hardware
    loaded, tokenizer = load_model(**vars(model), **vars(base))
    bring_model(scorer, loaded, tokenizer)
    if rounds.rounds is not None:
        check_rounds_asked(loaded, scorer, options, rounds.rounds, look_of(rounds))
    benchmark = without_unfit_prompts(benchmark, loaded, tokenizer, options)
    for problem in benchmark.problems:
        console.print(plain(f"Left out: {problem}"), highlight=False, soft_wrap=True)
    parts = parts_of(model.source, **vars(base))
    revisions = {"base": base_revision(model.source)} if base.base is None else {}
    prints: dict[str, Any] = {"dtype": str(loaded.dtype)}
    prints |= {part: fingerprint(source, revisions.get(part)) for part, source in parts.items()}
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TimeElapsedColumn(), TimeRemainingColumn()),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(benchmark.title, total=None)
        lines = run(
            loaded,
            tokenizer,
            benchmark,
            scorer,
            folder,
            options,
            prints,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    summary = finish(folder, benchmark, scorer, lines, console, " + ".join(parts.values()))
    if rounds.rounds is not None and scorer is not None:
        how = options, rounds.rounds, look_of(rounds)
        for each in round_tables(run_rounds(loaded, tokenizer, benchmark, scorer, folder, *how, lines)):
            console.print(each)
        console.print(plain(str(folder / "rounds.html")), highlight=False, soft_wrap=True)
    return summary


def bring_model(scorer: Scorer | None, model: Any, tokenizer: Any) -> None:
    """Give the evaluated model to the rewards that read its images by it."""
    from ..models.registry import unified_model
    from ..sampling.self_reader import bring_readers

    if isinstance(scorer, RewardScorer):
        bring_readers(scorer.rewards.values(), unified_model(model), tokenizer)


def look_of(rounds: RoundsOptions) -> "Look":
    """Say how the model looks again, by the options."""
    from .refining import Look

    return Look(
        rounds.reflection_template or Look.reflection_template,
        rounds.stop_text or None,
        rounds.max_reflection_length,
        rounds.round_context,
    )


def run_options(asked: PaintingOptions, painting: Painting, least: int = 1) -> "Options":
    """Settings of a run: the benchmark's own painting with what the user asks for, of so many images at least."""
    from .runner import Options, with_changes

    changed = with_changes(painting, **{each.name: getattr(asked, each.name) for each in fields(painting)})
    return Options(
        replace(changed, samples=max(least, changed.samples)),
        thinking=asked.thinking,
        do_sample=not asked.greedy,
        temperature=asked.temperature,
        timestep_shift=asked.timestep_shift,
        guidance=Guidance(
            asked.guidance_scale,
            asked.image_guidance_scale,
            asked.guidance_interval,
            asked.guidance_renorm,
            asked.guidance_renorm_min,
        ),
        system_prompt=asked.system_prompt,
    )


def finish(
    folder: Path,
    benchmark: Benchmark,
    scorer: Scorer | None,
    lines: Sequence[dict[str, Any]],
    console: Console,
    model: str,
) -> dict[str, Any]:
    """Write the summary and the page of a whole folder of lines."""
    from .results import read_settings

    label = f"{benchmark.title} ({scorer.label})" if scorer is not None else f"{benchmark.title} (not scored)"
    summary = {
        "model": model,
        **summarize(read_settings(folder), lines, label),
        "problems": list(benchmark.problems),
        "notes": list(benchmark.notes),
    }
    replace_file(folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    write_index(folder, summary, lines)
    if summary["metrics"]:
        console.print(table(summary))
    if summary["unscored"] and scorer is not None:
        why = next(line["error"] for line in lines if line["reward"] is None)
        told = f"{summary['unscored']} of {summary['images']} images have no score ({why}). They are in no mean; the "
        console.print(plain(told + "same command scores them again."), highlight=False, soft_wrap=True)
    console.print(plain(str(folder / "index.html")), highlight=False, soft_wrap=True)
    return summary


def run_comparison(first: str, second: str, folder: Path, console: Console) -> dict[str, Any]:
    """Compare two folders; write `compare.json` and `compare.html`."""
    report, pairs = compare_folders(first, second)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "compare.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_comparison(folder, report, pairs)
    console.print(comparison_table(report))
    for name, values in report["different_settings"].items():
        told = f"Different settings: {name} is {values['a']!r} in A, {values['b']!r} in B."
        console.print(plain(told), highlight=False, soft_wrap=True)
    console.print(plain(str(folder / "compare.html")), highlight=False, soft_wrap=True)
    return report


def write_training_prompts(file: Path, seed: int, per_task: int) -> int:
    """Write GenEval rows to train on as jsonl, with the column `geneval` for `GenEvalReward`; how many there are."""
    from .benchmarks.geneval_prompts import table_row, training_rows

    rows = training_rows(seed, per_task)
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, "".join(json.dumps(table_row(row)) + "\n" for row in rows))
    return len(rows)
