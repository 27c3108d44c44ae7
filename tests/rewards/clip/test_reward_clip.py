"""The CLIP family against the plain formulas, on tiny random models."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.helpers.tiny_perception import SIDE, TEXT_LENGTH, smooth_image, tiny_clip, tiny_siglip
from trl_unigrpo.rewards import (
    ClipReward,
    clip_score,
    pick_score,
    siglip_score,
)
from trl_unigrpo.rewards.clip.embedder import prepare_pixels
from trl_unigrpo.rewards.common import DeadRewardError


PROMPTS = ["a red cat", "two dogs and a tree", "fog", "a cat"]
SIZES = [(16, 16), (40, 40), (50, 23), (20, 31)]


@pytest.fixture(scope="module")
def some_images():
    return [smooth_image(i, *size) for i, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


@pytest.fixture(scope="module")
def siglip():
    return tiny_siglip()


def pixels_of(image: Image.Image) -> torch.Tensor:
    """(3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255


def clip_pixels(image: Image.Image) -> torch.Tensor:
    """CLIP's preparation, by PIL and numpy: shorter side to SIDE, centre, normalised; (3, SIDE, SIDE)."""
    short = min(image.size)
    image = image.resize((image.width * SIDE // short, image.height * SIDE // short), Image.Resampling.BICUBIC)
    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    return (pixels_of(image.crop((left, top, left + SIDE, top + SIDE))) - mean) / std


def siglip_pixels(image: Image.Image) -> torch.Tensor:
    return pixels_of(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) * 2 - 1


@torch.no_grad()
def logits(model, processor, prepare, images, prompts):
    """The model's own logit for each pair, by its forward."""
    ids = processor.tokenizer(prompts, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids
    out = model(input_ids=ids, pixel_values=torch.stack([prepare(image) for image in images]))
    return out.logits_per_image.diagonal()


def test_clip_scores_are_the_formulas(clip, some_images):
    model, processor = clip
    expected = logits(model, processor, clip_pixels, some_images, PROMPTS)
    cos = expected / model.logit_scale.exp()
    assert cos.min() < -0.01 < 0.01 < cos.max() and cos.std() > 0.02  # the cases differ, and one is below 0

    def scores(**options):
        return ClipReward(model, processor=processor, **options)(prompts=PROMPTS, images=some_images)

    assert scores() == pytest.approx(cos.tolist(), abs=1e-5)
    assert scores(scale=None) == pytest.approx(expected.tolist(), abs=1e-4)
    assert scores(scale=-3.0) == pytest.approx((-3 * cos).tolist(), abs=1e-5)
    assert scores(head="positive") == pytest.approx(cos.clamp(min=0).tolist(), abs=1e-5)


def test_siglip_scores_are_the_formulas(siglip, some_images):
    model, processor = siglip
    expected = logits(model, processor, siglip_pixels, some_images, PROMPTS)
    assert expected.std() > 0.01
    reward = ClipReward(model, "sigmoid", None, processor)
    assert reward(prompts=PROMPTS, images=some_images) == pytest.approx(expected.sigmoid().tolist(), abs=1e-5)
    cos = (expected - model.logit_bias) / model.logit_scale.exp()
    assert ClipReward(model, processor=processor)(prompts=PROMPTS, images=some_images) == pytest.approx(
        cos.tolist(), abs=1e-5
    )


def test_module_as_head_sees_the_normalised_image_embedding(clip, some_images):
    model, processor = clip
    weights = torch.randn(24, generator=torch.Generator().manual_seed(0))
    head = nn.Linear(24, 1)
    head.load_state_dict({"weight": weights[None], "bias": torch.tensor([0.5])})
    with torch.no_grad():
        embedded = model.get_image_features(torch.stack([clip_pixels(image) for image in some_images])).pooler_output
    expected = 2 * ((embedded @ weights) / embedded.norm(dim=1) + 0.5)
    found = ClipReward(model, head, 2.0, processor)(prompts=PROMPTS, images=some_images)
    assert found == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_batches_equal_singles(family, some_images, request):
    model, processor = request.getfixturevalue(family)
    whole = ClipReward(model, processor=processor, batch_size=8)(prompts=PROMPTS, images=some_images)
    for batch_size in (1, 3):
        reward = ClipReward(model, processor=processor, batch_size=batch_size)
        assert reward(prompts=PROMPTS, images=some_images) == pytest.approx(whole, abs=1e-5)
    reward = ClipReward(model, processor=processor)
    singles = [reward(prompts=[text], images=[image])[0] for text, image in zip(PROMPTS, some_images, strict=True)]
    assert singles == pytest.approx(whole, abs=1e-5)
    assert len({round(score, 4) for score in whole}) == 4
    assert reward(prompts=[], images=[]) == []


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("size", [(16, 16), (16, 24), (48, 64), (9, 7)])
def test_tensors_are_prepared_as_images_are(family, size, request):
    """But for the processor's rounding to 8 bits after each of its two passes."""
    _, processor = request.getfixturevalue(family)
    image = smooth_image(3, *size)
    expected = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    found = prepare_pixels(pixels_of(image)[None], processor.image_processor)
    assert found.shape == expected.shape == (1, 3, SIDE, SIDE)
    level = 1 / 255 / min(processor.image_processor.image_std)
    tolerance = 1e-5 if min(size) == SIDE and (family == "clip" or size == (SIDE, SIDE)) else 1.6 * level
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [(8, 8), (40, 40)])
def test_edges_do_not_overshoot(clip, size):
    """Bicubic interpolation leaves [0, 1] beside an edge between black and white; an image cannot."""
    edge = np.zeros((*size, 3), dtype=np.uint8)
    edge[:, size[1] // 2 + 1 :] = 255
    image, images = Image.fromarray(edge), clip[1].image_processor
    found = prepare_pixels(pixels_of(image)[None], images)
    expected = images(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1.6 / 255 / min(images.image_std))


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_differentiable_scores_are_the_scores(family, request):
    model, processor = request.getfixturevalue(family)
    heads = {"clip": ("positive", "cosine"), "siglip": ("sigmoid",)}[family]
    for head in heads:
        reward = ClipReward(model, head, None, processor)
        for size, tolerance in (((SIDE, SIDE), 1e-4), ((48, 40), 0.02)):
            images = [smooth_image(seed, *size) for seed in range(4)]
            found = reward.differentiable(torch.stack([pixels_of(image) for image in images]), PROMPTS)
            scores = reward(prompts=PROMPTS, images=images)
            assert found.tolist() == pytest.approx(scores, abs=tolerance * (1 + max(map(abs, scores))))


@pytest.mark.parametrize("family", ["clip", pytest.param("siglip", marks=pytest.mark.slow)])
def test_gradient_is_that_of_finite_differences(family, request):
    model, processor = request.getfixturevalue(family)
    head = "sigmoid" if family == "siglip" else "cosine"
    reward = ClipReward(model, head, None, processor, dtype=torch.float64)
    pixels = 0.3 + 0.4 * torch.rand(2, 3, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pixels.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reward.differentiable(x, PROMPTS[:2]), pixels, atol=1e-7)
    (gradient,) = torch.autograd.grad(reward.differentiable(pixels, PROMPTS[:2]).sum(), pixels)
    assert (gradient.abs().amax((1, 2, 3)) > 1e-4).all()
    model.float()


def test_scoring_builds_no_graph_and_weights_are_frozen(clip):
    reward = ClipReward(clip[0], processor=clip[1])
    assert not any(parameter.requires_grad for parameter in reward.embedder.model.parameters())
    images = [smooth_image(0, SIDE, SIDE)]
    assert reward.embedder.images(images).is_inference()
    assert reward.differentiable(pixels_of(images[0])[None].requires_grad_(), ["fog"]).requires_grad


def test_dtype_and_device(some_images):
    model, processor = tiny_clip()
    full = ClipReward(model, processor=processor)(prompts=PROMPTS, images=some_images)
    reward = ClipReward(model, processor=processor, dtype=torch.bfloat16, device="cpu")
    parameters = {(parameter.dtype, parameter.device.type) for parameter in reward.embedder.model.parameters()}
    assert parameters == {(torch.bfloat16, "cpu")}
    assert reward(prompts=PROMPTS, images=some_images) == pytest.approx(full, abs=0.03)
    assert reward.embedder.images(some_images).dtype == torch.float32


def test_long_prompt_is_cut_with_one_warning(clip, some_images):
    reward = ClipReward(clip[0], processor=clip[1])
    fits = "b" * (TEXT_LENGTH - 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short = reward(prompts=[f"{fits[:-1]}"], images=some_images[:1])
        full = reward(prompts=[" ".join(fits)], images=some_images[:1])
    with pytest.warns(UserWarning, match=f"A prompt of {TEXT_LENGTH + 3} tokens is longer than the {TEXT_LENGTH}"):
        cut = reward(prompts=[" ".join(fits + "xyz")], images=some_images[:1])
    assert cut == pytest.approx(full, abs=1e-6) and short != pytest.approx(full, abs=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward(prompts=[" ".join(fits + "xyz")], images=some_images[:1])


def test_constructors_load_folders_and_name_their_metric(clip, siglip, some_images, tmp_path):
    for (model, processor), name in ((clip, "clip"), (siglip, "siglip")):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    folder, other = str(tmp_path / "clip"), str(tmp_path / "siglip")
    expected = logits(*clip, clip_pixels, some_images, PROMPTS)
    cos = expected / clip[0].logit_scale.exp()
    call = {"prompts": PROMPTS, "images": some_images}
    assert clip_score(folder)(**call) == pytest.approx(cos.clamp(min=0).tolist(), abs=1e-5)
    assert pick_score(folder)(**call) == pytest.approx(expected.tolist(), abs=1e-4)
    assert pick_score(folder, scale=100 / 26)(**call) == pytest.approx((cos * 100 / 26).tolist(), abs=1e-4)
    expected = logits(*siglip, siglip_pixels, some_images, PROMPTS)
    assert siglip_score(other)(**call) == pytest.approx(expected.sigmoid().tolist(), abs=1e-5)
    assert [clip_score(folder).__name__, pick_score(folder, name="pick").__name__] == ["clip_score", "pick"]


def test_failing_model_costs_scores_not_the_run(some_images):
    """A weight of the wrong shape makes torch raise RuntimeError, as it does out of memory."""
    model, processor = tiny_clip()
    reward = ClipReward(model, processor=processor, max_dead_batches=2)
    model.visual_projection.weight = nn.Parameter(torch.zeros(5, 7))
    logged = {}
    assert reward(prompts=PROMPTS, images=some_images, log_metric=logged.__setitem__) == [None] * 4
    assert logged == {"ClipReward/failed": 1.0}
    with pytest.raises(DeadRewardError, match="2 batches in a row. Last error: RuntimeError"):
        reward(prompts=PROMPTS, images=some_images)


def test_not_a_number_is_no_score(some_images):
    model, processor = tiny_clip()
    model.visual_projection.weight.data.fill_(torch.nan)
    assert ClipReward(model, processor=processor)(prompts=PROMPTS, images=some_images) == [None] * 4


def test_wrong_use(clip, siglip, some_images):
    model, processor = clip
    with pytest.raises(ValueError, match="head='dot': expected 'cosine'"):
        ClipReward(model, "dot", processor=processor)
    with pytest.raises(ValueError, match="head='sigmoid' needs SigLIP's bias, which CLIPModel lacks"):
        ClipReward(model, "sigmoid", processor=processor)
    with pytest.raises(ValueError, match="without its processor"):
        ClipReward(model)
    with pytest.raises(ValueError, match="batch_size=0: expected at least 1"):
        ClipReward(model, processor=processor, batch_size=0)
    with pytest.raises(ValueError, match="CLIPVisionModel: expected a CLIP or SigLIP model"):
        ClipReward(model.vision_model, processor=processor)
    reward = ClipReward(model, processor=processor)
    with pytest.raises(ValueError, match="Got 1 images for 4 prompts"):
        reward(prompts=PROMPTS, images=some_images[:1])
    with pytest.raises(ValueError, match="Got 1 images for 2 prompts"):
        reward.differentiable(torch.zeros(1, 3, 8, 8), PROMPTS[:2])
    with pytest.raises(ValueError, match=r"shape \(1, 8, 8\), expected \(B, 3, H, W\)"):
        reward.differentiable(torch.zeros(1, 8, 8), PROMPTS[:1])


def test_processors_that_cannot_be_followed(clip):
    _, processor = tiny_clip()
    images = processor.image_processor
    images.resample = 1
    with pytest.raises(ValueError, match="resample=1: expected 2"):
        prepare_pixels(torch.zeros(1, 3, 8, 8), images)
    images.do_resize = False
    with pytest.raises(ValueError, match="8 x 8 pixels are smaller than the crop, 16 x 16"):
        prepare_pixels(torch.zeros(1, 3, 8, 8), images)
