"""`trl-unigrpo doctor`, its advice, the dry run, and the line that a run starts with."""

import re
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from tests.helpers.paths import FIXTURES
from trl_unigrpo.__about__ import versions
from trl_unigrpo.cli import app
from trl_unigrpo.cli.doctor_tables import run_doctor
from trl_unigrpo.estimate import (
    Workload,
    estimate,
    estimate_memory,
    released_config,
    traffic,
)
from trl_unigrpo.estimate.advice import advise
from trl_unigrpo.estimate.hardware import copy_rate, matmul_rate
from trl_unigrpo.estimate.levers import levers
from trl_unigrpo.estimate.report import ESTIMATES
from trl_unigrpo.monitoring.expected import ExpectedCost, expected_cost
from trl_unigrpo.trainers.dry_run import dry_run, random_trainer


TINY = FIXTURES / "bagel" / "tiny_bagel"
SMALL = ("--image-size", "32", "--prompt-length", "8", "--completion-length", "4", "--num-generations", "2")
SMALL += ("--num-inference-steps", "5", "--micro-batch-size", "2", "--lora-rank", "2")
GIB = 2**30


def doctor(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "200"})


def row(output, name):
    """The cells of the first table row whose first cell is `name`."""
    found = re.search(rf"│ {re.escape(name)} +│(.+)│", output)
    return [cell.strip() for cell in found[1].split("│")]


def test_doctor_says_what_the_released_model_takes():
    result = doctor("--memory", "139", "--tflops", "790", "--bandwidth", "4.8", "--image-size", "1024")
    assert result.exit_code == 0
    load = Workload(released_config(), 1024, image_batch_size=8)
    expected = estimate(load)
    assert row(result.output, "weights") == ["27.21", "all the time"]
    assert row(result.output, "update") == [f"{expected.memory.peaks['update'] / GIB:.2f}"]
    seconds = expected.floor_seconds(790e12, 4.8e12)
    assert row(result.output, "floor") == [f"{sum(expected.flops.values()) / 1e15:.3f}", f"{seconds:.1f}"]
    assert row(result.output, "torch") == [torch.__version__]
    assert "Fits: peak" in result.output


def test_doctor_for_several_gpus():
    machine = ("--memory", "80", "--tflops", "790", "--bandwidth", "3.35", "--interconnect", "300")
    settings = {"processes": 8, "fsdp": True, "image_batch_size": 8}
    result = doctor("--processes", "8", "--fsdp", "--lora-rank", "0", *machine)
    assert result.exit_code == 0
    load = Workload(released_config(), 512, lora_ranks=None, **settings)
    found = traffic(load)
    assert {"rollout", "update, all-gather", "gradients, reduce-scatter"} <= {*found}
    said = result.output.partition("What reaches a GPU: 8 processes, FSDP2, 300 GB/s")[2]
    for name, part in found.items():
        number = part.bytes / 1e9
        assert row(said, name) == [str(part.times), f"{number:.1f}", f"{number / 300:.2f}"]
    for name, ranks in {"LoRA, rank 32": (32, 32), "full fine-tuning": None}.items():
        for size in (512, 1024):
            one = estimate(replace(load, image_size=size, lora_ranks=ranks))
            number = sum(part.bytes for part in traffic(one.workload).values()) / 1e9
            cells = [f"{one.memory.peak / GIB:.1f}", f"{one.floor_seconds(790e12, 3.35e12):.1f}", f"{number:.1f}"]
            assert row(said, f"{name}, {size} pixels") == [*cells, f"{number / 300:.2f}"]
    tiny = doctor("--model", str(TINY), *SMALL, "--processes", "2")
    assert "2 processes, DDP, 450 GB/s" in tiny.output and row(tiny.output, "gradients, all-reduce")[0] == "2"


@pytest.mark.slow
def test_doctor_advises_until_it_fits():
    result = doctor("--memory", "24", "--no-gradient-checkpointing")
    assert result.exit_code == 0
    changes = ["gradient_checkpointing=True", "per_device_train_batch_size=1", "nf4 weights: --load_in_4bit"]
    peaks = [float(row(result.output, change)[0]) for change in changes]
    assert "Does not fit: peak" in result.output and "Even so" not in result.output
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] <= 24 * 0.92
    assert "Even so it needs" in doctor("--memory", "4").output


