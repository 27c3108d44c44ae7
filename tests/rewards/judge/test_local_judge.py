"""The judge in this process, on a random LLaVA: its probabilities, its batches, its gradient to the pixels."""

import asyncio

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.helpers.tiny_llava import IMAGE_SIZE, WORDS, tiny_llava
from trl_unigrpo.rewards import LocalVLMJudge
from trl_unigrpo.rewards.common import DeadRewardError
from trl_unigrpo.rewards.judge import local_judge
from trl_unigrpo.rewards.judge.local_judge import answer_ids
from trl_unigrpo.rewards.judge.prompts import MIN_ANSWER_SHARE
from trl_unigrpo.rewards.local_vlm import to_image
from trl_unigrpo.rewards.pixels import differentiable_pixels


def some_image(seed=0, size=(IMAGE_SIZE, IMAGE_SIZE)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


QUESTIONS = ["is there a cat ?", "is there a red cat and a blue dog in the picture ?", "red ?"]
IMAGES = [some_image(0), some_image(1, (60, 40)), some_image(2)]


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


@pytest.fixture(autouse=True)
def any_share(monkeypatch):
    """Random weights seldom say yes or no: any share of these is an answer here."""
    monkeypatch.setattr(local_judge, "MIN_ANSWER_SHARE", 0.0)


@pytest.fixture
def judge(llava):
    return LocalVLMJudge(*llava, question_template="{question}", template="{prompt}", system_prompt="", device="cpu")


def asked(judge, pairs):
    return asyncio.run(judge.ask(pairs))


def by_hand(llava, image, question):
    """
    P(yes) and the share of both words, from the whole distribution of the next token, one image and one sequence,
    without a chat template.
    """
    model, processor = llava
    text = f'<s>user : <image> "{question}" assistant :'
    inputs = processor(images=image, text=text, return_tensors="pt", add_special_tokens=False)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.no_grad():
        probabilities = model(**inputs).logits[0, -1].softmax(-1)
    yes = sum(probabilities[WORDS.index(word)] for word in ("Yes", "yes", "▁yes"))
    no = sum(probabilities[WORDS.index(word)] for word in ("NO", "no"))
    return (yes / (yes + no)).item(), (yes + no).item()


def test_probability_of_yes_is_that_of_the_next_token(llava, judge):
    scores = asked(judge, list(zip(IMAGES, QUESTIONS, strict=True)))
    expected = [by_hand(llava, image, question)[0] for image, question in zip(IMAGES, QUESTIONS, strict=True)]
    assert scores == pytest.approx(expected, abs=1e-9)
    assert len(set(scores)) == 3 and all(0.01 < score < 0.99 for score in scores)


def test_next_token_that_is_another_word_is_no_answer(llava, judge, monkeypatch):
    """The shares lie between 0.02 and 0.4, so that some of them pass here and none as released."""
    pairs = [(image, question) for image in IMAGES for question in QUESTIONS]
    expected = [by_hand(llava, *pair) for pair in pairs]
    monkeypatch.setattr(local_judge, "MIN_ANSWER_SHARE", 0.2)
    scores = asked(judge, pairs)
    assert scores == [pytest.approx(p, abs=1e-9) if share > 0.2 else None for p, share in expected]
    assert 0 < scores.count(None) < len(scores)
    pixels = torch.from_numpy(np.array(IMAGES[0])).permute(2, 0, 1).double() / 255
    pixels = pixels.repeat(3, 1, 1, 1).requires_grad_()
    found = judge.differentiable(pixels, QUESTIONS)
    assert found.isfinite().tolist() == [score is not None for score in scores[:3]] == [False, True, False]
    (gradient,) = torch.autograd.grad(found[found.isfinite()].sum(), pixels)  # as ReFL takes it
    assert gradient.isfinite().all()
    monkeypatch.setattr(local_judge, "MIN_ANSWER_SHARE", MIN_ANSWER_SHARE)
    assert asked(judge, pairs) == [None] * 9
    assert "neither yes nor no" in judge.last_error and "expected more than 0.5" in judge.last_error


def test_score_asks_about_the_prompt(judge):
    prompts = ["cat", [{"role": "user", "content": "red dog"}]]
    scores = judge(prompts, images=IMAGES[:2])
    assert scores == asked(judge, [(IMAGES[0], "cat"), (IMAGES[1], "red dog")])
    assert judge.__name__ == "LocalVLMJudge"


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_batch_equals_singles(llava, batch_size):
    pairs = [(IMAGES[i % 3], QUESTIONS[i // 3]) for i in range(9)]
    settings = {"question_template": "{question}", "device": "cpu"}
    singles = [asked(LocalVLMJudge(*llava, batch_size=1, **settings), [pair])[0] for pair in pairs]
    together = asked(LocalVLMJudge(*llava, batch_size=batch_size, **settings), pairs)
    assert together == pytest.approx(singles, abs=1e-12)


def test_several_images_are_seen_in_their_order(judge):
    red, other = some_image(0), some_image(1)
    shown = [[red, other], [other, red], [red], red]
    first, second, single, bare = asked(judge, [(images, "Is it?") for images in shown[:2]]) + asked(
        judge, [(images, "Is it?") for images in shown[2:]]
    )
    assert len({first, second, single}) == 3
    assert single == bare


def test_all_spellings_are_found():
    _, processor = tiny_llava()
    found = {word: {WORDS[i] for i in ids} for word, ids in answer_ids(processor.tokenizer).items()}
    assert found == {"yes": {"Yes", "yes", "▁yes"}, "no": {"NO", "no"}}


def test_vocabulary_without_an_answer_is_an_error():
    class Wordless:
        def get_vocab(self):
            return {"yes": 0, "nay": 1}

    with pytest.raises(ValueError, match="Wordless has no token for 'no'"):
        answer_ids(Wordless())


@pytest.mark.parametrize("size", [IMAGE_SIZE, 48, 20])
def test_gradient_agrees_with_finite_differences(judge, size):
    generator = torch.Generator().manual_seed(size)
    pixels = 0.2 + 0.6 * torch.rand(2, 3, size, size, generator=generator, dtype=torch.float64)
    pixels.requires_grad_()
    scores = judge.differentiable(pixels, QUESTIONS[:2])
    (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    assert gradient.flatten(1).norm(dim=1).min() > 1e-4
    for row in range(2):
        direction = torch.zeros_like(pixels)
        direction[row] = torch.randn(pixels.shape[1:], generator=generator, dtype=torch.float64)
        step, slope = 3e-4, 0.0  # not smaller: the language model's norms compute in float32
        for steps, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):  # exact up to the fifth order
            with torch.no_grad():
                moved = judge.differentiable(pixels + steps * step * direction, QUESTIONS[:2])[row].item()
            slope += weight * moved / (12 * step)
        assert (gradient * direction).sum() == pytest.approx(slope, rel=1e-3, abs=2e-4)
    assert all(weight.grad is None for weight in judge.model.parameters())


def test_differentiable_path_sees_what_the_judge_sees(judge):
    images = [some_image(seed) for seed in range(3)]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]).double() / 255
    scores = judge.differentiable(pixels, QUESTIONS)
    assert scores.tolist() == pytest.approx(asked(judge, list(zip(images, QUESTIONS, strict=True))), abs=1e-6)


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (20, 24), (32, 32)])
@pytest.mark.parametrize(
    "sizes",
    [
        {"size": {"height": 32, "width": 24}, "do_center_crop": False},
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 30}},
        {"size": {"shortest_edge": 33}, "crop_size": {"height": 32, "width": 31}, "rescale_factor": 1 / 127.5},
    ],
)
def test_pixels_agree_with_the_image_processor(resample, shape, sizes):
    """Up to the rounding to 8 bits that Pillow makes after each of the two passes of resizing."""
    processor = CLIPImageProcessorPil(resample=resample, **sizes)
    image = some_image(3, shape[::-1])
    expected = processor(image, return_tensors="pt")["pixel_values"]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double() / 255
    found = differentiable_pixels(pixels, processor)
    rounding = 1.25 * processor.rescale_factor / min(processor.image_std)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < rounding
    assert (found - expected).abs().mean() < 0.4 * rounding


