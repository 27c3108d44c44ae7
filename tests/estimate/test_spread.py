"""One run on several GPUs: memory and traffic of each, beside closed forms written out from the released sizes."""

import json
import sys
from dataclasses import replace
from subprocess import PIPE, Popen

import pytest
from torch import distributed
from torch.distributed.fsdp import fully_shard

from tests.helpers.paths import ROOT
from trl_unigrpo.estimate import Workload, estimate_memory, parameter_counts, released_config, traffic
from trl_unigrpo.estimate.advice import advise
from trl_unigrpo.estimate.flops import floor_flops
from trl_unigrpo.estimate.memory import end_parameters, layer_parameters


# The 7B, by hand: width 3584, inner 18944, 28 layers of 28 heads and 4 of keys, 128 each, 152064 words.
WIDTH, WORDS = 3584, 152064
EXPERT_LAYER = 2 * WIDTH**2 + 2 * WIDTH * 512 + 3 * WIDTH * 18944 + (WIDTH + 2 * 512) + (2 * WIDTH + 2 * 128)
LAYER = 2 * EXPERT_LAYER
TIME = 256 * WIDTH + WIDTH + WIDTH**2 + WIDTH
PROJECTIONS, POSITIONS = 2 * 64 * WIDTH + WIDTH + 64, 64**2 * WIDTH
ENDS = 2 * WORDS * WIDTH + TIME + PROJECTIONS + POSITIONS + 2 * WIDTH
TOWER = parameter_counts(released_config())["understanding tower"]
TRAINED = 28 * LAYER + ENDS - POSITIONS
LORA = 32 * 2 * 28 * (2 * 2 * WIDTH + 2 * (WIDTH + 512) + 3 * (WIDTH + 18944))  # rank 32, two experts


def load(**changes) -> Workload:
    sizes = {"image_size": 512, "image_batch_size": 8, "micro_batch_size": 4, "processes": 8}
    return Workload(released_config(), **{**sizes, **changes})


def test_units_are_those_of_the_released_model():
    assert layer_parameters(load(lora_ranks=None)) == LAYER
    assert end_parameters(load(lora_ranks=None, with_tower=False)) == ENDS
    assert 0.4e9 < TOWER < 0.5e9
    assert layer_parameters(load()) == LAYER + LORA // 28
    assert abs(TRAINED - 14.2e9) < 0.1e9