def test_doctor_without_a_gpu_says_what_is_missing():
    result = doctor("--model", str(TINY), *SMALL)
    assert result.exit_code == 0
    assert "give --tflops" in result.output and "--memory says what to fit into" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--processes", "2", "--dry-run"), "A dry run is one of one GPU"),
        (("--fsdp",), "fsdp=True with processes=1"),
        (("--interconnect", "0"), "interconnect=0: expected a number above 0"),
        (("--model", "no/such/folder/at-all"), "no/such/folder"),
        (("--model", str(TINY.parent)), "is not a BAGEL checkpoint: expected `llm_config.json`"),
        (("--image-size", "500"), "image_size=500: .*multiples of 16, at most 1024"),
        (("--image-size", "512x768x3"), "image_size='512x768x3': expected the side of a square"),
        (("--quantization", "int3"), "quantization='int3': expected"),
        (("--lora-rank", "0", "--quantization", "nf4"), "trains adapters only"),
        (("--lora-rank", "-1"), "lora_ranks"),
        (("--memory", "0"), "memory=0.*above 0"),
        (("--tflops", "-1"), "tflops=-1.*above 0"),
        (("--dry-run",), "14.6 G parameters needs a GPU"),
    ],
)
def test_mistakes_are_one_readable_line(arguments, message):
    result = doctor(*arguments)
    assert result.exit_code == 1
    assert re.search(f"trl-unigrpo doctor: .*{message}", result.output.replace("\n", " ")), result.output


def test_dry_run_trains_the_sizes_of_a_folder():
    result = doctor("--model", str(TINY), *SMALL, "--dry-run")
    assert result.exit_code == 0, result.output
    assert re.search(r"Dry run with random weights: [\d.]+ s for one generation", result.output)
    assert "thinkings of 2 to 4 tokens" in result.output


def test_doctor_knows_averages():
    result = doctor("--memory", "139", "--tflops", "790", "--bandwidth", "4.8", "--ema", "--image-old-policy")
    assert result.exit_code == 0, result.output
    adapters = estimate_memory(Workload(released_config(), 512)).parts["adapters"]
    assert row(result.output, "averaged weights") == [f"{1.5 * adapters / GIB:.2f}", "all the time"]
    tiny = doctor("--model", str(TINY), *SMALL, "--dry-run", "--ema", "--image-old-policy")
    assert tiny.exit_code == 0 and "Dry run with random weights" in tiny.output, tiny.output


def test_doctor_names_the_lever_that_saves_most():
    result = doctor("--memory", "139", "--tflops", "790", "--bandwidth", "4.8", "--images-per-thinking", "2")
    assert result.exit_code == 0, result.output
    load = Workload(released_config(), 512, image_batch_size=8, images_per_thinking=2)
    best, *others = levers(load, int(139 * GIB * 0.92))
    assert f"Saves most of a generation's FLOPs: {best.setting}, {best.saved:.0%}." in result.output.replace("\n", " ")
    assert row(result.output, "num_iterations=1")[1] == next(
        f"{lever.saved:.1%}" for lever in others if lever.setting == "num_iterations=1"
    )
    lines = ("--lines", "--scout-generations", "4", "--scout-num-inference-steps", "2", "--dead-share", "0.2")
    tiny = doctor("--model", str(TINY), *SMALL, *lines)
    assert tiny.exit_code == 0 and float(row(tiny.output, "scouts")[0]) >= 0, tiny.output


def test_dry_run_makes_every_optimizer_step(tmp_path):
    load = tiny_load(num_iterations=3)
    trainer = random_trainer(load, torch.device("cpu"), str(tmp_path))
    trainer.train()
    assert trainer.state.global_step == 3
    assert dry_run(load, torch.device("cpu")).peak_bytes is None
    with pytest.raises(ValueError, match="num_prompts=2.*takes one prompt"):
        dry_run(replace(load, num_prompts=2), torch.device("cpu"))


def test_adapters_of_each_expert_have_their_rank(tmp_path):
    trainer = random_trainer(tiny_load(lora_ranks=(2, 4)), torch.device("cpu"), str(tmp_path))
    load = Workload.of_run(trainer.unified, trainer.args, prompt_length=8)
    assert load.lora_ranks == (2, 4)
    trained = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    assert estimate_memory(load).parts["adapters"] == trained


def tiny_load(**changes) -> Workload:
    from trl_unigrpo import BagelConfig

    sizes = {
        "prompt_length": 8,
        "completion_length": 4,
        "num_generations": 2,
        "num_inference_steps": 5,
        "micro_batch_size": 2,
        "lora_ranks": (2, 2),
        "half": False,
    }
    return Workload(BagelConfig.from_pretrained(TINY), 32, **{**sizes, **changes})


def test_a_run_is_read_as_it_was_configured(tmp_path):
    load = tiny_load(image_batch_size=1, gradient_checkpointing=False, reference=False, sde_window_size=2)
    trainer = random_trainer(load, torch.device("cpu"), str(tmp_path))
    assert Workload.of_run(trainer.unified, trainer.args, prompt_length=8) == replace(
        load, config=trainer.unified.config
    )


def test_lines_without_thinking_are_read_as_they_were_configured(tmp_path):
    load = tiny_load(image_batch_size=1)
    trainer = random_trainer(load, torch.device("cpu"), str(tmp_path))
    trainer.args.image_objective, trainer.args.matching_samples, trainer.args.thinking = "fpo", 4, False
    read = Workload.of_run(trainer.unified, trainer.args, prompt_length=8)
    assert (read.sde_window_size, read.completion_length, read.lines) == (4, 1, True)
    trainer.args.matching_samples = 9  # more points than denoising steps
    assert Workload.of_run(trainer.unified, trainer.args, prompt_length=8).sde_window_size == 9


