"""The precision that images are painted, decoded and scored in: the same in training and in evaluation."""

import numpy as np
import pytest
import torch

from tests.helpers.tiny_unified import IMAGE_SIZE, images_of, prompts_dataset, redness, tiny_bagel, tiny_tokenizer
from trl_unigrpo import ReFLConfig, ReFLTrainer
from trl_unigrpo.models.bagel import BagelForUnifiedGeneration
from trl_unigrpo.sampling import decode


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
