"""Source images: read, sized, shown, and painted from outside of training."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.editing import PAINTED, PLACEHOLDER, source, tiny_editor
from tests.helpers.tiny_unified import tiny_bagel, tiny_tokenizer
from trl_unigrpo.flow import flow_timesteps
from trl_unigrpo.flow.guidance import Guidance
from trl_unigrpo.flow.sampler import RolloutPlan
from trl_unigrpo.models.sources import read_sources, show_sources, size_like, source_fault
from trl_unigrpo.sampling import Thinking, generate, paint, think
from trl_unigrpo.trajectory import Passage, Round, Steps, Trajectory


PROMPTS = ["a red cat", "a big green dog runs", "a small tree", "the blue cat"]
QUICK = {"num_inference_steps": 2, "image_size": 8, "max_completion_length": 3, "batch_size": 4}


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (((1024, 1024), 1024**2, 16, 1024), (1024, 1024)),
        (((600, 800), 512**2, 16, 1024), (448, 592)),
        (((800, 600), 512**2, 16, 1024), (592, 448)),
        (((100, 1000), 1024**2, 16, 1024), (96, 1024)),  # no side above 1024
        (((100, 1000), 1024**2, 16, None), (320, 3232)),
        (((1, 500), 64**2, 16, 1024), (16, 1024)),  # at least one step
    ],
)
def test_sizes_follow_the_source(given, size):
    assert size_like(*given) == size


def test_a_source_is_read_from_all_that_holds_one(tmp_path):
    image = source(0)
    image.save(tmp_path / "a.png")
    held = [image, str(tmp_path / "a.png"), tmp_path / "a.png", {"bytes": (tmp_path / "a.png").read_bytes()}]
    for value in (*held, {"bytes": None, "path": str(tmp_path / "a.png")}):
        (read,) = read_sources(value)
        assert np.array_equal(np.asarray(read), np.asarray(image))
    assert len(read_sources(held)) == 4
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="A source image can't be read"):
        read_sources(str(tmp_path / "text.png"))
    assert "no such file" in source_fault(str(tmp_path))
    assert "expected a PIL image" in source_fault(3)


def test_a_source_is_resized_to_what_the_model_takes():
    model, image = tiny_editor(), source(1)
    sources = show_sources(model, [image, source(2)], 8)
    (shown, other), size = sources.shown, PAINTED[1]
    assert sources.size == size
    assert [4 * side for side in other.grid] == list(PAINTED[2])
    pixels = (
        torch.from_numpy(np.array(image.resize(size[::-1], Image.Resampling.BICUBIC))).permute(2, 0, 1) / 127.5 - 1
    )
    torch.testing.assert_close(shown.latents, model.encode_images(pixels[None])[0])
    assert len(shown.features) == 4 * 2  # 12 x 4 pixels are 4 x 1.33 patches of a tower that takes 4 a side
    assert tiny_editor(eyes=False).source_image(image, size).features is None


def test_generate_paints_any_shape_but_edits_follow_their_source():
    model, tokenizer, wide = tiny_editor(), tiny_tokenizer(), {**QUICK, "image_size": "4x16"}
    assert [sample.image.size for sample in generate(model, PROMPTS[:2], tokenizer, **wide)] == [(16, 4)] * 2
    with pytest.raises(ValueError, match="image_size='4x16' with source images: .*has the shape of its source.*such"):
        generate(model, PROMPTS[:1], tokenizer, source_images=[source(0)], **wide)


def test_generate_paints_each_edit_in_its_size_and_from_its_source():
    given = [source(number) for number in range(4)]
    model, tokenizer = tiny_editor(), tiny_tokenizer()
    samples = generate(model, PROMPTS, tokenizer, source_images=given, **QUICK)
    assert [sample.image.size[::-1] for sample in samples] == list(PAINTED)
    halves = [
        generate(model, PROMPTS[i : i + 2], tokenizer, source_images=given[i : i + 2], first_row=i, **QUICK)
        for i in (0, 2)
    ]
    others = generate(model, PROMPTS, tokenizer, source_images=given[3:] + given[:3], **QUICK)
    for one, half, other in zip(samples, halves[0] + halves[1], others, strict=True):
        if one.thinking == half.thinking:
            torch.testing.assert_close(one.latents, half.latents)
        assert one.latents.shape != other.latents.shape or not torch.equal(one.latents, other.latents)


def test_guided_edits_keep_the_source_where_the_prompt_is_dropped():
    samples = [
        generate(tiny_editor(), PROMPTS[:1], tiny_tokenizer(), source_images=[source(0)], guidance=guidance, **QUICK)
        for guidance in (None, Guidance(4.0), Guidance(4.0, image_guidance_scale=2.0))
    ]
    first, second, third = (sample.latents for (sample,) in samples)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_placeholders_stand_between_system_message_and_instruction():
    model, tokenizer = tiny_editor(), tiny_tokenizer()
    tokenizer.chat_template = model.chat_template
    messages = [
        [{"role": "system", "content": "think first"}, {"role": "user", "content": "a red cat"}],
        [{"role": "user", "content": "a small tree"}],
    ]
    sources = [show_sources(model, [source(0), source(1)], 8), show_sources(model, source(2), 8)]
    first, second = think(model, tokenizer, messages, Thinking(thinking=False), sources=sources)
    words = tokenizer.get_vocab()
    assert first.prompt_ids == [1, words["think"], words["first"], 2, PLACEHOLDER, PLACEHOLDER] + [
        *(1, words["a"], words["red"], words["cat"], 2, 1)
    ]
    assert second.prompt_ids == [PLACEHOLDER, 1, words["a"], words["small"], words["tree"], 2, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([source(0)], "source_images for 1 of 2 prompts"),
        ([source(0), None], r"source_images\[1\] is None"),
    ],
)
def test_bad_sources_end_a_generation_before_it_begins(given, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_editor(), PROMPTS[:2], tiny_tokenizer(), source_images=given, **QUICK)


def test_a_model_of_text_alone_says_so():
    model = tiny_bagel()
    model.__class__ = type("Blind", (type(model),), {"edits": False})
    with pytest.raises(ValueError, match="Blind is text to image only"):
        generate(model, PROMPTS[:1], tiny_tokenizer(), source_images=[source(0)], **QUICK)


def test_a_text_row_without_steps_sees_its_sources_in_a_packed_forward():
    model = tiny_editor().eval()
    sources = [show_sources(model, source(number), 8) for number in (0, 3)]
    rows = [[1, 8, 2, PLACEHOLDER, 1, 10, 2, 1, 11, 2], [PLACEHOLDER, 1, 12, 13, 2, 1, 9, 14, 15, 2]]
    trajectory = Trajectory("", rows[0][:8], rounds=[Round(rows[0][8:])], images=sources[0].shown)
    plan = RolloutPlan(flow_timesteps(2, 3.0), (8, 8), torch.tensor([0]))
    (image,) = paint(model, [trajectory], plan, [torch.Generator().manual_seed(0)])
    trajectory.rounds[0].images.append(image)
    shown = [one.shown for one in sources]
    passages = [[Passage(row, images, rounds=1)] for row, images in zip(rows, shown, strict=True)]
    with torch.no_grad():
        packed = model.call_backbone(torch.tensor(rows), steps=Steps.of([trajectory]), passages=passages)
        alone = model.call_backbone(torch.tensor(rows), images=shown)
    torch.testing.assert_close(packed.last_hidden_state, alone.last_hidden_state, rtol=0, atol=1e-5)
    torch.testing.assert_close(packed.velocity, image.steps.velocity, rtol=0, atol=1e-5)
