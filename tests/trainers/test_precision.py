"""The precision that images are painted, decoded and scored in: the same in training and in evaluation."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.tiny_unified import (
    IMAGE_SIZE,
    images_of,
    prompts_dataset,
    redness,
    tiny_bagel,
    tiny_tokenizer,
    weights,
)
from trl_unigrpo import ReFLConfig, ReFLTrainer
from trl_unigrpo.models.bagel import BagelForUnifiedGeneration
from trl_unigrpo.sampling import decode
from trl_unigrpo.trainers.run_keeping import RunKeeping


def test_training_scores_the_images_that_evaluation_decodes(make_trainer, train):
    scored = []

    def reward(images, **columns):
        scored.extend(images)
        return redness(images=images, **columns)

    batches = train(make_trainer(reward_funcs=reward, bf16=True, max_steps=1)).batches
    images = sorted(images_of(batches), key=lambda image: image.seed)
    shown = decode(tiny_bagel(), images)
    assert len(shown) == len(scored) == 8
    assert all(np.array_equal(*pair) for pair in zip(scored, shown, strict=True))


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_refl_scores_the_images_that_evaluation_decodes(tmp_path, monkeypatch, mode):
    latents, scored, decode_latents = [], [], BagelForUnifiedGeneration.decode_latents

    def spied(self, x, *args, **kwargs):
        latents.append(x.detach())
        return decode_latents(self, x, *args, **kwargs)

    def reward(pixels, prompts, **columns):
        scored.append(pixels.detach())
        return pixels.mean((1, 2, 3))

    monkeypatch.setattr(BagelForUnifiedGeneration, "decode_latents", spied)
    plain = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "max_steps": 1}
    small = {"image_size": IMAGE_SIZE, "num_inference_steps": 4, "thinking": False}
    args = ReFLConfig(str(tmp_path), bf16=True, **small, **plain)
    dataset = prompts_dataset(copies=1)
    trainer = ReFLTrainer(tiny_bagel(), reward, args, dataset, dataset, processing_class=tiny_tokenizer())
    getattr(trainer, mode)()
    assert latents
    for x, seen in zip(list(latents), scored, strict=True):
        pixels = decode_latents(tiny_bagel(), x, (IMAGE_SIZE, IMAGE_SIZE), output_type="pt")
        assert torch.equal(seen, (pixels / 2 + 0.5).clamp(0, 1))


# What autocast casts while a thinking is sampled


class Casts(TorchDispatchMode):
    """Shapes of the tensors that are cast to another dtype."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        dtype = (kwargs or {}).get("dtype")
        if function is torch.ops.aten._to_copy.default and dtype not in (None, args[0].dtype):
            self.shapes.append(args[0].shape)
        return function(*args, **(kwargs or {}))


ADAPTERS = LoraConfig(r=3, init_lora_weights=False)  # a rank that no activation has the size of
PROMPT_IDS = [[1, 8, 9, 10]] * 4


def sampled(trainer, autocast=None):
    """Tokens of a thinking, and what was cast meanwhile; in an autocast of one's own if there is one."""
    torch.manual_seed(0)
    with Casts() as casts:
        if autocast is None:
            return trainer._generate_single_turn(PROMPT_IDS, None, {}, 4)[0], casts.shapes
        with autocast:
            return super(RunKeeping, trainer)._generate_single_turn(PROMPT_IDS, None, {}, 4)[0], casts.shapes


def test_adapters_are_cast_once_for_all_tokens_of_a_thinking(make_trainer):
    trainer = make_trainer(model=tiny_bagel().bfloat16(), bf16=True, peft_config=ADAPTERS)
    before, forwards = weights(trainer.model), []
    trainer.unified.language_model.model.register_forward_hook(lambda *_: forwards.append(1))
    expected, many = sampled(trainer, torch.autocast("cpu", torch.bfloat16))
    number = len(forwards)
    tokens, few = sampled(trainer)
    assert tokens == expected
    factors = [p for name, p in trainer.model.named_parameters() if p.requires_grad and "moe_gen" not in name]
    assert sum(3 in shape for shape in few) == len(factors) == 28
    # Nor are a layer's inputs cast there and back.
    assert len(many) - len(few) == 2 * number * len(factors) / 2
    assert number > 1
    assert all(torch.equal(before[name], weight) for name, weight in weights(trainer.model).items())


def test_weights_of_full_fine_tuning_are_cast_once_for_all_tokens_of_a_thinking(make_trainer):
    trainer = make_trainer(bf16=True, max_steps=1)
    trainer.train()  # accelerate wraps the model's forward
    expected, many = sampled(trainer, nullcontext())
    tokens, few = sampled(trainer)
    assert tokens == expected
    matrices = {p.shape for p in trainer.unified.language_model.model.layers[0].mlp.parameters()}
    assert sum(shape in matrices for shape in few) == 3 * 2 < sum(shape in matrices for shape in many)


def test_layers_cast_their_inputs_again_after_a_thinking_that_failed(make_trainer, monkeypatch):
    trainer = make_trainer(model=tiny_bagel().bfloat16(), bf16=True, peft_config=ADAPTERS)
    layers = [module for module in trainer.model.modules() if isinstance(module, LoraLayer)]
    seen = []

    def broken(*args, **kwargs):
        seen.extend(layer.cast_input_dtype_enabled for layer in layers)
        raise RuntimeError("no tokens")

    monkeypatch.setattr(BagelForUnifiedGeneration, "generate", broken)
    with pytest.raises(RuntimeError, match="no tokens"):
        sampled(trainer)
    assert seen == [False] * len(layers)
    assert all(layer.cast_input_dtype_enabled for layer in layers)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("settings", "options"),
    [({"bf16": False}, {}), ({"bf16": True}, {"use_dora": True})],
    ids=["no autocast", "not plain LoRA"],
)
def test_layers_cast_their_inputs_where_that_matters(make_trainer, settings, options):
    config = LoraConfig(r=3, init_lora_weights=False, **options)
    trainer = make_trainer(model=tiny_bagel(), peft_config=config, **settings)
    layers = [module for module in trainer.model.modules() if isinstance(module, LoraLayer)]
    with trainer._sampling_autocast():
        assert all(layer.cast_input_dtype_enabled for layer in layers)


def test_update_computes_the_velocities_that_adapters_gave_in_the_rollout(make_trainer, train):
    trainer = make_trainer(model=tiny_bagel().bfloat16(), bf16=True, peft_config=ADAPTERS)
    second_pass = [batch for batch in train(trainer).batches if "old" in batch]
    assert second_pass
    for batch in second_pass:
        assert torch.equal(batch["old"], batch["steps"].states.velocity)