@pytest.mark.parametrize("quantization", ["nf4", "nf4-double"])
def test_quantisation_is_seen(tmp_path, quantization):
    pytest.importorskip("bitsandbytes")
    load = tiny_load(quantization=quantization)
    trainer = random_trainer(load, torch.device("cpu"), str(tmp_path))
    assert Workload.of_run(trainer.unified, trainer.args).quantization == quantization


# Advice


def test_advice_comes_in_order_and_each_helps():
    load = Workload(released_config(), 1024, gradient_checkpointing=False)
    limit = 20 * GIB
    found = advise(load, limit)
    settings = [item.setting.split("=")[0] for item in found]
    assert settings[0] == "gradient_checkpointing"
    assert settings.index("per_device_train_batch_size") < settings.index("nf4 weights: --load_in_4bit")
    peaks = [estimate_memory(load).peak, *(item.peak for item in found)]
    assert all(after < before for before, after in pairwise(peaks))
    assert peaks[-1] <= limit < peaks[-2]
    assert [item.peak for item in found] == [estimate_memory(item.workload).peak for item in found]


def test_no_advice_where_it_fits_and_adapters_first_where_all_is_trained():
    assert advise(Workload(released_config(), 512), 139 * GIB) == []
    full = advise(Workload(released_config(), 512, lora_ranks=None), 139 * GIB)
    assert [item.setting for item in full] == ["adapters instead of full fine-tuning: LoraConfig(r=32, lora_alpha=64)"]


def test_an_average_that_does_not_fit_is_given_up_after_the_adapters():
    load = Workload(released_config(), 512, lora_ranks=None, ema=True, image_old_policy=True, image_batch_size=1)
    assert [item.setting for item in advise(load, 1)][1] == "ema_decay=None"


# Rates


def test_rates_are_measured():
    device = torch.device("cpu")
    assert 1e7 < matmul_rate(device, 64, torch.float32) < 1e14
    assert 1e7 < copy_rate(device, 2**20) < 1e14


def test_versions_name_what_is_missing():
    found = versions("no-such-package")
    assert found["torch"] == torch.__version__ and found["no-such-package"] == "not installed"


# The line at the start of a run


def test_expected_cost_is_the_estimate_of_the_run(tmp_path):
    trainer = random_trainer(tiny_load(), torch.device("cpu"), str(tmp_path))
    expected = estimate(Workload.of_run(trainer.unified, trainer.args))
    line = expected_cost(trainer.model, trainer.args, 2e9, 1e9, 8 * GIB)
    assert f"at least {expected.floor_seconds(2e9, 1e9):.3g} s per generation" in line
    assert f"peak memory {expected.memory.peak / GIB:.3g} of 8 GiB" in line


def test_models_without_an_estimate_are_skipped(tmp_path, monkeypatch):
    trainer = random_trainer(tiny_load(), torch.device("cpu"), str(tmp_path))
    monkeypatch.delitem(ESTIMATES, type(trainer.unified))
    assert expected_cost(trainer.model, trainer.args, 1, 1, 1) is None


def test_said_once_on_a_gpu_and_never_in_the_way(tmp_path, capsys, monkeypatch):
    trainer = random_trainer(tiny_load(), torch.device("cpu"), str(tmp_path))
    (callback,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, ExpectedCost))
    gpu = SimpleNamespace(device=torch.device("cuda", 77))
    main, other = (SimpleNamespace(is_world_process_zero=main) for main in (True, False))
    assert capsys.readouterr().out.startswith("Trained: ")
    callback.on_train_begin(gpu, main, None, model=trainer.model)  # a GPU that does not answer
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(ExpectedCost, "_line", lambda *_: "Expected: much")
    callback.on_train_begin(trainer.args, main, None, model=trainer.model)
    callback.on_train_begin(gpu, other, None, model=trainer.model)
    assert capsys.readouterr().out == ""
    callback.on_train_begin(gpu, main, None, model=trainer.model)
    assert capsys.readouterr().out == "Expected: much\n"


def test_tables_of_a_tiny_model_are_printed_whole():
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    load = tiny_load()
    settings = {name: getattr(load, name) for name in ("prompt_length", "completion_length", "num_generations")}
    result = run_doctor(str(TINY), 1.0, 1.0, 1.0, console=console, image_size=32, micro_batch_size=2, **settings)
    text = console.export_text()
    shown = [name for name in result.memory.parts if f"│ {name} " in text]
    assert shown == [name for name, size in result.memory.parts.items() if size]
    assert all(f"│ {name} " in text for name in (*result.memory.peaks, *result.flops))
