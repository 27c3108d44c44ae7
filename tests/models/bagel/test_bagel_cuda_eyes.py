"""The host's waits for the device while BAGEL thinks, paints and trains."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.helpers.cuda_eyes import GPU, CudaEyes
from tests.helpers.painting import trajectory
from tests.helpers.tiny_unified import IMAGE_SIZE, tiny_bagel
from trl_unigrpo.flow import flow_timesteps
from trl_unigrpo.flow.guidance import Guidance
from trl_unigrpo.flow.sampler import RolloutPlan
from trl_unigrpo.sampling import paint
from trl_unigrpo.trajectory import Steps


PROMPTS = [[1, 8, 9, 2, 1], [1, 10, 2, 1], [1, 8, 9, 2, 1]]
TEXTS = [[11, 12, 2], [11, 12, 13, 14, 2], [15, 2]]  # ragged contexts


def test_the_eyes_see():
    with CudaEyes(known=[torch.tensor([4.0, 5.0])], flag=lambda place: False) as eyes:
        x = torch.zeros(2, device=GPU)
        torch.tensor([1, 2], device=GPU), x.new_tensor([1]), torch.ones(2).to(GPU), x.copy_(torch.ones(2))
        x[torch.tensor([1])]
        assert x.cpu().tolist() == [4, 5]
        assert x[:1].tolist() == [0]
        assert not (x > 0).all()
        assert x.sum().item() == 0
        x[x > 0], x.nonzero(), x.unique(), torch.equal(x, x)
        with pytest.raises(RuntimeError, match="not on the expected device"):
            x + torch.ones(2)
        # Nothing to wait for: what stays on its device, and a number that an operation carries along.
        (
            x.float() + torch.tensor(1.0),
            torch.full((2,), 3, device=GPU),
            torch.arange(2, device=GPU),
            x[torch.arange(1, device=GPU)],
        )
        torch.ones(2).sum().item()
    kinds = {"upload": 5, "download": 2, "item": 2, "nonzero": 2, "unique": 1, "equal": 1}
    assert eyes.waits == {f"{kind} elsewhere": count for kind, count in kinds.items()}
    assert list(eyes.mixed) == ["aten.add.Tensor elsewhere"]
    assert not eyes.ours


@pytest.fixture
def model():
    return tiny_bagel().eval().to(GPU)


def painted(model, steps, windows=None, guidance=None):
    """Paint three images, and look."""
    trajectories = [replace(trajectory(*row), system_ids=[]) for row in zip(PROMPTS, TEXTS, strict=True)]
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    windows = None if windows is None else torch.tensor(windows)
    plan = RolloutPlan(flow_timesteps(steps), (IMAGE_SIZE, IMAGE_SIZE), windows=windows, guidance=guidance)
    with CudaEyes() as eyes:
        images = paint(model, trajectories, plan, generators)
    assert not eyes.mixed
    for one, image in zip(trajectories, images, strict=True):
        one.rounds[-1].images.append(image)
    return sum(eyes.waits.values()), trajectories


def test_waits_of_a_denoising_step(model):
    few, more, noisy = painted(model, 4)[0], painted(model, 8)[0], painted(model, 8, [1, 2, 4])[0]
    assert more == few  # or it could not be recorded
    assert (noisy - more) / 3 <= 1  # the noise, which generators of the CPU draw
    assert few <= 5  # all that is moved before the first step


def test_waits_of_a_guided_step(model):
    guidance = Guidance(4.0, 2.0, interval=(0.0, 1.0))
    few, more = (painted(model, steps, guidance=guidance)[0] for steps in (4, 8))
    assert (more - few) / 4 <= 4  # three contexts, and whether the time is guided


@pytest.mark.parametrize("padded", [False, True])
def test_waits_of_a_token(model, padded):
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in PROMPTS])
    mask = torch.tensor([[int(padded and i < width - len(row)) ^ 1 for i in range(width)] for row in PROMPTS])

    def counted(tokens):
        asked = Counter()

        def flag(place):
            asked[place] += 1
            return not padded if place.startswith("ours") else asked[place] == tokens  # transformers' own stop

        with CudaEyes(flag=flag) as eyes:
            out = model.generate(
                input_ids=ids.to(GPU), attention_mask=mask.to(GPU), do_sample=True, max_new_tokens=tokens
            )
        assert out.shape[1] == width + tokens
        assert not eyes.mixed
        return sum(eyes.ours.values()), sum(eyes.waits.values()) - sum(eyes.ours.values())

    (few, few_theirs), (more, more_theirs) = counted(4), counted(8)
    assert (more - few) / 4 == 0
    assert (more_theirs - few_theirs) / 4 <= 1  # whether all rows have stopped
    assert few <= 2  # the mask, and equal prompts


def test_waits_of_a_packed_forward(model):
    _, trajectories = painted(model, 6, [0, 1, 3])
    rows = [[*p, *t] for p, t in zip(PROMPTS, TEXTS, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    texts = ids.to(GPU), mask.to(GPU)
    with CudaEyes(known=[torch.stack([ids, mask])]) as eyes:
        steps = Steps.of(trajectories).to(torch.device(GPU))
        made = Counter(eyes.waits)
        output = model.packed_forward(*texts, steps, context_grad=True)
    assert not eyes.mixed
    assert output.velocity.shape == (9, 4, 4)
    assert sum(made.values()) <= 2, made  # whether images are numbers, and the steps' weights
    assert sum((eyes.waits - made).values()) <= 3, eyes.waits  # the texts; the table; the times
    with CudaEyes() as backward:
        (output.velocity.sum() + output.last_hidden_state.sum()).backward()
    assert not backward.waits
    assert not backward.mixed
