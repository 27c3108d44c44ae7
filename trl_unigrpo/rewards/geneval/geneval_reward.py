"""GenEval as a reward: are the objects there, how many, where, in which colour? By a detector and CLIP."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation, PreTrainedModel

from ..clip.clip_reward import CLIP_L
from ..clip.embedder import ClipEmbedder
from ..common import (
    ImageReward,
    Scores,
    column,
    to_rgb,
)
from ..own_device import OwnDevice
from .rules import (
    GENEVAL_COLORS,
    THRESHOLD,
    Detection,
    confident_objects,
    partial_score,
    read_row,
    strict_score,
)


MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"
GENEVAL_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
"""Classes that GenEval calls otherwise than COCO."""
COLOR_TEMPLATES = (
    "a photo of a {color} {label}",
    "a photo of a {color}-colored {label}",
    "a photo of a {color} object",
)
"""GenEval's own words."""
BLANK = (0x99, 0x99, 0x99)

Detector = Callable[[Sequence[Image.Image]], list[list[Detection]]]
ColorNamer = Callable[[Image.Image, Sequence[Detection]], Sequence[str]]


class Mask2FormerDetector(OwnDevice):
    """
    A detector of objects and their masks by a Mask2Former of transformers.

    Args:
        model: id or folder of a Mask2Former for instances, or the model itself with its `processor`.
        processor: its image processor; loaded from `model` if that is an id or a folder.
        threshold: detections below it are not returned.
        device: its process' own GPU if there is one, by default.
        batch_size: images of one size at once.
    """

    def __init__(
        self,
        model: str | PreTrainedModel = MASK2FORMER,
        processor: Any = None,
        threshold: float = THRESHOLD,
        device: torch.device | str | None = None,
        batch_size: int = 8,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1.")
        if processor is None and not isinstance(model, str):
            raise ValueError(
                "Got a detector without its image processor: pass `processor`, or the model's id or folder."
            )
        if find_spec("scipy") is None:
            raise ImportError("transformers' Mask2Former needs scipy: pip install 'trl-unigrpo[eval]'.")
        self.processor = AutoImageProcessor.from_pretrained(model) if processor is None else processor
        loaded = Mask2FormerForUniversalSegmentation.from_pretrained(model) if isinstance(model, str) else model
        self.wanted_device = device
        self.model = loaded.eval().requires_grad_(False)
        self.threshold, self.batch_size = threshold, batch_size
        names = {int(index): name for index, name in self.model.config.id2label.items()}
        self.labels = {index: GENEVAL_NAMES.get(name, name) for index, name in names.items()}

    @property
    def classes(self) -> set[str]:
        return set(self.labels.values())

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        """Find each image's objects, boxes and masks in its own pixels."""
        by_size = defaultdict(list)  # images of several sizes would be padded, and their masks stretched with it
        for index, image in enumerate(images):
            by_size[image.size].append(index)
        found: list[list[Detection]] = [[] for _ in images]
        for indices in by_size.values():
            for start in range(0, len(indices), self.batch_size):
                chunk = indices[start : start + self.batch_size]
                for index, detections in zip(chunk, self._detect([images[i] for i in chunk]), strict=True):
                    found[index] = detections
        return found

    def _detect(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        inputs = self.processor([to_rgb(image) for image in images], return_tensors="pt").to(self.device)
        outputs = self.placed()(pixel_values=inputs["pixel_values"], pixel_mask=inputs.get("pixel_mask"))
        return self.detections(outputs, [(image.height, image.width) for image in images])

    def detections(self, outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[list[Detection]]:
        """Read the objects in the model's outputs for images of these heights and widths."""
        outputs.class_queries_logits = outputs.class_queries_logits.float().cpu()
        outputs.masks_queries_logits = outputs.masks_queries_logits.float().cpu()
        results = self.processor.post_process_instance_segmentation(
            outputs,
            threshold=self.threshold,
            target_sizes=list(sizes),
            return_binary_maps=True,
        )
        return [
            [
                Detection(self.labels[segment["label_id"]], segment["score"], box_of(mask), mask)
                for segment, mask in zip(result["segments_info"], as_masks(result["segmentation"]), strict=True)
            ]
            for result in results
        ]


def as_masks(segmentation: Tensor) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return masks (N, H, W) of bool; without any object transformers returns one empty map (H, W)."""
    maps = segmentation.cpu().numpy()
    return maps > 0 if maps.ndim == 3 else np.zeros((0, *maps.shape), dtype=bool)


def box_of(mask: np.ndarray[Any, np.dtype[np.bool_]]) -> tuple[float, float, float, float]:
    """Find left, top, right, bottom of a mask (H, W) in pixels, right and bottom exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def masked_crop(image: Image.Image, detection: Detection) -> Image.Image:
    """Cut an object out of its image along its box, on grey where its mask is not."""
    image = to_rgb(image)
    if detection.mask is not None:
        image = Image.composite(image, Image.new("RGB", image.size, BLANK), Image.fromarray(detection.mask))
    left, top, right, bottom = map(round, detection.box)
    return image.crop((left, top, right, bottom))


class ClipColors:
    """A namer of objects' colours: which of GenEval's ten is CLIP's nearest, by three templates' mean embedding."""

    def __init__(self, embedder: ClipEmbedder):
        self.embedder = embedder
        self._texts: dict[str, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, image: Image.Image, detections: Sequence[Detection]) -> list[str]:
        """Name the colour of each of these objects, all of one class."""
        if not detections:
            return []
        crops = self.embedder.images([masked_crop(image, detection) for detection in detections])
        return [GENEVAL_COLORS[i] for i in (crops @ self._color_texts(detections[0].label).T).argmax(1).tolist()]

    def _color_texts(self, label: str) -> Tensor:
        """Embed the ten colours of a class: (10, D)."""
        if label not in self._texts:
            texts = [
                template.format(color=color, label=label) for color in GENEVAL_COLORS for template in COLOR_TEMPLATES
            ]
            embedded = self.embedder.texts(texts).view(len(GENEVAL_COLORS), len(COLOR_TEMPLATES), -1)
            self._texts[label] = F.normalize(embedded.mean(1), dim=-1)
        return self._texts[label]


class GenEvalReward(ImageReward):
    """
    A reward by GenEval's rules on each image and its row.

    Args:
        metadata_column: column with GenEval's rows (see [`geneval_rules`]), as mappings or, since their positions have
            no type that a table could have, as JSON.
        credit: "strict" for [`strict_score`], "partial" for [`partial_score`].
        detector: id or folder of a Mask2Former, or a function from images to [`Detection`]s.
        colors: id or folder of a CLIP, or a function from an image and objects of one class to their colours.
        device: of the models; their process' own GPU if there is one, by default.
        batch_size: images, or objects, at once.
        name, max_dead_batches: see [`ImageReward`].

    A row that is not in GenEval's form, or asks for a class that the detector does not know, raises ValueError:
    [`check`] finds it before training.
    """

    def __init__(
        self,
        metadata_column: str = "geneval",
        credit: Literal["strict", "partial"] = "strict",
        detector: str | Detector = MASK2FORMER,
        colors: str | ColorNamer = CLIP_L,
        device: torch.device | str | None = None,
        batch_size: int = 8,
        name: str | None = None,
        max_dead_batches: int = 3,
    ):
        super().__init__(name, max_dead_batches)
        if credit not in ("strict", "partial"):
            raise ValueError(f"credit={credit!r}: expected 'strict' or 'partial'.")
        self.metadata_column = metadata_column
        self._score = strict_score if credit == "strict" else partial_score
        self.detector = (
            Mask2FormerDetector(detector, device=device, batch_size=batch_size)
            if isinstance(detector, str)
            else detector
        )
        self.colors = (
            ClipColors(ClipEmbedder(colors, device=device, batch_size=batch_size))
            if isinstance(colors, str)
            else colors
        )

    def check(self, dataset: Iterable[Mapping[str, Any]]) -> None:
        """Raise ValueError, with the row's number, if a row can't be checked. Once before training, not in it."""
        for number, row in enumerate(dataset):
            self._row(column(dict(row), self.metadata_column, self.__name__), f"row {number}")

    def _row(self, row: Any, where: str) -> dict[str, Any]:
        try:
            return read_row(row, getattr(self.detector, "classes", None))
        except ValueError as error:
            raise ValueError(f"{self.__name__}, {where}: {error}") from error

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str], columns: dict[str, Any]) -> Scores:
        given = column(columns, self.metadata_column, self.__name__)
        rows = [
            self._row(row, f"row {i} of a batch ({prompt!r})")
            for i, (row, prompt) in enumerate(zip(given, prompts, strict=True))
        ]
        scores: Scores = []
        for image, row, found in zip(images, rows, self.detector(images), strict=True):
            objects = confident_objects(found, row["tag"])
            scores.append(self._score(row, objects, partial(self.colors, image)))
        return scores
