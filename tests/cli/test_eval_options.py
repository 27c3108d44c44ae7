"""Options of `trl-unigrpo eval`: what is typed is what the evaluation works with."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from trl_unigrpo.cli import app
from trl_unigrpo.evaluation import Guidance, Options
from trl_unigrpo.evaluation import command as evaluation
from trl_unigrpo.evaluation.benchmark import Painting
from trl_unigrpo.evaluation.options import (
    BaseOptions,
    BenchmarkOptions,
    Judging,
    ModelOptions,
    PaintingOptions,
    RoundsOptions,
)


@pytest.fixture
def evaluated(monkeypatch):
    """Arguments of each call of `evaluate`, which does nothing."""
    calls = []
    monkeypatch.setattr(evaluation, "evaluate", lambda *given: calls.append(given))
    return calls


def invoke(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_options_are_the_objects_of_the_evaluation(evaluated, tmp_path):
    result = invoke(
        *("--benchmark", "shapeworld", "--num-prompts", 14, "--output-dir", tmp_path / "out"),
        *("--model", "a", "--base", "b", "--thinker", "c", "--painter", "d", "--dtype", "float32", "--device", "cpu"),
        *("--samples", 2, "--num-inference-steps", 3, "--seed", 5, "--guidance-scale", 4, "--no-thinking", "--greedy"),
        *("--judge-model", "j", "--judge-concurrency", 6, "--rewards", "m:a", "--rewards", "m:b", "--no-score"),
        *("--rounds", 3, "--reflection-template", "{prompt}?", "--stop-text", "", "--round-context", "full"),
    )
    assert result.exit_code == 0, result.output
    ((benchmark, model, base, painting, judging, folder, _, rounds),) = evaluated
    assert rounds == RoundsOptions(3, "{prompt}?", "", round_context="full")
    assert len(benchmark.items) == 14 and folder == tmp_path / "out"
    assert (model, base) == (ModelOptions("a", "float32", "cpu"), BaseOptions("b", "c", "d"))
    assert painting == PaintingOptions(
        2, 3, guidance_scale=4.0, guidance_interval=(0.4, 1.0), thinking=False, greedy=True, seed=5
    )
    assert judging == Judging("j", judge_concurrency=6, rewards=["m:a", "m:b"], none=True)


def test_without_options(evaluated):
    assert invoke("--benchmark", "shapeworld").exit_code == 0
    ((_, model, base, painting, judging, folder, _, rounds),) = evaluated
    assert (model, base, painting, judging) == (ModelOptions(), BaseOptions(), PaintingOptions(), Judging())
    assert rounds == RoundsOptions()
    assert folder == Path("eval-shapeworld")


def test_steps_is_the_former_name_of_num_inference_steps(evaluated):
    result = invoke("--benchmark", "shapeworld", "--steps", 3)
    assert result.exit_code == 0 and evaluated[0][3].num_inference_steps == 3
    assert result.stderr == "Note: --steps is called --num-inference-steps now; the former name will go.\n"


def test_a_run_s_options_are_the_benchmark_s_painting_with_what_was_asked_for():
    own = Painting(4, 20, 64, 32, 6, 7)
    assert evaluation.run_options(PaintingOptions(), own) == Options(own)
    asked = PaintingOptions(
        *(1, 2, "32x48"),
        *(4.0, 2.0, (0.1, 0.9), "channel", 0.5),
        *(1.5, False, True, 0.7, 8, "be brief", 3, 0),
    )
    guidance = Guidance(4.0, 2.0, (0.1, 0.9), "channel", 0.5)
    assert evaluation.run_options(asked, own) == Options(
        Painting(1, 2, [32, 48], 8, 3, 0),
        thinking=False,
        do_sample=False,
        temperature=0.7,
        timestep_shift=1.5,
        guidance=guidance,
        system_prompt="be brief",
    )


@pytest.mark.parametrize("options", [BenchmarkOptions(), BenchmarkOptions("geneval", prompts="p.txt")])
def test_a_benchmark_or_own_prompts(options):
    with pytest.raises(ValueError, match="either --benchmark or --prompts"):
        _ = options.name


def test_options_load_no_torch():
    import subprocess
    import sys

    code = (
        "import trl_unigrpo.evaluation.options, sys; print([m for m in ('torch', 'PIL', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
