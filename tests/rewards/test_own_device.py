"""A reward that is built before a run has begun computes where its process does."""

import pytest
import torch
from accelerate import PartialState
from torch import nn

from tests.helpers.tiny_llava import tiny_llava
from tests.helpers.tiny_perception import smooth_image, tiny_clip, tiny_mask2former
from trl_unigrpo.rewards import ClipReward, LocalReader, LocalVLMJudge
from trl_unigrpo.rewards.clip.embedder import ClipEmbedder
from trl_unigrpo.rewards.geneval.geneval_reward import Mask2FormerDetector


MADE = {
    "judge": lambda **device: LocalVLMJudge(*tiny_llava(), offload=False, **device),
    "reader": lambda **device: LocalReader(*tiny_llava(), **device),
    "clip": lambda **device: ClipEmbedder(*tiny_clip(), **device),
    "detector": lambda **device: Mask2FormerDetector(*tiny_mask2former(), **device),
}


@pytest.fixture
def run_begins():
    """The device of this process as accelerate knows it since a run began: one that nothing can be computed on."""
    state = PartialState()
    before = state.device

    def begin():
        state.device = torch.device("meta")

    yield begin
    state.device = before


@pytest.mark.parametrize("kind", MADE)
def test_it_goes_to_the_device_that_its_process_has_when_it_is_first_used(run_begins, kind):
    early, told = MADE[kind](), MADE[kind](device="cpu")
    run_begins()
    assert {p.device.type for p in early.model.parameters()} == {"cpu"}
    for reward, place in ((early, "meta"), (told, "cpu")):
        assert {p.device.type for p in reward.placed().parameters()} == {place}
        assert reward.device == torch.device(place)


def test_weights_that_a_score_has_placed_still_lead_a_gradient(monkeypatch):
    """Scores are made without any trace of gradients, and what is made then would keep none for good."""
    clip, processor = tiny_clip()
    width = clip.config.projection_dim
    reward = ClipReward(clip, nn.Linear(width, 1), processor=processor, dtype=torch.float64)
    move = nn.Module.to  # a copy of all weights, as where they go to another device
    copied = lambda module, *to: move(module._apply(torch.clone), *to)  # noqa: E731
    monkeypatch.setattr(nn.Module, "to", copied)
    assert len(reward.score([smooth_image(0, 32, 32)], ["a cat"], {})) == 1
    pixels = torch.rand(1, 3, 32, 32, requires_grad=True)
    reward.differentiable(pixels, ["a cat"]).sum().backward()
    assert pixels.grad.abs().max() > 0
