"""Guidance against its equations, written out sample by sample and token by token."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from trl_unigrpo.flow import flow_timesteps
from trl_unigrpo.flow.guidance import (
    RENORMS,
    Guidance,
    guide,
    guide_where_covered,
    guided_velocity,
)
from trl_unigrpo.flow.sampler import RolloutPlan, draw_noise, sample_latents


SHAPE = (3, 4)  # three tokens of four numbers


def velocities(count: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Velocities of the whole context and of the two branches, of very different lengths per sample and token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.logspace(-1, 1, 3 * count).view(count, 3, 1)
    return tuple(torch.randn(count, *SHAPE, generator=generator) * lengths for _ in range(3))


def length(numbers: list[float]) -> float:
    return math.sqrt(sum(x * x for x in numbers))


def factor(before: list[float], after: list[float], least: float) -> float:
    return min(max(length(before) / (length(after) + 1e-8), least), 1.0)


def by_hand(v: Tensor, text: Tensor | None, image: Tensor | None, guidance: Guidance) -> Tensor:
    """One sample (tokens, numbers), in Python's floats."""
    v = v.double().tolist()
    text, image = (None if x is None else x.double().tolist() for x in (text, image))
    guided = []
    for n, token in enumerate(v):
        new = list(token)
        if text is not None:
            new = [u + guidance.guidance_scale * (x - u) for x, u in zip(new, text[n], strict=True)]
            if guidance.renorm == "text_channel":
                scale = factor(token, new, guidance.renorm_min)
                new = [scale * x for x in new]
        if image is not None:
            new = [u + guidance.image_guidance_scale * (x - u) for x, u in zip(new, image[n], strict=True)]
        if guidance.renorm == "channel":
            scale = factor(token, new, guidance.renorm_min)
            new = [scale * x for x in new]
        guided.append(new)
    if guidance.renorm == "global":
        scale = factor([*itertools.chain(*v)], [*itertools.chain(*guided)], guidance.renorm_min)
        guided = [[scale * x for x in token] for token in guided]
    return torch.tensor(guided)


@pytest.mark.parametrize("renorm", RENORMS)
@pytest.mark.parametrize("renorm_min", [0.0, 0.6])
@pytest.mark.parametrize("scales", [(4.0, 1.0), (4.0, 1.5), (1.0, 2.0)])
def test_guided_velocity_is_the_equation_of_every_sample(renorm, renorm_min, scales):
    guidance = Guidance(*scales, renorm=renorm, renorm_min=renorm_min)
    v, text, image = velocities()
    branches = {name: x for name, x in (("text", text), ("image", image)) if name in guidance.branches}
    actual = guide(v, branches, guidance)
    for i, row in enumerate(v):
        rows = (branches[name][i] if name in branches else None for name in ("text", "image"))
        torch.testing.assert_close(actual[i], by_hand(row, *rows, guidance), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("renorm", RENORMS)
def test_a_sample_does_not_notice_the_others(renorm):
    guidance = Guidance(4.0, 1.5, renorm=renorm)
    v, text, image = velocities()
    together = guide(v, {"text": text, "image": image}, guidance)
    for i in range(len(v)):
        row = slice(i, i + 1)
        assert torch.equal(together[row], guide(v[row], {"text": text[row], "image": image[row]}, guidance))


def test_scales_of_one_are_the_velocity_itself():
    v, _, _ = velocities()
    for renorm in RENORMS:
        guidance = Guidance(renorm=renorm)
        assert guidance.branches == ()
        assert guide(v, {}, guidance) is v


def test_renorm_min_of_one_leaves_lengths_alone():
    v, text, image = velocities()
    v_text = text + 4.0 * (v - text)
    expected = image + 1.5 * (v_text - image)
    for renorm in RENORMS:
        assert torch.equal(
            guide(v, {"text": text, "image": image}, Guidance(4.0, 1.5, renorm=renorm, renorm_min=1)), expected
        )


@pytest.mark.parametrize(("renorm", "dims"), [("global", (1, 2)), ("channel", (2,))])
def test_no_guided_velocity_is_longer_than_the_unguided(renorm, dims):
    v, text, image = velocities()
    guided = guide(v, {"text": text, "image": image}, Guidance(4.0, 1.5, renorm=renorm))
    assert (guided.norm(dim=dims) <= v.norm(dim=dims) * (1 + 1e-6)).all()


def test_short_guided_velocity_is_not_stretched():
    v = torch.ones(1, *SHAPE)
    shorter = guide(v, {"text": 1.2 * v}, Guidance(4.0))  # 1.2 v + 4 (v - 1.2 v) = 0.4 v
    torch.testing.assert_close(shorter, 0.4 * v)


def test_branches_are_those_whose_scale_is_above_one():
    assert Guidance(4.0).branches == ("text",)
    assert Guidance(4.0, 1.5).branches == ("text", "image")
    assert Guidance(image_guidance_scale=1.5).branches == ("image",)


def test_interval_leaves_its_low_end_out_and_takes_its_high_end_in():
    guidance = Guidance(4.0, interval=(0.25, 0.75))
    assert [guidance.covers(t) for t in (0.0, 0.25, 0.2500001, 0.5, 0.75, 0.7500001, 1.0)] == (
        [False, False, True, True, True, False, False]
    )
    assert Guidance(4.0).covers(torch.tensor(1.0))
    assert not Guidance(4.0).covers(torch.tensor(0.4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": 0.0}, r"guidance_scale=0.0: expected 1 \(off\) or more"),
        ({"image_guidance_scale": 0.5}, r"image_guidance_scale=0.5: expected 1 \(off\) or more"),
        ({"guidance_scale": math.nan}, "guidance_scale=nan: expected 1"),
        ({"interval": (0.5, 0.5)}, r"interval=\(0.5, 0.5\): expected times \(low, high\).*set the scales to 1"),
        ({"interval": (-0.1, 1.0)}, r"interval=\(-0.1, 1.0\): expected"),
        ({"interval": (0.4, 1000)}, r"interval=\(0.4, 1000\): expected.*1 is noise"),
        ({"interval": (0.4,)}, r"interval=\(0.4,\): expected"),
        ({"renorm": "local"}, "renorm='local': expected one of 'global', 'channel', 'text_channel'; renorm_min=1"),
        ({"renorm_min": 1.5}, "renorm_min=1.5: expected a number from 0 to 1"),
    ],
)
def test_guidance_that_makes_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**arguments)


