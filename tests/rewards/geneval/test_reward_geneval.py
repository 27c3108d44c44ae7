"""GenEval's rules on detections made by hand, and the models that make detections."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput

from tests.helpers.tiny_perception import smooth_image, tiny_clip, tiny_mask2former
from trl_unigrpo.rewards import GenEvalReward
from trl_unigrpo.rewards.clip.embedder import ClipEmbedder
from trl_unigrpo.rewards.geneval.geneval_reward import (
    ClipColors,
    Mask2FormerDetector,
    box_of,
    masked_crop,
)
from trl_unigrpo.rewards.geneval.rules import (
    GENEVAL_COLORS,
    Detection,
    confident_objects,
    partial_score,
    read_row,
    relations,
    strict_score,
)


# Boxes of 10 x 10 pixels on a canvas of 100 x 100; margins of 0.1 (10 + 10) = 2 pixels on each axis.
LEFT, RIGHT, BELOW_LEFT = (0, 0, 10, 10), (80, 0, 90, 10), (0, 80, 10, 90)


def seen(label: str, box=LEFT, score: float = 0.95, color: str = "red") -> Detection:
    """A detection whose colour is written in its mask, for `named_colors` to read."""
    return Detection(label, score, box, np.full((1, 1), GENEVAL_COLORS.index(color)))


def named_colors(detections):
    return [GENEVAL_COLORS[int(detection.mask.item())] for detection in detections]


def clause(label, count=1, **more):
    return {"class": label, "count": count, **more}


DOG, CAT = clause("dog"), clause("cat")
RED_DOG = clause("dog", color="red")
CAT_RIGHT_OF_DOG = clause("cat", position=["right of", 0])
NO_SECOND_DOG = [clause("dog", 2)]

RULES = [
    # include, exclude, detections, strict, partial
    ([DOG], [], [seen("dog")], 1, 1),
    ([DOG], [], [], 0, 0),
    ([DOG], [], [seen("cat")], 0, 0),
    ([DOG], [], [seen("dog"), seen("dog")], 1, 0),  # a second one is no fault by the official rule
    ([DOG], NO_SECOND_DOG, [seen("dog"), seen("dog")], 0, 0),
    ([DOG], [clause("cat")], [seen("dog"), seen("cat")], 0, 1),
    ([DOG], [], [seen("dog")] * 4, 1, -2),
    ([DOG, CAT], [], [seen("dog"), seen("cat")], 1, 1),
    ([DOG, CAT], [], [seen("dog")], 0, 1 / 2),
    ([clause("dog", 3)], [], [seen("dog")] * 3, 1, 1),
    ([clause("dog", 3)], [], [seen("dog")] * 2, 0, 2 / 3),
    ([clause("dog", 3)], [], [seen("dog")] * 4, 1, 2 / 3),
    ([RED_DOG], [], [seen("dog")], 1, 1),
    ([RED_DOG], [], [seen("dog", color="blue")], 0, 1 / 2),
    ([RED_DOG], [], [], 0, 0),
    ([RED_DOG], [], [seen("dog", score=0.9), seen("dog", color="blue")], 0, 0),  # the surest is looked at
    ([RED_DOG], [], [seen("dog"), seen("dog", color="blue", score=0.9)], 1, 0),
    ([clause("dog", 2, color="red")], [], [seen("dog"), seen("dog", color="blue")], 0, 3 / 4),
    ([RED_DOG, clause("cat", color="blue")], [], [seen("dog"), seen("cat")], 0, 3 / 4),
    ([DOG, CAT_RIGHT_OF_DOG], [], [seen("dog"), seen("cat", RIGHT)], 1, 1),
    ([DOG, CAT_RIGHT_OF_DOG], [], [seen("dog", RIGHT), seen("cat")], 0, 2 / 3),
    ([DOG, CAT_RIGHT_OF_DOG], [], [seen("dog"), seen("cat", BELOW_LEFT)], 0, 2 / 3),
    ([DOG, CAT_RIGHT_OF_DOG], [], [seen("cat", RIGHT)], 0, 1 / 3),  # relative to nothing
    ([DOG, CAT_RIGHT_OF_DOG], [], [seen("dog")], 0, 1 / 3),
    # Each of two cats must lie right of the dog.
    ([DOG, clause("cat", 2, position=["right of", 0])], [], [seen("dog"), seen("cat", RIGHT), seen("cat")], 0, 2 / 3),
    # The target is there, in the wrong colour.
    ([RED_DOG, CAT_RIGHT_OF_DOG], [], [seen("dog", color="blue"), seen("cat", RIGHT)], 0, 2 / 4),
    ([RED_DOG, CAT_RIGHT_OF_DOG], [], [seen("dog"), seen("cat", RIGHT)], 1, 1),
]


@pytest.mark.parametrize(("include", "exclude", "detections", "strict", "partial"), RULES)
def test_rules_by_hand(include, exclude, detections, strict, partial):
    row = read_row({"tag": "x", "include": include, "exclude": exclude})
    objects = confident_objects(detections, "x")
    assert strict_score(row, objects, named_colors) == strict
    assert partial_score(row, objects, named_colors) == pytest.approx(partial)


def test_rewards_pair_images_with_rows():
    """The whole reward, with detections made by hand: rows as mappings and, as tables need them, as JSON."""
    images = [Image.new("RGB", (100, 100))] * len(RULES)
    found = [detections for _, _, detections, _, _ in RULES]
    rows = [{"tag": "x", "include": include, "exclude": exclude} for include, exclude, _, _, _ in RULES]
    for credit, column in (("strict", 3), ("partial", 4)):
        reward = GenEvalReward(
            credit=credit, detector=lambda images: found, colors=lambda image, chosen: named_colors(chosen)
        )
        call = {"prompts": ["a"] * len(RULES), "images": images}
        assert reward(**call, geneval=rows) == pytest.approx([rule[column] for rule in RULES])
        assert reward(**call, geneval=[json.dumps(row) for row in rows]) == reward(**call, geneval=rows)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((20, 0, 30, 10), {"right of"}),
        ((-20, 0, -10, 10), {"left of"}),
        ((0, 20, 10, 30), {"below"}),
        ((0, -20, 10, -10), {"above"}),
        ((20, 20, 30, 30), {"right of", "below"}),  # (20 - 2) / 28.3 = 0.64 on both axes
        ((0, 0, 10, 10), set()),
        ((2, 0, 12, 10), set()),  # an offset of 2 is within the margin
        ((4, 0, 14, 10), set()),  # (4 - 2) / 4 is not above 0.5
        ((4.1, 0, 14.1, 10), {"right of"}),
        ((20, 6, 30, 16), {"right of"}),  # (6 - 2) / 20.9 = 0.19
        ((0, 0, 50, 10), {"right of"}),  # an offset of 20, a margin of 0.1 (50 + 10)
        ((-15, 0, 45, 10), set()),  # an offset of 10, a margin of 0.1 (60 + 10): 3 / 10
    ],
)
def test_relations_seen_from_a_box_of_ten(box, expected):
    assert relations(box, LEFT) == expected


def test_thresholds_order_and_limit():
    dogs = [seen("dog", score=score) for score in (0.3, 0.31, 0.95, 0.9, 0.91)]
    assert [dog.score for dog in confident_objects(dogs)["dog"]] == [0.95, 0.91, 0.9, 0.31]
    assert [dog.score for dog in confident_objects(dogs, "counting")["dog"]] == [0.95, 0.91]
    many = [seen("dog", score=0.5 + i / 100) for i in range(20)] + [seen("cat", score=0.4)]
    objects = confident_objects(many)
    assert [round(dog.score, 2) for dog in objects["dog"]] == [round(0.69 - i / 100, 2) for i in range(16)]
    assert len(objects["cat"]) == 1
    assert confident_objects([seen("dog", score=0.2)]) == {}


def test_counting_row_uses_the_high_threshold():
    reward = GenEvalReward(detector=lambda images: [[seen("dog", score=0.8)]], colors=named_colors)
    call = {"prompts": ["a"], "images": [Image.new("RGB", (100, 100))]}
    assert reward(**call, geneval=[{"tag": "single_object", "include": [DOG]}]) == [1.0]
    assert reward(**call, geneval=[{"tag": "counting", "include": [DOG]}]) == [0.0]


def test_absent_and_none_are_the_same():
    """A table of mappings has every key in every row."""
    row = {"tag": None, "include": [{**DOG, "color": None, "position": None}], "exclude": None}
    assert read_row(row) == read_row({"include": [DOG]}) == {"tag": None, "include": [DOG], "exclude": []}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"include": []}, "expected at least one clause in 'include'"),
        ([DOG], "expected a mapping with 'include'"),
        ('{"include": [', r"GenEval row '{\"include\": \[' is no JSON"),
        ({"include": DOG}, "a list of clauses in 'include'"),
        ({"include": {"class": ["dog"], "count": [1]}}, "a list of clauses in 'include'"),
        ({"include": ["dog"]}, "a list of clauses in 'include'"),
        ({"include": 3}, "a list of clauses in 'include'"),
        ({"include": [DOG], "exclude": CAT}, "a list of clauses in 'exclude'"),
        ({"include": [clause(["dog"])]}, "expected a 'class', the name of an object"),
        ({"include": [{"count": 1}]}, "expected a 'class', the name of an object"),
        ({"include": [clause("dog", "1")]}, "expected a 'count' of at least 1, a whole number"),
        ({"include": [clause("dog", True)]}, "expected a 'count' of at least 1, a whole number"),
        ({"include": [DOG, clause("cat", position=["left of", "0"])]}, r"\['left of', '0'\].*store such rows as JSON"),
        ({"include": [DOG, clause("cat", position="left of")]}, "'position': 'left of'.*counted from 0, as in"),
        ({"include": [DOG, clause("cat", position=["left of"])]}, "counted from 0, as in"),
        ({"include": [DOG, clause("cat", position=["left of", -1])]}, "counted from 0, as in"),
        ({"include": [DOG, clause("cat", position=["left of", False])]}, "counted from 0, as in"),
        ({"include": [DOG, clause("cat", position=[["left of"], 0])]}, "counted from 0, as in"),
        ({"include": [{"class": "dog"}]}, "expected a 'count' of at least 1"),
        ({"include": [clause("dog", 0)]}, "expected a 'count' of at least 1"),
        ({"include": [clause("unicorn")]}, "'unicorn'.*the detector knows no such 'class'. It knows: cat, dog"),
        ({"include": [DOG], "exclude": [clause("unicorn")]}, "the detector knows no such 'class'"),
        ({"include": [clause("dog", color="mauve")]}, "'mauve'.*expected a 'color' of red, orange"),
        ({"include": [DOG, clause("cat", position=["near", 0])]}, "expected a 'position' of one of left of"),
        ({"include": [DOG, clause("cat", position=["above", 1])]}, "relative to an earlier clause"),
    ],
)
def test_rows_that_cannot_be_checked(row, message):
    with pytest.raises(ValueError, match=message):
        read_row(row, {"dog", "cat"})


def test_row_that_cannot_be_checked_is_named():
    reward = GenEvalReward(detector=lambda images: [[]] * len(images), colors=named_colors)
    rows = [{"prompt": "a", "geneval": {"include": [DOG]}}, {"prompt": "b", "geneval": '{"include": ['}]
    with pytest.raises(ValueError, match="GenEvalReward, row 1: GenEval row .* is no JSON"):
        reward.check(rows)
    reward.check(rows[:1])
    with pytest.raises(ValueError, match="GenEvalReward, row 1 of a batch .'b'.: GenEval row .* is no JSON"):
        reward(prompts=["a", "b"], images=[Image.new("RGB", (8, 8))] * 2, geneval=[row["geneval"] for row in rows])


def test_wrong_use():
    with pytest.raises(ValueError, match="credit='soft': expected 'strict' or 'partial'"):
        GenEvalReward(credit="soft", detector=lambda images: [], colors=named_colors)
    reward = GenEvalReward(detector=lambda images: [[]], colors=named_colors)
    with pytest.raises(ValueError, match=r"GenEvalReward reads the column 'geneval', .*\(it has: target"):
        reward(prompts=["a"], images=[Image.new("RGB", (8, 8))], target=["x"])
    with pytest.raises(ValueError, match="detector without its image processor"):
        Mask2FormerDetector(tiny_mask2former()[0])


def outputs_of(masks: list[np.ndarray], labels: list[int], sure: float = 8.0, queries: int = 6):
    """Give Mask2Former's outputs for masks (h, w) of bool, classes out of 3; the other queries are empty."""
    class_logits = torch.zeros(1, queries, 4)
    class_logits[..., 3] = 12.0
    mask_logits = torch.full((1, queries, *masks[0].shape), -9.0)
    for query, (mask, label) in enumerate(zip(masks, labels, strict=True)):
        class_logits[0, query] = torch.tensor([sure * (label == i) for i in range(3)] + [0.0])
        mask_logits[0, query][torch.from_numpy(mask)] = 9.0
    return Mask2FormerForUniversalSegmentationOutput(
        class_queries_logits=class_logits, masks_queries_logits=mask_logits
    )


