"""Guided BAGEL: the official implementation's recorded velocities, its contexts, and how much is computed."""

import itertools
from dataclasses import replace

import pytest
import torch

from tests.helpers.bagel_checks import END, SIZE, START, assert_equal
from tests.helpers.trajectories import steps_of, trajectory
from trl_unigrpo.flow import flow_timesteps
from trl_unigrpo.flow.guidance import Guidance, guide
from trl_unigrpo.flow.sampler import RolloutPlan
from trl_unigrpo.models.bagel import BagelForUnifiedGeneration
from trl_unigrpo.models.bagel.segments import ContextImage
from trl_unigrpo.models.contract import UnifiedModelMixin
from trl_unigrpo.sampling import paint
from trl_unigrpo.trajectory import Trajectory, in_order


TOLERANCE = 1e-4  # of max(1, largest recorded entry)
NODES = flow_timesteps(6, shift=3.0)

# Prompts with and without a system message, of several lengths; a thinking that ran out of length, and none.
RAGGED = [
    trajectory([START, 5, 6, END, START, 10, 11, 12, END, START], [40, 41, END], row=0, system_ids=[START, 5, 6, END]),
    trajectory([START, 20, END, START], [50, 51, 52, 53, 54, 55], row=1, system_ids=[]),
    trajectory([START, 5, END, START], row=2, system_ids=[START, 5, END]),
]


@pytest.fixture
def recorded_trajectory(recorded) -> Trajectory:
    """The recorded sample, in the parts that sampling leaves: an opened prompt, and the thinking after it."""
    prompt, thinking = recorded["prefill/input_ids"].tolist(), recorded["think/context_ids"].tolist()
    return trajectory([*prompt, START], thinking[1:], system_ids=prompt[: prompt.index(END) + 1])


def velocity_behind(model, contexts, x, t, size):
    return model.predict_velocity(model.encode_context(contexts), x, t, size)