def test_sizes_that_have_no_gradient_are_named():
    pixels = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match="longest_edge"):
        differentiable_pixels(pixels, CLIPImageProcessorPil(size={"longest_edge": 32}))
    crop = {"height": 32, "width": 32}
    with pytest.raises(ValueError, match="smaller than the image processor's crop of 32 x 32"):
        differentiable_pixels(pixels, CLIPImageProcessorPil(do_resize=False, crop_size=crop))
    with pytest.raises(ValueError, match="expected BILINEAR or BICUBIC"):
        differentiable_pixels(pixels, CLIPImageProcessorPil(resample=Image.Resampling.LANCZOS))


def test_image_round_trip():
    image = some_image(5, (7, 4))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    assert np.array_equal(np.asarray(to_image(pixels)), np.asarray(image))


def test_weights_move_only_while_they_are_used(llava):
    """On the meta device nothing can be computed, so that what is moved there shows."""
    model, processor = llava
    judge = LocalVLMJudge(model, processor, device="cpu")
    places = []
    move = model.to
    model.to = lambda device: places.append(torch.device(device).type) or move("cpu")
    try:
        judge.device = torch.device("meta")
        judge.release()
        judge.offload = False
        judge.release()
        judge.device = torch.device("cpu")
        asked(judge, [(IMAGES[0], "a")])
    finally:
        del model.to
    assert places == ["cpu", "cpu"]  # back to the CPU once, not without offloading; and to where it computes