def test_detections_are_in_the_images_pixels():
    """A model's masks of 16 x 16 for an image of 320 pixels in width and 160 in height: 20 and 10 pixels each."""
    detector = Mask2FormerDetector(*tiny_mask2former(), device="cpu")
    upper_right, stripe = np.zeros((16, 16), dtype=bool), np.zeros((16, 16), dtype=bool)
    upper_right[:4, 8:], stripe[6:10, 2:6] = True, True
    (found,) = detector.detections(outputs_of([upper_right, stripe], [0, 1]), [(160, 320)])
    objects = {detection.label: detection for detection in found}
    assert set(objects) == {"dog", "computer mouse"}  # GenEval's name for COCO's mouse
    for label, box in (("dog", (160, 0, 320, 40)), ("computer mouse", (40, 60, 120, 100))):
        detection = objects[label]
        assert detection.mask.shape == (160, 320)
        assert np.abs(np.subtract(detection.box, box)).max() <= 1  # transformers makes masks of 384 x 384 first
        left, top, right, bottom = (round(side) for side in detection.box)
        assert detection.mask[top:bottom, left:right].mean() > 0.96  # bilinear interpolation rounds corners
        # softmax of (8, 0, 0, 0), times the mean of the mask's sigmoid(9), which falls off at its edges
        assert 0.9 < detection.score <= np.exp(8) / (np.exp(8) + 3) / (1 + np.exp(-9)) + 1e-6
    assert detector.detections(outputs_of([stripe], [1], sure=0.0), [(160, 320)]) == [[]]


