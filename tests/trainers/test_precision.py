"""The precision that images are painted, decoded and scored in: the same in training and in evaluation."""

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


def sampled(trainer, ours=True):
    """Tokens of a thinking, and what was cast meanwhile; without our autocast around all tokens if not ours."""
    torch.manual_seed(0)
    generate = (trainer if ours else super(RunKeeping, trainer))._generate_single_turn
    with Casts() as casts:
        return generate(PROMPT_IDS, None, {}, 4)[0], casts.shapes


def lora_layers(trainer):
    return [module for module in trainer.model.modules() if isinstance(module, LoraLayer)]


def test_adapters_are_cast_once_for_all_tokens_of_a_thinking(make_trainer):
    trainer = make_trainer(model=tiny_bagel().bfloat16(), bf16=True, peft_config=ADAPTERS)
    forwards = []
    trainer.unified.language_model.model.register_forward_hook(lambda *_: forwards.append(1))
    tokens, few = sampled(trainer)
    number, factors = len(forwards), 28  # two of each of the text expert's 14 layers
    assert number > 1
    assert sum(3 in shape for shape in few) == factors
    for layer in lora_layers(trainer):
        layer.cast_input_dtype_enabled = True  # as PEFT has it: a layer's input is cast there and back
    expected, many = sampled(trainer)
    assert tokens == expected
    assert len(many) - len(few) == 2 * number * factors / 2


def test_an_update_with_inputs_as_they_are_is_peft_s_own(make_trainer, train):
    found = []
    for own in (False, True):
        trainer = make_trainer(model=tiny_bagel().bfloat16(), bf16=True, peft_config=ADAPTERS, max_steps=1)
        for layer in lora_layers(trainer):
            layer.cast_input_dtype_enabled = own or layer.cast_input_dtype_enabled
        with Casts() as casts:
            gradients = train(trainer).gradients[0]
        found.append((gradients, len(casts.shapes)))
    (ours, few), (theirs, many) = found
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], gradient) for name, gradient in theirs.items())
    assert few < many


def test_weights_of_full_fine_tuning_are_cast_once_for_all_tokens_of_a_thinking(make_trainer):
    trainer = make_trainer(bf16=True, max_steps=1)
    trainer.train()  # accelerate wraps the model's forward
    expected, many = sampled(trainer, ours=False)
    tokens, few = sampled(trainer)
    assert tokens == expected
    matrices = {p.shape for p in trainer.unified.language_model.model.layers[0].mlp.parameters()}
    assert sum(shape in matrices for shape in few) == 3 * 2 < sum(shape in matrices for shape in many)


def test_layers_cast_their_inputs_where_nobody_else_does(make_trainer):
    trainer = make_trainer(model=tiny_bagel().bfloat16(), bf16=True, peft_config=ADAPTERS)
    assert all(layer.cast_input_dtype_enabled for layer in lora_layers(trainer))
    with trainer.accelerator.autocast():
        assert not any(layer.cast_input_dtype_enabled for layer in lora_layers(trainer))
    trainer.unified.generate(torch.tensor(PROMPT_IDS), max_new_tokens=2)  # bfloat16 meets float32


def test_kinds_of_lora_that_compute_with_their_input_get_it_cast(make_trainer):
    config = LoraConfig(r=3, init_lora_weights=False, use_dora=True)
    trainer = make_trainer(model=tiny_bagel(), peft_config=config, bf16=True)
    with trainer.accelerator.autocast():
        assert all(layer.cast_input_dtype_enabled for layer in lora_layers(trainer))


def test_update_computes_the_velocities_that_adapters_gave_in_the_rollout(make_trainer, train):
    trainer = make_trainer(model=tiny_bagel().bfloat16(), bf16=True, peft_config=ADAPTERS)
    second_pass = [batch for batch in train(trainer).batches if "old" in batch]
    assert second_pass
    for batch in second_pass:
        assert torch.equal(batch["old"], batch["steps"].states.velocity)