@pytest.mark.parametrize("image_size", [512, 1024])
def test_full_fine_tuning_by_fsdp(image_size):
    settings = {"lora_ranks": None, "image_size": image_size, "ema": True}
    one = estimate_memory(load(processes=1, **settings)).parts
    found = estimate_memory(load(fsdp=True, **settings))
    assert found.parts["weights"] == -(-4 * (28 * LAYER + ENDS + TOWER) // 8)
    assert found.parts["reference copy"] == found.parts["averaged weights"] == -(-4 * TRAINED // 8)
    assert found.parts["optimizer state"] == -(-8 * TRAINED // 8)
    assert found.parts["gradients"] == -(-4 * TRAINED // 8)
    assert found.parts["gathered weights"] == 2 * (3 * LAYER + ENDS + TOWER)
    assert found.parts["weights gathered for the rollout"] == 2 * (28 * LAYER + ENDS + TOWER)
    assert found.parts["gradients being reduced"] == 6 * WORDS * WIDTH  # the table is larger than a layer
    assert found.parts["trained weights in bfloat16"] == 0
    for name in ("saved activations", "VAE", "rollout records", "thinking's cache", "VAE decode"):
        assert found.parts[name] == one[name]
    held = ("weights", "VAE", "reference copy", "averaged weights", "optimizer state", "gradients", "gathered weights")
    held += ("gradients being reduced", "saved activations", "update's workspace", "logits' tile")
    assert found.peaks["update"] == sum(found.parts[name] for name in (*held, "records of a micro-batch"))
    each = estimate_memory(load(fsdp=True, gather_for_rollout=False, **settings))
    for phase in ("thinking", "denoising", "VAE decode"):
        assert found.peaks[phase] - each.peaks[phase] == 2 * 25 * LAYER
    whole = estimate_memory(load(fsdp=True, sync_each_batch=False, **settings))
    assert whole.parts["gradients"] == 4 * TRAINED
    assert whole.peaks["update"] - found.peaks["update"] == 4 * TRAINED - -(-4 * TRAINED // 8)


def test_adapters_by_fsdp_and_by_ddp():
    one, ddp, fsdp = (estimate_memory(load(**how)) for how in ({"processes": 1}, {}, {"fsdp": True}))
    assert fsdp.parts["adapters"] == -(-4 * LORA // 8) and fsdp.parts["optimizer state"] == LORA
    assert fsdp.parts["weights"] == -(-one.parts["weights"] // 8)
    assert fsdp.parts["gathered weights"] == 2 * (3 * (LAYER + LORA // 28) + ENDS + TOWER)
    assert fsdp.parts["gradients being reduced"] == 6 * (LORA // 28)
    assert {name: ddp.parts[name] for name in one.parts} == one.parts
    assert all(ddp.peaks[phase] - one.peaks[phase] == 4 * LORA for phase in one.peaks)  # buckets


def test_what_travels_by_fsdp():
    """24 images a GPU: 3 batches of 8 to paint, 6 micro-batches of 4, two passes of them."""
    found = traffic(load(lora_ranks=None, fsdp=True, gather_for_rollout=False, sync_each_batch=False))
    forward, once = 28 * LAYER + WORDS * WIDTH, ENDS + TOWER - WORDS * WIDTH
    times = {"thinking": 512, "contexts": 3, "denoising": 75, "reference pass": 6, "old log-probs of the text": 6}
    for name, number in times.items():
        assert found[name] == (number, 2 * (number * forward + once) * 7 // 8)
    times["update, all-gather"] = 24
    assert found["update, all-gather"] == (24, 2 * (24 * forward + 12 * once) * 7 // 8)
    assert found["gradients, reduce-scatter"] == (2, 2 * 4 * TRAINED * 7 // 8)
    assert {*found} == {*times, "gradients, reduce-scatter"}
    gathered = traffic(load(lora_ranks=None, fsdp=True, sync_each_batch=False))
    assert gathered.pop("rollout") == (1, 2 * (28 * LAYER + ENDS + TOWER) * 7 // 8)
    sampled = ("thinking", "contexts", "denoising")
    assert gathered == {name: part for name, part in found.items() if name not in sampled}
    synced = traffic(load(lora_ranks=None, fsdp=True))
    assert synced["gradients, reduce-scatter"] == (12, 12 * 4 * TRAINED * 7 // 8)
    in_float32 = traffic(load(lora_ranks=None, fsdp=True, half=False))
    assert in_float32["reference pass"].bytes == 4 * (6 * forward + once) * 7 // 8


def test_what_travels_of_adapters():
    found = traffic(load(fsdp=True))
    assert found["gradients, reduce-scatter"].bytes == 12 * 4 * LORA * 7 // 8
    assert traffic(load()) == {"gradients, all-reduce": (2, 2 * 2 * 4 * LORA * 7 // 8)}
    assert traffic(load(processes=2)) == {"gradients, all-reduce": (2, 2 * 2 * 4 * LORA // 2)}
    assert traffic(load(processes=1)) == {}


def test_gathered_and_reduced_as_torch_does(tmp_path):
    """A table, layers, a head and another part, each a unit: those behind the layers stay until the update is over."""
    layers, table, head, rest = 3 * [16], 32, 32, 16
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "counted_collectives.py")]
    processes = [Popen([*command, str(rank), str(tmp_path / "store")], stdout=PIPE) for rank in (0, 1)]
    try:
        printed = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    found = {name: {kind: sorted(of) for kind, of in seen.items()} for name, seen in json.loads(printed[0]).items()}
    assert found["forward"]["gathered"] == sorted([*layers, table, head, rest])
    assert found["another"]["gathered"] == sorted([*layers, table])
    for name in ("update", "another update", "without sync"):
        assert found[name]["gathered"] == sorted([*layers, table, *layers, table, head, rest])
    assert found["update"]["reduced"] == found["another update"]["reduced"] == sorted([*layers, table, head, rest])
    assert found["without sync"]["reduced"] == []


@pytest.mark.parametrize(
    ("changes", "painted", "contexts", "thinking"),
    [
        ({"num_rounds": 2, "reflection_length": 100}, 150, 6, 612),
        ({"scout_generations": 48, "scout_num_inference_steps": 4}, 6 * 4 + 3 * 25, 6 + 3, 512),
        ({"lines": True, "scout_generations": 48, "scout_num_inference_steps": 25}, 6 * 25, 6, 512),
    ],
)
def test_forwards_of_rounds_and_scouts(changes, painted, contexts, thinking):
    found = traffic(load(fsdp=True, gather_for_rollout=False, **changes))
    times = [found[name].times for name in ("denoising", "contexts", "thinking")]
    assert times == [painted, contexts, thinking]


def test_flops_are_those_of_one_gpu():
    assert floor_flops(load(fsdp=True)) == floor_flops(load(processes=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"processes": 0}, "processes=0: expected at least 1"),
        ({"processes": 1, "fsdp": True}, "fsdp=True with processes=1: there is nothing to spread"),
        ({"fsdp": True, "quantization": "nf4"}, "fsdp=True with quantization='nf4'"),
    ],
)
def test_settings_that_no_run_can_have(changes, message):
    with pytest.raises(ValueError, match=message):
        load(**changes)


def test_advice_for_several_gpus():
    """Full fine-tuning on eight: spread, before anything is given up."""
    run = replace(load(lora_ranks=None), image_batch_size=4)
    fits = estimate_memory(replace(run, fsdp=True)).peak
    advice = [item.setting for item in advise(replace(run, gradient_checkpointing=True), fits)]
    assert advice == ["FSDP2: examples/accelerate/fsdp2.yaml"]
    late = replace(run, fsdp=True, sync_each_batch=False)
    assert [item.setting for item in advise(late, fits)] == ["sync_each_batch in accelerator_config"]
    least = {"image_size": 256, "micro_batch_size": 1, "image_batch_size": 1, "sde_window_size": 1}
    assert [item.setting for item in advise(load(fsdp=True, **least), 1)] == ["gather_for_rollout=False"]


def test_a_run_says_itself_how_it_is_spread(make_trainer):
    trainer = make_trainer(accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": False}})
    found = Workload.of_run(trainer.unified, trainer.args)
    assert (found.processes, found.fsdp, found.sync_each_batch) == (1, False, False)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(trainer.unified)
        trainer.args.accelerator_config.gradient_accumulation_kwargs = None
        with pytest.raises(ValueError, match="fsdp=True with processes=1"):
            Workload.of_run(trainer.unified, trainer.args)
    finally:
        distributed.destroy_process_group()