def test_tiny_mask2former_finds_the_same_alone_and_in_a_batch():
    model, processor = tiny_mask2former()
    detector = Mask2FormerDetector(model, processor, threshold=0.05, device="cpu", batch_size=2)
    images = [smooth_image(i, *size) for i, size in enumerate([(64, 64), (90, 64), (64, 64), (64, 64), (70, 120)])]
    found = detector(images)
    assert sum(map(len, found)) > 5
    for image, detections in zip(images, found, strict=True):
        (alone,) = detector([image])
        assert [detection.label for detection in alone] == [detection.label for detection in detections]
        for one, other in zip(alone, detections, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-4) and 0.05 <= one.score <= 1
            assert one.mask.shape == (image.height, image.width)
            assert one.box == box_of(one.mask)
            assert (one.mask != other.mask).mean() < 0.01


def test_box_of_a_mask():
    mask = np.zeros((6, 9), dtype=bool)
    mask[2, 3] = mask[4, 7] = True
    assert box_of(mask) == (3, 2, 8, 5)


def test_crop_is_grey_outside_of_the_mask():
    image = Image.new("RGB", (6, 4), "red")
    mask = np.zeros((4, 6), dtype=bool)
    mask[1, 2:4] = mask[2, 2] = True
    crop = np.asarray(masked_crop(image, Detection("dog", 1.0, box_of(mask), mask)))
    red, grey = [255, 0, 0], [153, 153, 153]
    assert crop.tolist() == [[red, red], [red, grey]]
    whole = masked_crop(image, Detection("dog", 1.0, (1, 1, 3, 2)))
    assert whole.size == (2, 1) and np.asarray(whole).tolist() == [[red, red]]


