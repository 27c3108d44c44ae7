"""The painter's text encoder as the thinker: one copy in memory, which the image's loss may reach."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.helpers.tiny_painters import PROMPTS, generators, painted_from, tiny_model
from tests.helpers.tiny_pipelines import FAMILIES, sd3
from trl_unigrpo.flow.sampler import RolloutPlan
from trl_unigrpo.models.pipeline import PipelineForUnifiedGeneration


SHARED = ["flux2_klein", "qwen_image", "z_image", "ovis_image", "hunyuan_image", "lumina2", "sana"]


@pytest.fixture(params=SHARED)
def shared(request):
    tiny = FAMILIES[request.param]()
    model = PipelineForUnifiedGeneration.from_pretrained(
        painter=tiny.pipeline, painter_arguments=tiny.arguments, dtype=torch.float32
    )
    return model, tiny.size


def records_of(model, size, steps=(0, 1)):
    plan = RolloutPlan(model.own_timesteps(3, size), size, torch.tensor(steps))
    return model.rollout(painted_from(PROMPTS[:2]), plan, generators(2))


def adapted(model, experts="both"):
    torch.manual_seed(3)
    targets = model.default_lora_targets(experts)
    get_peft_model(model, LoraConfig(r=2, lora_alpha=1, target_modules=targets, init_lora_weights=False))


def test_there_is_one_copy(shared):
    model, _ = shared
    assert model.config.shared_encoder
    assert model.pipeline.text_encoder in set(model.thinker.modules())
    assert "text_encoder" not in model.frozen
    assert all(parameter.requires_grad for parameter in model.thinker.parameters())
    encoder, whole = (sum(p.numel() for p in m.parameters()) for m in (model.pipeline.text_encoder, model.thinker))
    assert encoder == whole  # the head is the embedding, or part of the encoder
    tokens = model.generate(torch.tensor([[10, 20, 30]]), max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 7)


def test_adapters_go_to_the_text_alone_of_a_thinker_that_also_sees(shared):
    model, _ = shared
    adapted(model, "text")
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names
    assert all(".layers." in name and "visual" not in name for name in names)


def test_the_thinkers_adapters_change_what_the_painter_sees_and_the_reference_does_not_have_them(shared):
    model, size = shared
    records = records_of(model, size)
    before = [v for _, v in model.velocities(records)]
    adapted(model, "text")
    after = [v for _, v in model.velocities(records)]
    assert all((a - b).abs().max() > 1e-5 for a, b in zip(before, after, strict=True))
    with model.reference() as reference, torch.no_grad():
        again = [v for _, v in reference.velocities(records)]
    for a, b in zip(before, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("context_grad", [False, True])
def test_the_images_loss_reaches_the_thinker_if_it_may(shared, context_grad):
    model, size = shared
    adapted(model)
    records = records_of(model, size)
    for _, velocity in model.velocities(records, context_grad=context_grad):
        velocity.square().sum().backward()
    thinker = [p for n, p in model.named_parameters() if p.requires_grad and n.startswith("thinker.")]
    painter = [p for n, p in model.named_parameters() if p.requires_grad and n.startswith("painter.")]
    assert any(p.grad is not None and p.grad.any() for p in painter)
    assert any(p.grad is not None and p.grad.any() for p in thinker) == context_grad


def test_the_gradient_through_the_text_is_the_slope_of_the_loss(shared):
    """Against a difference quotient, along the gradient and a little to the side of it."""
    model, size = shared
    records = records_of(model, size, steps=(1,))
    # Not the embedding: its row of the padding token has no gradient by design.
    weights = [p for n, p in model.thinker.named_parameters() if p.ndim == 2 and ".layers." in n]

    def loss():
        _, velocity = next(model.velocities(records, context_grad=True))
        return velocity.double().square().sum()

    loss().backward()
    generator = torch.Generator().manual_seed(5)
    reached = [p for p in weights if p.grad is not None]
    direction = [p.grad + 0.3 * p.grad.std() * torch.randn(p.shape, generator=generator) for p in reached]
    slope = sum((p.grad * d).sum().double() for p, d in zip(reached, direction, strict=True))
    step = 3e-4 / max(float(d.abs().max()) for d in direction)

    def after(by):
        with torch.no_grad():
            for p, d in zip(reached, direction, strict=True):
                p.add_(d, alpha=by)
            value = loss()
            for p, d in zip(reached, direction, strict=True):
                p.sub_(d, alpha=by)
        return value

    assert len(reached) >= 7
    torch.testing.assert_close((after(step) - after(-step)) / (2 * step), slope, rtol=0.02, atol=0)


def test_a_pipeline_whose_encoders_can_not_think():
    with pytest.raises(
        ValueError, match="StableDiffusion3Pipeline has no text encoder that is a whole language model"
    ):
        PipelineForUnifiedGeneration.from_pretrained(painter=sd3().pipeline)


def test_a_thinker_of_its_own_is_not_shared():
    assert not tiny_model("qwen_image").config.shared_encoder
