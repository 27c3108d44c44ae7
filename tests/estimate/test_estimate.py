"""Sizes, FLOPs and memory in closed form, against the released checkpoint, counted runs and saved tensors."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.helpers.painting import steps_at
from tests.helpers.paths import FIXTURES
from trl_unigrpo.estimate import (
    Workload,
    decode_read_bytes,
    estimate_memory,
    floor_flops,
    floor_seconds,
    lora_parameters,
    overhead_flops,
    parameter_counts,
    released_config,
)
from trl_unigrpo.estimate.counting import count_flops
from trl_unigrpo.estimate.flops import (
    image_forward,
    logits_forward,
    packed_forward,
    read_back_flops,
    text_forward,
)
from trl_unigrpo.estimate.levers import levers
from trl_unigrpo.estimate.memory import saved_by_layer, weight_memory
from trl_unigrpo.estimate.random_model import random_bagel
from trl_unigrpo.estimate.report import estimate, estimate_run
from trl_unigrpo.estimate.vae import vae_decode, vae_parameters
from trl_unigrpo.models.adapters import keep_adapters_in_float32
from trl_unigrpo.models.bagel import BagelConfig
from trl_unigrpo.models.contract import ContextRow
from trl_unigrpo.sampling.self_reader import SelfReader
from trl_unigrpo.shapeworld.base import load_base
from trl_unigrpo.shapeworld.render import render_images
from trl_unigrpo.trainers.averages import Averages
from trl_unigrpo.trainers.dry_run import dry_config, random_trainer
from trl_unigrpo.trajectory import Steps


RELEASED_KEYS = FIXTURES / "bagel" / "released_keys.txt"
H200 = (790e12, 4.8e12)  # FLOP/s, bytes/s
CPU = torch.device("cpu")
VAE = {"in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 4}


def small_config(layers: int = 4, width: int = 64, inner: int = 192, heads: int = 4) -> BagelConfig:
    return BagelConfig(
        llm_config={
            "vocab_size": 64,
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": 256,
        },
        vae_config={**VAE, "scale_factor": 0.3611, "shift_factor": 0.1159},
        max_latent_size=16,
        im_start_token_id=0,
        im_end_token_id=1,
        vision_start_token_id=2,
        vision_end_token_id=3,
    )


def small(config: BagelConfig | None = None, **changes) -> Workload:
    sizes = {
        "image_size": 32,
        "prompt_length": 12,
        "completion_length": 8,
        "num_generations": 4,
        "num_inference_steps": 6,
        "micro_batch_size": 2,
        "lora_ranks": (2, 2),
        "half": False,
    }
    return Workload(config or small_config(), **{**sizes, **changes})


def released(image_size: int, **changes) -> Workload:
    """512 tokens before the image, the group of 24, 25 evaluations, 3 of them trained twice."""
    return Workload(released_config(), image_size, prompt_length=1, completion_length=511, **changes)


# Sizes


def test_parameters_are_those_of_the_released_checkpoint():
    counts: Counter[str] = Counter()
    for line in RELEASED_KEYS.read_text().splitlines():
        name, shape, times = re.fullmatch(r"(\S+) \(([\d, ]+)\) x(\d+)", line).groups()
        size = int(times)
        for side in shape.split(","):
            size *= int(side or 1)
        if name.startswith(("encoder.", "decoder.")):
            group = "VAE"
        elif name.startswith(("vit_", "connector")):
            group = "understanding tower"
        elif "embed_tokens" in name or "lm_head" in name:
            group = "embeddings"
        elif name.startswith("language_model"):
            group = "image expert" if "moe_gen" in name else "text expert"
        else:
            group = "image ends"
        counts[group] += size
    assert vae_parameters(released_config()) == counts.pop("VAE")
    assert parameter_counts(released_config()) == dict(counts)
    assert sum(counts.values()) == 14_607_260_128


def test_parameters_are_those_of_a_built_model():
    config = small_config()
    model = random_bagel(config)
    stored = sum(x.numel() for x in model.state_dict().values())
    assert sum(parameter_counts(config).values()) == stored


def test_adapters_have_rank_times_in_plus_out_weights():
    assert lora_parameters(released_config().llm_config, 1) == 2_523_136
    config = small_config()
    base = random_bagel(config)
    model = get_peft_model(base, LoraConfig(r=3, target_modules=base.default_lora_targets("image")))
    assert lora_parameters(config.llm_config, 3) == sum(p.numel() for p in model.parameters() if p.requires_grad)


# FLOPs of the released model, as its documentation works them out by hand


@pytest.mark.parametrize(("size", "evaluation", "packed"), [(1024, 61.1, 190.5), (512, 14.0, 49.4)])
def test_flops_of_the_released_model(size, evaluation, packed):
    load = released(size)
    assert image_forward(load).total / 1e12 == pytest.approx(evaluation, abs=0.05)
    assert text_forward(load, 512).total / 1e12 == pytest.approx(6.7, abs=0.05)
    words = 512 * logits_forward(load)
    assert (packed_forward(load).total + words) / 1e12 == pytest.approx(packed, abs=0.05)


@pytest.mark.parametrize(
    ("size", "rollout", "train", "reference", "vae", "seconds"),
    [(1024, 36.6, 29.1, 4.6, 10.5, 91), (512, 8.4, 7.25, 1.2, 2.5, 23)],
)
def test_floor_of_the_released_model(size, rollout, train, reference, vae, seconds):
    parts = floor_flops(released(size))
    assert parts["denoising"] / 1e15 == pytest.approx(rollout, abs=0.05)
    assert parts["update"] / 1e15 == pytest.approx(train, abs=0.06)
    assert parts["reference pass"] / 1e15 == pytest.approx(reference, abs=0.05)
    assert parts["VAE decode"] / 24 / 1e12 == pytest.approx(vae, abs=0.05)
    assert sum(floor_seconds(released(size), *H200).values()) == pytest.approx(seconds, abs=0.5)


@pytest.mark.parametrize(("size", "seconds", "train"), [(1024, 79, 19.9), (512, 20, 4.9)])
def test_floor_without_checkpointing(size, seconds, train):
    load = released(size, gradient_checkpointing=False)
    assert floor_flops(load)["update"] / 1e15 == pytest.approx(train, abs=0.05)
    assert sum(floor_seconds(load, *H200).values()) == pytest.approx(seconds, abs=0.5)


@pytest.mark.parametrize(("size", "train"), [(1024, 37.1), (512, 9.5)])
def test_full_fine_tuning_with_checkpointing(size, train):
    assert floor_flops(released(size, lora_ranks=None))["update"] / 1e15 == pytest.approx(train, abs=0.06)


def test_decoding_is_bound_by_reading_weights():
    load = released(512)
    assert decode_read_bytes(load) / 511 == pytest.approx(13.05e9 + 1.09e9, rel=0.003)
    assert floor_seconds(load, *H200)["decode"] == pytest.approx(1.5, abs=0.02)
    assert floor_seconds(load, H200[0], 1e30)["decode"] == pytest.approx(174e12 / 790e12, abs=0.002)
    assert decode_read_bytes(replace(load, quantization="nf4")) < decode_read_bytes(load) / 2.5


# FLOPs counted in runs


def test_vae_is_counted_as_it_runs():
    config = small_config()
    codec = random_bagel(config).codec
    with count_flops() as counter:
        codec.decode(torch.zeros(1, 64, 16), (8, 8))
    assert vae_decode(config, (32, 32))[0] == counter.get_total_flops()


# Not in the closed form: on a CPU, TRL scores the prompt's tokens, too; with frozen weights the first layer needs no
# input gradient; with it, checkpointing stops before the image expert's last product, whose result nobody needs.
@pytest.mark.parametrize(
    ("ranks", "checkpointing", "averages", "tolerance"),
    [
        (None, False, {}, 0.002),
        (None, False, {"image_old_policy": True, "ema": True}, 0.002),
        pytest.param(None, True, {}, 0.03, marks=pytest.mark.slow),
        pytest.param((16, 16), False, {}, 0.02, marks=pytest.mark.slow),
        pytest.param((16, 16), True, {}, 0.02, marks=pytest.mark.slow),
        pytest.param((16, 16), False, {"image_old_policy": True}, 0.02, marks=pytest.mark.slow),
    ],
)
def test_counted_generation_is_the_closed_form(tmp_path, ranks, checkpointing, averages, tolerance):
    load = small(lora_ranks=ranks, gradient_checkpointing=checkpointing, **averages)
    trainer = random_trainer(load, CPU, str(tmp_path))
    with count_flops() as counter:
        trainer.train()
    expected = sum(floor_flops(load).values()) + sum(overhead_flops(load).values())
    assert counter.get_total_flops() == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(
    "changes",
    [
        {"images_per_thinking": 2},
        {"images_per_thinking": 2, "image_batch_size": 3},
        {"lines": True, "sde_window_size": 7, "reference": False},
        {"dead_share": 0.5, "reference": False, "num_iterations": 1},
        {"scout_generations": 8, "scout_num_inference_steps": 2},
        {"scout_generations": 8, "scout_num_inference_steps": 6, "lines": True, "reference": False},
    ],
    ids=["images of thinkings", "cut in two", "lines", "dead", "scouts", "exact scouts"],
)
def test_levers_are_counted_as_the_closed_form(tmp_path, changes):
    load = small(lora_ranks=None, gradient_checkpointing=False, completion_length=20, **changes)
    trainer = random_trainer(load, CPU, str(tmp_path))
    if load.dead_share:
        trainer.reward_funcs[0] = lambda prompts, **_: [0.0, 1.0, 0.5, 0.5]  # two of them are their mean
    with count_flops() as counter:
        trainer.train()
    expected = sum(floor_flops(load).values()) + sum(overhead_flops(load).values())
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.004)
    without = replace(load, images_per_thinking=1, dead_share=0.0)
    if without != load:  # they would not agree without the lever
        assert sum(floor_flops(without).values()) > 1.008 * sum(floor_flops(load).values())


def test_scouts_by_hand():
    """A pool of 8 in 2 steps, of which 4 are painted again in 6."""
    load = small(scout_generations=8, scout_num_inference_steps=2)
    plain, parts, beyond = floor_flops(small()), floor_flops(load), overhead_flops(load)
    one = image_forward(load).total
    assert parts["scouts"] == 8 * (2 * one + vae_decode(load.config, (32, 32))[0])
    assert parts["decode"] == 2 * plain["decode"] and parts["contexts"] == 2 * plain["contexts"]
    for name in ("denoising", "VAE decode", "reference pass", "update"):
        assert parts[name] == plain[name]
    assert beyond["contexts of scouts again"] == plain["contexts"]
    assert beyond["old log-probs"] == 2 * overhead_flops(small())["old log-probs"]
    whole = floor_flops(replace(load, lines=True, scout_num_inference_steps=6))
    assert whole["denoising"] == whole["VAE decode"] == 0 and whole["scouts"] > 8 * 6 * one


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images_per_thinking": 3}, "images_per_thinking=3.*divisor"),
        ({"scout_generations": 4}, "scout_generations=4 with num_generations=4"),
        ({"scout_generations": 8, "scout_num_inference_steps": 7}, "expected at most as many"),
        ({"images_per_thinking": 2, "num_rounds": 2}, "one round"),
        ({"dead_share": 1.5}, "dead_share=1.5"),
    ],
)
def test_levers_that_no_run_has_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        small(**changes)


@pytest.mark.parametrize(
    "changes",
    [{}, {"images_per_thinking": 2}, {"scout_generations": 8, "scout_num_inference_steps": 2}, {"lines": True}],
    ids=["plain", "images of thinkings", "scouts", "lines"],
)
def test_every_lever_is_a_setting_that_a_run_can_have(tmp_path, changes):
    load = small(num_inference_steps=12, **changes)
    found = levers(load)
    assert len(found) > 3
    for lever in found:
        args = dry_config(lever.workload, CPU, str(tmp_path))
        pool = (args.scout_generations, args.scout_num_inference_steps) if args.scout_generations else ()
        assert not pool or args.images_per_thinking == 1
        if "scout_generations" in lever.setting:
            assert f"scout_generations={pool[0]}, " in lever.setting
            assert lever.setting.endswith(f"scout_num_inference_steps={pool[1]}")


def test_levers_say_what_they_save():
    """Each against the estimate of a run with it; most first; none that takes more memory than there is."""
    load = released(512)
    found = levers(load)
    shares = [lever.saved for lever in found]
    assert shares == sorted(shares, reverse=True) and 0 < shares[-1] < shares[0] < 1
    settings = {lever.setting.split("=")[0]: lever for lever in found}
    assert {"image_objective", "num_iterations", "images_per_thinking", "gradient_checkpointing"} <= set(settings)
    assert settings["images_per_thinking"].workload == replace(load, images_per_thinking=2)
    for lever in found:
        both = [sum({**floor_flops(x), **overhead_flops(x)}.values()) for x in (load, lever.workload)]
        assert lever.saved == pytest.approx(1 - both[1] / both[0])
    limit = estimate_memory(load).peak
    tight = [lever.setting for lever in levers(load, limit)]
    assert "gradient_checkpointing=False" not in tight and len(tight) == len(found) - 1
    after = replace(found[0].workload, gradient_checkpointing=False)
    assert found[0].setting not in [lever.setting for lever in levers(after)]


@pytest.mark.parametrize("size", [32, (16, 48)])
def test_packed_forward_is_counted_to_the_last_product(size):
    load = small(lora_ranks=None, completion_length=9, image_size=size)
    model = random_bagel(load.config)
    with count_flops() as counter, torch.no_grad():
        model.predict_velocities(steps(load))
    assert counter.get_total_flops() == packed_forward(load).total * load.micro_batch_size


def test_reading_back_is_counted_as_the_closed_form():
    model, tokenizer = load_base(seeing=True)
    text, images = "two red circles and a blue ring", render_images(np.arange(36).reshape(4, 9) % 7)
    length = 1 + len(tokenizer(text)["input_ids"])
    load = small(model.config, image_size=48, prompt_length=length)
    with count_flops() as counter:
        SelfReader(model, tokenizer).read(images, [text] * 4)
    assert counter.get_total_flops() == pytest.approx(read_back_flops(load), rel=2e-4)


def test_reading_back_is_a_small_part_of_a_generation():
    """The figures of docs/readback.md, at 512 pixels and G = 24."""
    load = replace(released(512), prompt_length=64)
    parts = floor_flops(load)
    rollout = sum(parts[name] for name in ("prefill", "decode", "contexts", "denoising", "VAE decode"))
    assert read_back_flops(load) / load.trajectories / 1e12 == pytest.approx(36.5, rel=0.01)
    assert read_back_flops(load) / rollout == pytest.approx(0.099, rel=0.01)
    assert read_back_flops(load) / sum(parts.values()) == pytest.approx(0.050, rel=0.01)


def steps(load: Workload) -> Steps:
    batch, copies = load.micro_batch_size, load.sde_window_size
    x = torch.randn(batch, copies, load.latents, load.config.latent_channels)
    contexts = [ContextRow(row) for row in torch.randint(6, 60, (batch, load.context))]
    return steps_at(contexts, x, torch.rand(batch, copies), load.size)


def test_images_of_one_area_cost_the_same_whatever_their_shape():
    square, wide = small(image_size=32), small(image_size=(16, 64), with_tower=False)
    assert (wide.latents, wide.size) == (square.latents, (16, 64))
    assert floor_flops(wide) == floor_flops(replace(square, with_tower=False))
    assert estimate_memory(wide).peaks == estimate_memory(replace(square, with_tower=False)).peaks


def test_groups_of_several_sizes_take_the_mean_time_and_the_largest_memory(tmp_path):
    trainer = random_trainer(small(), CPU, str(tmp_path))
    trainer.args.image_size = [[32, 32], [16, 48], [16, 16]]
    found = estimate_run(trainer.unified, trainer.args)
    each = [estimate(replace(found.workload, image_size=size)) for size in (32, [16, 48], 16)]
    assert found.workload.size == (32, 32) and found.memory == each[0].memory
    assert found.flops["denoising"] == round(sum(one.flops["denoising"] for one in each) / 3)
    assert found.floor_seconds(1e9, 1e9) == pytest.approx(sum(one.floor_seconds(1e9, 1e9) for one in each) / 3)
    assert each[2].floor_seconds(1e9, 1e9) < found.floor_seconds(1e9, 1e9) < each[0].floor_seconds(1e9, 1e9)


# Memory


@pytest.mark.parametrize("quantization", [None, "nf4", "nf4-double"])
def test_weights_to_the_byte(quantization):
    if quantization:
        pytest.importorskip("bitsandbytes")
    load = small(half=True, quantization=quantization)
    model = random_bagel(load.config, dtype=torch.bfloat16, quantization=quantization)
    held = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            held += [state.absmax, state.code]
            if state.nested:
                held += [state.state2.absmax, state.state2.code, state.offset]
    assert weight_memory(load) == sum(x.numel() * x.element_size() for x in held)


def test_weights_of_the_released_model():
    for quantization, size in ((None, 28.34), ("nf4", 9.58), ("nf4-double", 8.97)):
        load = released(512, quantization=quantization, with_tower=False)
        assert weight_memory(load) / 1e9 == pytest.approx(size, abs=0.01)
    assert weight_memory(released(512)) / 1e9 == pytest.approx(29.21, abs=0.01)


@pytest.mark.parametrize("ranks", [None, (2, 2)])
def test_trained_weights_gradients_and_optimizer_to_the_byte(tmp_path, ranks):
    load = small(lora_ranks=ranks)
    trainer = random_trainer(load, CPU, str(tmp_path))
    gradients = []
    clip = trainer._clip_grad_norm

    def recorded(model):
        gradients.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))
        return clip(model)

    trainer._clip_grad_norm = recorded
    trainer.train()
    parts = estimate_memory(load).parts
    trained = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    states = trainer.optimizer.state.values()
    assert parts["gradients"] == trained == gradients[0]
    assert parts["optimizer state"] == sum(
        state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq")
    )
    assert parts["adapters"] == (0 if ranks is None else trained)
    reference = trainer.unified.kept_reference
    copied = sum(x.nbytes for x in (reference or {}).values())
    assert parts["reference copy"] == copied
    assert parts["VAE"] == sum(p.nbytes for p in trainer.unified.codec.vae.parameters())
    trajectories = [t for batch in trainer._buffered_inputs for t in batch["trajectories"]]
    images = [image for trajectory in trajectories for _, image in trajectory.painted()]
    assert len(images) == load.trajectories
    states = [x for image in images for x in (image.steps.x, image.steps.x_next, image.steps.velocity)]
    latents = [image.latents for image in images]
    kept = trainer._kept.state()
    assert set(kept) == {"old", "reference"}
    others = [velocity for rows in kept.values() for _, velocity in rows]
    assert parts["rollout records"] == sum(x.nbytes for x in latents + states)
    share = load.scored_at_once / load.trajectories
    assert parts["records of a micro-batch"] == share * sum(x.nbytes for x in states + others)


@pytest.mark.parametrize("ranks", [None, (2, 4)])
@pytest.mark.parametrize("on", [{"ema": True}, {"image_old_policy": True}, {"ema": True, "image_old_policy": True}])
def test_averages_are_copies_of_what_is_trained(tmp_path, ranks, on):
    load = small(lora_ranks=ranks, **on)
    trainer = random_trainer(load, CPU, str(tmp_path))
    averages = Averages(trainer.unified, trainer.args)
    held = [weight for average in (averages.old, averages.ema) if average for weight in average.weights.values()]
    assert estimate_memory(load).parts["averaged weights"] == sum(weight.nbytes for weight in held) > 0
    read = Workload.of_run(trainer.unified, trainer.args)
    assert (read.ema, read.image_old_policy) == (load.ema, load.image_old_policy)


def saved_bytes(load: Workload) -> int:
    """Bytes of distinct storages that the packed forward saves, parameters left out."""
    dtype = torch.bfloat16 if load.weight_bytes == 2 else torch.float32
    model = random_bagel(load.config, dtype=dtype)
    base = model
    if load.lora_ranks is not None:
        rank = max(load.lora_ranks)
        model = get_peft_model(model, LoraConfig(r=rank, target_modules=base.default_lora_targets()))
        keep_adapters_in_float32(model, {})
    if load.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.train()
    parameters = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return x

    table = steps(load)
    ids = torch.stack([image.context.ids for image in table.images])
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=load.half)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), autocast:
        output = base.packed_forward(ids, None, table)
    assert output.velocity.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


SAVED = [(None, False), ((8, 8), False), ((8, 8), True)]


@pytest.mark.parametrize(("ranks", "half"), SAVED)
def test_saved_activations(ranks, half):
    # The proportions of the real layer, an eighth as wide.
    load = small(
        small_config(layers=2, width=448, inner=2368, heads=4),
        lora_ranks=ranks,
        half=half,
        gradient_checkpointing=False,
        image_size=64,
    )
    one = replace(load, config=small_config(layers=1, width=448, inner=2368, heads=4))
    measured = saved_bytes(load)
    weights_cast = estimate_memory(load).parts["trained weights in bfloat16"]
    assert measured - weights_cast == pytest.approx(estimate_memory(load).parts["saved activations"], rel=0.05)
    layer_cast = weights_cast - estimate_memory(one).parts["trained weights in bfloat16"]
    assert measured - saved_bytes(one) - layer_cast == pytest.approx(saved_by_layer(load), rel=0.01)


def test_checkpointing_saves_the_inputs_of_layers_alone():
    configs = [small_config(layers=layers, width=448, inner=2368) for layers in (3, 5)]
    few, many = (small(config, image_size=64, lora_ranks=(8, 8)) for config in configs)
    parts = [estimate_memory(load).parts["saved activations"] for load in (few, many)]
    assert saved_bytes(many) - saved_bytes(few) == pytest.approx(parts[1] - parts[0], rel=0.01)


def test_released_model_saves_what_its_layers_say():
    """Real sizes, by hand: bytes per token of a layer with adapters of rank 32, in bfloat16 under autocast."""
    norms = 4 * (2 * 3584 + 3584 + 512) + 4 * (2 + 28 + 4)
    linears = 2 * (3 * 18944 + 2 * 3584 + 3584 + 18944 + 7 * 32)
    attention = 2 * 2 * (3584 + 512) + 4 * 28
    load = released(1024, micro_batch_size=1)
    contexts = 3 * 512 * 2 * 512 * 2
    tokens = 512 + 3 * 4098
    assert saved_by_layer(load) == tokens * (norms + linears + attention) + contexts
    gibibytes = estimate_memory(replace(load, gradient_checkpointing=False)).parts["saved activations"] / 2**30
    assert gibibytes == pytest.approx(79, abs=1)


def test_levers_act_on_the_phases_they_should():
    load = small(gradient_checkpointing=False, lora_ranks=(2, 2))
    before = estimate_memory(load).peaks
    changes = {
        "gradient_checkpointing": (True, {"update"}),
        "micro_batch_size": (1, {"update", "reference pass"}),
        "image_batch_size": (1, {"denoising", "VAE decode"}),
        "completion_length": (4, set(before)),
    }
    for name, (value, expected) in changes.items():
        after = estimate_memory(replace(load, **{name: value})).peaks
        lower = {phase for phase in before if after[phase] < before[phase]}
        assert lower == expected - {"VAE decode"} if name == "completion_length" else lower == expected


def test_rounds_have_the_tokens_of_what_they_see():
    """By hand: 512 pixels are 1,024 latents and 37 x 37 patches, with two markers each."""
    load = released(512, num_rounds=3, look_length=100, reflection_length=50)
    assert load.shown == (1026, 1371)
    later = 1026 + 1371 + 100 + 50
    assert [load.seen(number) for number in range(3)] == [512, later, later]
    assert load.clean == (512 + 2 * (later - 1024), 2 * 1024)
    whole = replace(load, round_context="full", with_tower=False)
    assert [whole.seen(number) for number in range(3)] == [512, 512 + 1176, 512 + 2 * 1176]
    assert whole.clean == (512 + 2 * (1176 - 1024), 2 * 1024)
    assert load.texts == 511 + 2 * 50
    one, peaks = estimate_memory(released(512)).peaks, estimate_memory(load).peaks
    assert all(peaks[phase] > one[phase] for phase in one)
    parts = floor_flops(load)
    assert parts["VAE decode"] == 3 * floor_flops(released(512))["VAE decode"]
    assert parts["denoising"] == 24 * 25 * sum(image_forward(load, number).total for number in range(3))


# Settings that no run can have

WRONG = [
    ({"image_size": 30}, "image_size=30: .*multiples of 4, at most 64"),
    ({"image_size": "32x66"}, "image_size=32x66: .*multiples of 4, at most 64"),
    ({"image_size": 0}, "image_size=0: expected the side of a square"),
    ({"image_size": 68}, "image_size=68"),
    ({"num_generations": 0}, "num_generations=0: expected at least 1"),
    ({"image_batch_size": -1}, "image_batch_size=-1"),
    ({"sde_window_size": 6}, "sde_window_size=6 with num_inference_steps=6"),
    ({"quantization": "int3"}, "quantization='int3': expected None, 'nf4'"),
    ({"quantization": "nf4", "lora_ranks": None}, "trains adapters only"),
    ({"lora_ranks": (0, 0)}, "at least one of them above 0"),
    ({"lora_ranks": (-1, 8)}, "expected two ranks"),
    ({"completion_length": 250}, "262 tokens .* positions for 256"),
    ({"num_rounds": 0}, "num_rounds=0: expected at least 1"),
    ({"round_context": "none"}, "round_context='none': expected 'markov' or 'full'"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)
