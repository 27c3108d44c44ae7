"""Guided BAGEL: the official implementation's recorded velocities, its contexts, and how much is computed."""

import itertools

import pytest
import torch

from trl_unigrpo.flow import flow_timesteps
from trl_unigrpo.flow.guidance import Guidance, guide
from trl_unigrpo.flow.sampler import RolloutPlan
from trl_unigrpo.models.bagel import BagelForUnifiedGeneration
from trl_unigrpo.models.bagel.segments import ContextImage
from trl_unigrpo.models.contract import Conditioning, UnifiedModelMixin


TOLERANCE = 1e-4  # of max(1, largest recorded entry)
START, END = 375, 376
SIZE = (32, 48)  # 2 x 3 image tokens
NODES = flow_timesteps(6, shift=3.0)

# Prompts with and without a system message, of several lengths; a thinking that ran out of length, and none.
RAGGED = Conditioning(
    prompt_ids=[[START, 5, 6, END, START, 10, 11, 12, END, START], [START, 20, END, START], [START, 5, END, START]],
    completion_ids=[[40, 41, END], [50, 51, 52, 53, 54, 55], []],
    system_ids=[[START, 5, 6, END], [], [START, 5, END]],
)


@pytest.fixture
def recorded_conditioning(recorded) -> Conditioning:
    """The recorded sample, in the parts that sampling leaves: an opened prompt, and the thinking after it."""
    prompt, thinking = recorded["prefill/input_ids"].tolist(), recorded["think/context_ids"].tolist()
    system = prompt[: prompt.index(END) + 1]
    return Conditioning([[*prompt, START]], [thinking[1:]], [system])


def branch_velocity(model, conditioning, x, t, size):
    return model.predict_velocity(model.encode_context(model.contexts(conditioning)), x, t, size)


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
def test_recorded_guided_velocity(model, recorded, recorded_conditioning, key, guidance):
    copy = (recorded["flow/x_t"][1:2], recorded["flow/t"][1:2], tuple(recorded["flow/image_hw"].tolist()))
    velocity = branch_velocity(model, recorded_conditioning, *copy)
    branches = {
        name: branch_velocity(model, model.guidance_conditioning(recorded_conditioning, name), *copy)
        for name in guidance.branches
    }
    expected = {"velocity": recorded["flow/velocity"][1], "text": recorded["cfg/velocity_sys_only"]}
    expected |= {"image": recorded["cfg/velocity_sys_prompt"], "guided": recorded[f"cfg/{key}"]}
    actual = {"velocity": velocity, **branches, "guided": guide(velocity, branches, guidance)}
    for name, value in actual.items():
        atol = TOLERANCE * max(1.0, expected[name].abs().max().item())
        torch.testing.assert_close(value[0], expected[name], rtol=0, atol=atol)


def test_contexts_of_the_branches(model):
    text, image = (model.contexts(model.guidance_conditioning(RAGGED, name)) for name in ("text", "image"))
    assert [row.ids.tolist() for row in text] == [[START, 5, 6, END], [], [START, 5, END]]
    assert [row.ids.tolist() for row in image] == [
        [START, 5, 6, END, START, 10, 11, 12, END],
        [START, 20, END],
        [START, 5, END],
    ]


def test_branches_of_an_edit(model):
    """Without the prompt the image to edit stays, without the image the prompt does."""
    shown, placeholder = ContextImage(torch.ones(6, 64), (2, 3)), model.config.image_token_id
    edit = Conditioning(
        [[START, 5, END, placeholder, START, 20, END, START]], [[40, END]], [[START, 5, END]], [[shown]]
    )
    text, image = (model.contexts(model.guidance_conditioning(edit, name))[0] for name in ("text", "image"))
    assert (text.ids.tolist(), list(text.images)) == ([START, 5, END, placeholder], [shown])
    assert (image.ids.tolist(), list(image.images)) == ([START, 5, END, START, 20, END], [])


def test_system_messages_that_nobody_named(model):
    conditioning = Conditioning(RAGGED.prompt_ids, RAGGED.completion_ids)
    with pytest.raises(ValueError, match=r"set `Conditioning.system_ids`, to empty rows"):
        rollout(model, Guidance(4.0), conditioning)
    rollout(model, Guidance(image_guidance_scale=1.5), conditioning)


def test_model_that_does_not_know_guidance(checkpoint):
    class Unguided(BagelForUnifiedGeneration):
        guidance_conditioning = UnifiedModelMixin.guidance_conditioning

    model = Unguided.from_pretrained(checkpoint)
    with pytest.raises(NotImplementedError, match=r"Unguided does not say what the branch 'text'.*scale of 1"):
        rollout(model, Guidance(4.0))
    rollout(model, Guidance())


def rollout(model, guidance, conditioning=RAGGED, rows=range(3), **plan):
    plan = RolloutPlan(NODES, SIZE, guidance=guidance, **plan)
    return model.rollout(conditioning, plan, [torch.Generator().manual_seed(row) for row in rows])


@torch.no_grad()
def test_guided_rollout_is_eulers_method_on_guided_velocities(model):
    guidance = Guidance(4.0, 1.5, interval=(0.5, 1.0))
    inside = [bool(t > 0.5) for t in NODES[:-1]]
    assert 0 < sum(inside) < len(inside)
    contexts = [RAGGED, *(model.guidance_conditioning(RAGGED, name) for name in ("text", "image"))]
    x = torch.stack([torch.randn(6, 64, generator=torch.Generator().manual_seed(row)) for row in range(3)])
    for (t, t_next), guided in zip(itertools.pairwise(NODES), inside, strict=True):
        v, *others = (branch_velocity(model, c, x, t.float().expand(3), SIZE) for c in contexts)
        if guided:
            v = guide(v, dict(zip(("text", "image"), others, strict=True)), guidance)
        x = x + (t_next - t).float() * v
    for record, expected in zip(rollout(model, guidance), x, strict=True):
        torch.testing.assert_close(record.final_latents, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
def test_samples_do_not_depend_on_their_batch(model, renorm):
    guidance = Guidance(4.0, 1.5, renorm=renorm)
    together, in_twos = rollout(model, guidance), rollout(model, guidance, batch_size=2)
    for i in range(3):
        row = Conditioning(*([rows[i]] for rows in (RAGGED.prompt_ids, RAGGED.completion_ids, RAGGED.system_ids)))
        [alone] = rollout(model, guidance, row, rows=[i])
        for record in (together[i], in_twos[i]):
            torch.testing.assert_close(record.final_latents, alone.final_latents, rtol=0, atol=1e-5)


def test_scales_of_one_paint_what_no_guidance_paints(model):
    for a, b in zip(rollout(model, Guidance()), rollout(model, None), strict=True):
        assert torch.equal(a.final_latents, b.final_latents)


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