def test_colors_are_clips_nearest_by_the_mean_of_three_templates():
    model, processor = tiny_clip()
    colors = ClipColors(ClipEmbedder(model, processor, device="cpu", batch_size=4))
    image = smooth_image(0, 60, 40)
    boxes = [(0, 0, 20, 40), (20, 0, 60, 20), (10, 10, 30, 30), (40, 20, 60, 40)]
    found = colors(image, [Detection("dog", 1.0, box) for box in boxes])
    with torch.no_grad():
        pixels = processor.image_processor([image.crop(box) for box in boxes], return_tensors="pt")["pixel_values"]
        crops = model.get_image_features(pixels).pooler_output
        texts = []
        for color in GENEVAL_COLORS:
            prompts = [
                f"a photo of a {color} dog",
                f"a photo of a {color}-colored dog",
                f"a photo of a {color} object",
            ]
            ids = processor.tokenizer(
                prompts, padding="max_length", truncation=True, max_length=24, return_tensors="pt"
            ).input_ids
            embedded = model.get_text_features(ids).pooler_output
            mean = (embedded / embedded.norm(dim=1, keepdim=True)).mean(0)
            texts.append(mean / mean.norm())
    expected = (crops @ torch.stack(texts).T).argmax(1)
    assert found == [GENEVAL_COLORS[i] for i in expected]
    assert colors(image, []) == []