def test_model_and_processor_of_a_folder(tmp_path, llava):
    model, processor = llava
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = LocalVLMJudge(str(tmp_path), device="cpu", dtype=torch.float64)
    mine = LocalVLMJudge(model, processor, device="cpu")
    pairs = list(zip(IMAGES, QUESTIONS, strict=True))
    assert asked(loaded, pairs) == pytest.approx(asked(mine, pairs), abs=1e-9)
    assert LocalVLMJudge(str(tmp_path), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_memory_that_runs_out_is_no_score(judge, monkeypatch):
    judge.batch_size, next_token = 1, judge._next_token
    sizes = []

    def hungry(inputs):
        sizes.append(inputs["input_ids"].shape[1])
        if len(sizes) == 2:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB.")
        return next_token(inputs)

    monkeypatch.setattr(judge, "_next_token", hungry)
    scores = judge(["cat", "dog", "red"], images=IMAGES)
    assert [score is None for score in scores] == [False, True, False]
    assert "20 GiB. Lower max_side=768" in judge.last_error
    monkeypatch.setattr(judge, "_next_token", lambda inputs: torch.full((1, len(WORDS)), torch.nan))
    for _ in range(2):
        assert judge(["cat"], images=IMAGES[:1]) == [None]
    with pytest.raises(DeadRewardError, match=r"NaN in torch\.float64: try another dtype"):
        judge(["cat"], images=IMAGES[:1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"template": "Is it good?"}, "no place for a text"),
        ({"template": "{style}?"}, "expected the place {prompt} alone"),
        ({"question_template": "{question} {prompt}"}, "expected the place {question} alone"),
        ({"processor": None}, "processor is missing"),
    ],
)
def test_wrong_arguments_are_named(llava, arguments, message):
    with pytest.raises(ValueError, match=message.replace("{", r"\{").replace("?", r"\?")):
        LocalVLMJudge(llava[0], **{"processor": llava[1], **arguments})


def test_wrong_shapes_are_named(judge):
    with pytest.raises(ValueError, match=r"\(2, 3, 32, 32\) and 1 questions"):
        judge.differentiable(torch.zeros(2, 3, 32, 32), ["a"])