@pytest.mark.parametrize("given", [(), ("image",), ("text", "image")])
def test_branch_that_is_missing_or_left_over(given):
    v, text, image = velocities()
    branches = {name: x for name, x in (("text", text), ("image", image)) if name in given}
    with pytest.raises(ValueError, match=r"got velocities of the branches \[.*\], expected \['text'\]"):
        guide(v, branches, Guidance(4.0))


# In the sampler


NODES = torch.tensor([1.0, 0.9, 0.6, 0.4, 0.1, 0.0], dtype=torch.float64)


def towards(speed: float):
    """A velocity field of its own."""
    return lambda latents, timesteps: speed * latents + timesteps[:, None, None]


def sample(guidance: Guidance | None, branches=None, velocity=None, nodes: Tensor = NODES, **plan):
    """Two images (2, *SHAPE), and the stochastic steps of each."""
    plan = RolloutPlan(nodes, (48, 64), guidance=guidance, **plan)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    guided = guided_velocity(velocity or towards(0.5), branches or {}, guidance)
    return sample_latents(guided, draw_noise(SHAPE, generators, range(2), "cpu"), plan, generators)


@pytest.mark.parametrize("interval", [(0.4, 1.0), (0.0, 0.9), (0.1, 0.6)])
def test_sampler_guides_inside_of_the_interval_only(interval):
    guidance, seen = Guidance(4.0, 1.5, interval=interval), []

    def text(latents, timesteps):
        seen.append(timesteps[0].item())
        return towards(-0.3)(latents, timesteps)

    images, _ = sample(guidance, {"text": text, "image": towards(0.2)})
    inside = [t for t in NODES[:-1].tolist() if interval[0] < t <= interval[1]]
    assert seen == pytest.approx(inside)
    for row, image in enumerate(images):
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(row)).double()
        for t, t_next in itertools.pairwise(NODES):
            v = 0.5 * x + t
            if interval[0] < t <= interval[1]:
                v = by_hand(v, -0.3 * x + t, 0.2 * x + t, guidance)
            x = x + (t_next - t) * v
        torch.testing.assert_close(image, x.float(), rtol=0, atol=1e-5)


def test_sampler_without_guidance_computes_no_branch():
    plain, _ = sample(None)
    for guidance in (Guidance(), Guidance(4.0, interval=(0.0, 0.05))):
        images, _ = sample(guidance, {})
        assert torch.equal(images, plain)


def test_sampler_that_misses_a_branch_says_so():
    with pytest.raises(ValueError, match=r"branches \[\], expected \['text'\]: encode the contexts"):
        sample(Guidance(4.0))


def test_stochastic_steps_keep_the_guided_velocity():
    guidance = Guidance(4.0, interval=(0.7, 1.0))
    nodes = flow_timesteps(6)  # 1, .94, .86, .75, .6, .375, 0
    branches, windows = {"text": lambda x, t: 2 * x}, torch.tensor([0, 4])
    _, tables = sample(guidance, branches, velocity=lambda x, t: x, nodes=nodes, windows=windows)
    for steps in tables:
        guided = guide(steps.x[:1], {"text": 2 * steps.x[:1]}, guidance)[0]
        torch.testing.assert_close(steps.velocity[0], guided)
        torch.testing.assert_close(steps.velocity[1], steps.x[1])  # t = .6: outside of the interval


def test_time_on_the_interval_s_edge_is_the_same_before_and_after_recording():
    edge = torch.tensor(0.4, dtype=torch.float64)
    assert not Guidance(4.0).covers(edge) and not Guidance(4.0).covers(edge.float())


def test_rows_are_guided_by_their_own_time():
    guidance = Guidance(4.0, interval=(0.5, 1.0))
    v, text, _ = velocities()
    times = torch.tensor([1.0, 0.5, 0.7, 0.2, 0.9])
    actual, guided = guide_where_covered(v, {"text": text}, times, guidance), guide(v, {"text": text}, guidance)
    for row, inside in enumerate([True, False, True, False, True]):
        assert torch.equal(actual[row], guided[row] if inside else v[row])