@torch.no_grad()
@pytest.mark.parametrize(
    ("key", "guidance"),
    [
        (f"{renorm}_{branches}", Guidance(4.0, scale, renorm=renorm))
        for renorm in ("global", "channel", "text_channel")
        for branches, scale in (("text", 1.0), ("text_img", 1.5))
    ]
    + [("global_text_min0.9", Guidance(4.0, renorm_min=0.9))],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_recorded_guided_velocity(model, recorded, recorded_trajectory, key, guidance):
    copy = (recorded["flow/x_t"][1:2], recorded["flow/t"][1:2], tuple(recorded["flow/image_hw"].tolist()))
    velocity = velocity_behind(model, model.contexts([recorded_trajectory]), *copy)
    branches = {
        name: velocity_behind(model, model.branch_contexts([recorded_trajectory], name), *copy)
        for name in guidance.branches
    }
    expected = {"velocity": recorded["flow/velocity"][1], "text": recorded["cfg/velocity_sys_only"]}
    expected |= {"image": recorded["cfg/velocity_sys_prompt"], "guided": recorded[f"cfg/{key}"]}
    actual = {"velocity": velocity, **branches, "guided": guide(velocity, branches, guidance)}
    for name, value in actual.items():
        atol = TOLERANCE * max(1.0, expected[name].abs().max().item())
        torch.testing.assert_close(value[0], expected[name], rtol=0, atol=atol)


def test_contexts_of_the_branches(model):
    text, image = (model.branch_contexts(RAGGED, name) for name in ("text", "image"))
    assert [row.ids.tolist() for row in text] == [[START, 5, 6, END], [], [START, 5, END]]
    assert [row.ids.tolist() for row in image] == [
        [START, 5, 6, END, START, 10, 11, 12, END],
        [START, 20, END],
        [START, 5, END],
    ]


def test_branches_of_an_edit(model):
    """Without the prompt the image to edit stays, without the image the prompt does."""
    shown, placeholder = ContextImage(torch.ones(6, 64), (2, 3)), model.config.image_token_id
    prompt_ids = [START, 5, END, placeholder, START, 20, END, START]
    edit = trajectory(prompt_ids, [40, END], system_ids=[START, 5, END], images=[shown])
    text, image = (model.branch_contexts([edit], name)[0] for name in ("text", "image"))
    assert (text.ids.tolist(), list(text.images)) == ([START, 5, END, placeholder], [shown])
    assert (image.ids.tolist(), list(image.images)) == ([START, 5, END, START, 20, END], [])


def test_system_messages_that_nobody_named(model):
    unnamed = [replace(trajectory, system_ids=None) for trajectory in RAGGED]
    with pytest.raises(ValueError, match=r"set `Trajectory.system_ids`, to an empty list"):
        rollout(model, Guidance(4.0), unnamed)
    rollout(model, Guidance(image_guidance_scale=1.5), unnamed)


def test_model_that_does_not_know_guidance(checkpoint):
    class Unguided(BagelForUnifiedGeneration):
        branch_contexts = UnifiedModelMixin.branch_contexts

    model = Unguided.from_pretrained(checkpoint)
    with pytest.raises(NotImplementedError, match=r"Unguided does not say what the branch 'text'.*scale of 1"):
        rollout(model, Guidance(4.0))
    rollout(model, Guidance())


def rollout(model, guidance, trajectories=RAGGED, **plan):
    plan = RolloutPlan(NODES, SIZE, guidance=guidance, **plan)
    return paint(model, trajectories, plan, [torch.Generator().manual_seed(t.row) for t in trajectories])


@torch.no_grad()
def test_guided_rollout_is_eulers_method_on_guided_velocities(model):
    guidance = Guidance(4.0, 1.5, interval=(0.5, 1.0))
    inside = [bool(t > 0.5) for t in NODES[:-1]]
    assert 0 < sum(inside) < len(inside)
    contexts = [model.contexts(RAGGED), *(model.branch_contexts(RAGGED, name) for name in ("text", "image"))]
    x = torch.stack([torch.randn(6, 64, generator=torch.Generator().manual_seed(row)) for row in range(3)])
    for (t, t_next), guided in zip(itertools.pairwise(NODES), inside, strict=True):
        v, *others = (velocity_behind(model, c, x, t.float().expand(3), SIZE) for c in contexts)
        if guided:
            v = guide(v, dict(zip(("text", "image"), others, strict=True)), guidance)
        x = x + (t_next - t).float() * v
    for image, expected in zip(rollout(model, guidance), x, strict=True):
        torch.testing.assert_close(image.latents, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("packs", [False, True])
def test_images_keep_what_guided_them_and_training_repeats_it(model, packs):
    model.packs_velocities = packs
    guidance = Guidance(4.0, 1.5, interval=(0.7, 1.0))
    window = torch.tensor([0, 4])
    assert [guidance.covers(t) for t in NODES[window]] == [True, False]
    images = rollout(model, guidance, windows=window)
    for name in guidance.branches:
        for image, context in zip(images, model.branch_contexts(RAGGED, name), strict=True):
            assert torch.equal(image.branches[name].ids, context.ids)
    assert all(image.guidance == guidance and set(image.branches) == {"text", "image"} for image in images)
    steps = steps_of(images)
    again = in_order(model.velocities(steps))
    assert_equal(again, steps.states.velocity)
    alone = in_order(model.velocities(steps_of([replace(image, guidance=None) for image in images])))
    guided = torch.arange(6) % 2 == 0  # the first of each image's two steps
    assert_equal(again[~guided], alone[~guided])
    # The last sample's branches see all that it sees.
    assert ((again - alone)[guided].abs().amax((1, 2)) > 0.01).tolist() == [True, True, False]


@pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
def test_samples_do_not_depend_on_their_batch(model, renorm):
    guidance = Guidance(4.0, 1.5, renorm=renorm)
    together, in_twos = rollout(model, guidance), rollout(model, guidance, batch_size=2)
    for i in range(3):
        [alone] = rollout(model, guidance, RAGGED[i : i + 1])
        for image in (together[i], in_twos[i]):
            torch.testing.assert_close(image.latents, alone.latents, rtol=0, atol=1e-5)


def test_scales_of_one_paint_what_no_guidance_paints(model):
    for a, b in zip(rollout(model, Guidance()), rollout(model, None), strict=True):
        assert torch.equal(a.latents, b.latents)


@pytest.mark.parametrize(
    ("guidance", "contexts", "guided_forwards"),
    [
        (None, 1, 0),
        (Guidance(), 1, 0),
        (Guidance(4.0), 2, 1),
        (Guidance(image_guidance_scale=1.5), 2, 1),
        (Guidance(4.0, 1.5), 3, 2),
    ],
)
def test_nothing_is_computed_that_is_not_used(model, monkeypatch, guidance, contexts, guided_forwards):
    calls = {"encode_context": 0, "predict_velocity": 0}

    def counted(name):
        method = getattr(model, name)

        def call(*args, **kwargs):
            calls[name] += 1
            return method(*args, **kwargs)

        return call

    for name in calls:
        monkeypatch.setattr(model, name, counted(name))
    rollout(model, guidance)
    inside = sum(0.4 < t <= 1 for t in NODES[:-1].tolist())
    assert 0 < inside < len(NODES) - 1
    assert calls == {"encode_context": contexts, "predict_velocity": len(NODES) - 1 + guided_forwards * inside}
