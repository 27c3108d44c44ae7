"""Promises that hold on the CPU and on a GPU: run with one, everything here happens there.

python -m pytest tests/models/test_gpu.py
"""

import math

import pytest
import torch
from peft import LoraConfig

from tests.helpers.painting import steps_at, trajectory
from tests.helpers.runs import run
from tests.helpers.tiny_unified import IMAGE_SIZE, tiny_bagel, tiny_tokenizer
from trl_unigrpo.flow import flow_timesteps
from trl_unigrpo.flow.sampler import RolloutPlan
from trl_unigrpo.models.contract import ContextRow
from trl_unigrpo.sampling import decode, paint
from trl_unigrpo.seeding import TRAIN, row_generator
from trl_unigrpo.testing import contract_tests


TOLERANCE = 1e-4  # of max(1, largest entry)
GRADIENT_TOLERANCE = 1e-3  # of the largest entry


@pytest.fixture(scope="module", autouse=True)
def full_precision():
    """Let convolutions compute in float32: the GPU's default for them is TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=0, atol=tolerance * scale)


def test_a_model_on_the_device_keeps_every_promise(device):
    contract_tests(tiny_bagel().to(device), tiny_tokenizer(), (IMAGE_SIZE, IMAGE_SIZE))


@torch.no_grad()
def test_recorded_outputs(model, recorded, device):
    """Logits, velocities and decoded pixels of the official implementation."""
    model.to(device)
    ids = torch.cat([recorded["prefill/input_ids"], recorded["think/context_ids"]]).to(device)
    size = tuple(recorded["flow/image_hw"].tolist())
    context = model.encode_context([ContextRow(ids.cpu())])
    start = len(recorded["prefill/input_ids"])
    assert_close(model(ids[None]).logits[0, start:], recorded["think/logits"])
    for x, t, velocity in zip(*(recorded[f"flow/{name}"] for name in ("x_t", "t", "velocity")), strict=True):
        found = model.predict_velocity(context, x[None].to(device), t[None].to(device), size)
        assert_close(found[0], velocity)
    decoded = model.decode_latents(recorded["rollout/final"][None].to(device), size, "pt")
    assert_close(decoded, recorded["vae/decode_output"])


@pytest.mark.parametrize("which", ["text", "image"])
def test_recorded_gradients(model, recorded, recorded_gradients, gradients, device, which):
    model.to(device)
    ids = torch.cat([recorded["prefill/input_ids"], recorded["think/context_ids"]]).to(device)
    states = (recorded[f"train/{name}"][None].to(device) for name in ("x_t", "t"))
    steps = steps_at([ContextRow(ids.cpu())], *states, tuple(recorded["flow/image_hw"].tolist()))
    output = model.base_model(ids[None], steps=steps, context_grad=True)
    if which == "text":
        start, answers = len(recorded["prefill/input_ids"]), recorded["think/context_ids"][1:].to(device)
        logits = model.get_output_embeddings()(output.last_hidden_state)[0, start:-1]
        loss = torch.nn.functional.cross_entropy(logits, answers)
    else:
        target = (recorded["flow/eps"] - recorded["flow/x0"]).to(device)
        loss = (output.velocity - target).square().mean()
    found = gradients(model, loss)
    expected = {name.removeprefix(f"{which}/"): x for name, x in recorded_gradients.items() if name.startswith(which)}
    assert len(expected) > 100
    for name, gradient in expected.items():
        atol = GRADIENT_TOLERANCE * gradient.abs().max().item()
        torch.testing.assert_close(found[name].cpu(), gradient, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_images_of_a_seed_are_the_cpus(device):
    """Noise is drawn on the CPU, row by row, so a group's images are its own wherever they are painted."""
    model, size = tiny_bagel().eval(), (IMAGE_SIZE, IMAGE_SIZE)
    plan = RolloutPlan(flow_timesteps(6, 1.0), size, torch.arange(2))

    def group(where: torch.device | str):
        model.to(where)
        rows = [trajectory([1, 7, 8, 2, 1], [9, 10, 2], row=row) for row in range(4)]
        images = paint(model, rows, plan, [row_generator(0, TRAIN, 0, row) for row in range(4)])
        return images, decode(model, images)

    (here, pixels), (there, expected) = group(device), group("cpu")
    for image, other, found, right in zip(here, there, pixels, expected, strict=True):
        assert torch.equal(image.steps.x[0].cpu(), other.steps.x[0])
        assert_close(image.latents, other.latents)
        difference = torch.tensor([a - b for a, b in zip(found.tobytes(), right.tobytes(), strict=True)])
        assert difference.abs().max() <= 1
    starts = [image.steps.x[0].cpu() for image in here]
    assert all(not torch.equal(a, b) for i, a in enumerate(starts) for b in starts[:i])


@torch.no_grad()
def test_recorded_velocities_of_ragged_contexts(device):
    """In half precision ragged copies are packed on a GPU, and from the second velocity on launches are recorded."""
    model, size = tiny_bagel().to(device).eval(), (IMAGE_SIZE, IMAGE_SIZE)
    rows = [ContextRow(torch.arange(7, 7 + length)) for length in (6, 9, 7)]
    states = torch.randn(4, 3, *model.latent_shape(size), generator=torch.Generator().manual_seed(0)).to(device)
    times = torch.tensor([0.9, 0.7, 0.4, 0.2], device=device)

    def velocities(velocity):
        return [velocity(x, t.expand(3)) for x, t in zip(states, times, strict=True)]

    def direct(x, t):
        return model.predict_velocity(model.encode_context(rows), x, t, size)

    exact = velocities(direct)
    with torch.autocast(device.type, torch.bfloat16):
        recorded = model.velocity_after(rows, size)
        found, again, unrecorded = velocities(recorded), velocities(recorded), velocities(direct)
    for values in zip(found, again, unrecorded, exact, strict=True):
        for value in values[:3]:
            assert_close(value, values[3], 0.03)
        assert torch.equal(values[0], values[1])
        assert_close(values[0], values[2], 1e-6)


@torch.no_grad()
def test_recorded_tokens_are_the_most_likely(device):
    model = tiny_bagel().to(device).eval()
    ids = torch.randint(7, 25, (3, 7), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    new = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": 2, "pad_token_id": 0}
    tokens = model.generate(ids, attention_mask=mask, **new)
    assert torch.equal(tokens.cpu(), model.cpu().generate(ids.cpu(), attention_mask=mask.cpu(), **new))


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_resume(make_trainer, tmp_path, device, bf16):
    """A run that stops between two passes ends where it would have ended, but for the order of the GPU's sums."""
    settings = {"bf16": bf16, "use_cpu": device.type == "cpu", "peft_config": LoraConfig(r=2)}
    whole = run(make_trainer, tmp_path / "whole", **settings)
    resumed = run(make_trainer, tmp_path / "resumed", tmp_path / "whole" / "checkpoint-3", **settings)
    start = {name: p for name, p in whole.model.named_parameters() if p.requires_grad}
    moved = math.sqrt(sum(p.detach().float().square().sum().item() for n, p in start.items() if "lora_B" in n))
    other = dict(resumed.model.named_parameters())
    apart = math.sqrt(sum((p - other[n]).detach().float().square().sum().item() for n, p in start.items()))
    assert moved > 0
    assert apart <= 1e-3 * moved