def test_models_from_folders_score_as_their_parts(tmp_path):
    detector_model, processor = tiny_mask2former()
    clip, clip_processor = tiny_clip()
    for part, name in ((detector_model, "d"), (processor, "d"), (clip, "c"), (clip_processor, "c")):
        part.save_pretrained(tmp_path / name)
    reward = GenEvalReward(
        credit="partial", detector=str(tmp_path / "d"), colors=str(tmp_path / "c"), device="cpu", batch_size=2
    )
    reward.detector.threshold = 0.0
    images = [smooth_image(i, 64, 64) for i in range(3)]
    row = {"tag": "colors", "include": [clause("dog", 2, color="red"), clause("computer mouse")]}
    scores = reward(prompts=["a"] * 3, images=images, geneval=[row] * 3)
    colors = ClipColors(ClipEmbedder(clip, clip_processor, device="cpu"))
    for image, score in zip(images, scores, strict=True):
        objects = confident_objects(Mask2FormerDetector(detector_model, processor, device="cpu")([image])[0], "colors")
        assert score == pytest.approx(partial_score(row, objects, lambda chosen, image=image: colors(image, chosen)))
    with pytest.raises(ValueError, match="'unicorn'.*It knows: computer mouse, dog, person"):
        reward(prompts=["a"], images=images[:1], geneval=[{"include": [clause("unicorn")]}])
