"""Understanding that falls in a run whose reward reads back: the likelihood of fixed captions of fixed images."""

import logging
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from PIL import Image
from transformers import PreTrainedTokenizerBase, TrainingArguments

from ..models.registry import unified_model
from ..sampling.self_reader import SelfReader
from .alarm import Alarm
from .best_read import best_read
from .evaluations import paired_change
from .events import Generation


logger = logging.getLogger(__name__)

CAPTIONS_FOLDER = "_understanding"
"""In the output folder, for the images; what begins with "_" is not pushed to the Hub."""
ENOUGH, MOST = 16, 32
"""Captions that a comparison takes, and that one generation gives at most."""
EVERY = 50
"""Optimizer steps from one reading to the next; there is one after the last step, too."""
FALLEN, ERRORS = 0.2, 4.0
"""Nats per token, each of which is then a fifth less likely; and standard errors of the captions' mean."""


MakeReader = Callable[[], SelfReader]


def policy_reader(model: Any, tokenizer: PreTrainedTokenizerBase, args: TrainingArguments) -> SelfReader:
    """
    Make a reader of the weights of the time, in the run's precision.

    Raises:
        ValueError: if the model can't read.
    """

    def autocast() -> AbstractContextManager[Any]:
        if not (args.bf16 or args.fp16):
            return nullcontext()
        return torch.autocast(args.device.type, torch.bfloat16 if args.bf16 else torch.float16)

    return SelfReader(unified_model(model), tokenizer, "policy", autocast)


@dataclass
class UnderstandingWatch:
    """
    The memory between two readings; all of it can be written as JSON.

    The images of the first generations and their prompts are the captions: of each prompt the image that it is read
    back from best. The first process reads, and tells the others.

    Attributes:
        captions: texts, one per image.
        before: log-prob per token of each when it was taken.
        checksums: of the images' files.
    """

    captions: list[str] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._images: list[Image.Image] = []
        self._off = False

    @property
    def complete(self) -> bool:
        """True where there are as many captions as a comparison takes."""
        return len(self.captions) >= ENOUGH

    def take(self, generation: Generation, folder: Path, make_reader: MakeReader) -> bool:
        """
        Take captions from a training generation, with their images, until there are enough; say whether there are now.
        All processes must call it.
        """
        chosen = {} if self._off or self.complete else best_read(generation, MOST)
        if not chosen:
            return False
        try:
            reader = make_reader()
        except ValueError as error:
            self._off = True
            if generation.first == 0:
                logger.warning("The alarm understanding/fallen is off: %s", error)
            return False
        images = generation.fetch([*chosen])
        own: list[tuple[str, float, int]] = []
        if generation.first == 0:
            folder.mkdir(parents=True, exist_ok=True)
            read = reader.read([images[place] for place in chosen], [*chosen.values()])
            for (place, caption), reading in zip(chosen.items(), read, strict=True):
                if reading is not None:
                    png = _png(images[place])
                    (folder / f"{len(self._images):02d}.png").write_bytes(png)
                    self._images.append(images[place])
                    own.append((caption, reading.score, zlib.crc32(png)))
        (taken,) = broadcast_object_list([own])
        for caption, log_prob, checksum in taken:
            self.captions.append(caption)
            self.before.append(log_prob)
            self.checksums.append(checksum)
        return self.complete

    def restore(self, folder: Path, first: bool) -> bool:
        """
        Read the images of a run that goes on, and say whether they are those of its start; all processes must call it.

        Args:
            first: whether this is the process that reads.
        """
        files = [folder / f"{number:02d}.png" for number in range(len(self.captions))] if first else []
        pngs = [file.read_bytes() if file.is_file() else b"" for file in files]
        (sound,) = broadcast_object_list([list(map(zlib.crc32, pngs)) == self.checksums])
        if sound:
            self._images = [Image.open(BytesIO(png)) for png in pngs]
        return bool(sound)

    def read(self, make_reader: MakeReader) -> list[float]:
        """Read the captions again: the log-prob per token of each; all processes must call it."""
        found = make_reader().read(self._images, self.captions) if self._images else []
        (log_probs,) = broadcast_object_list([[reading.score for reading in found if reading is not None]])
        return list(log_probs)

    def look(self, log_probs: Sequence[float]) -> list[Alarm]:
        """Hold a reading against the first one."""
        change = paired_change(self.before, log_probs)
        if change is None or change.before - change.now < FALLEN or change.errors > -ERRORS:
            return []
        drops = [now - before for before, now in zip(self.before, log_probs, strict=True)]
        message = (
            f"the model reads the captions of fixed images worse than at the start: {change.now:.3g} nats a token, "
            f"then {change.before:.3g}; worst of all “{self.captions[drops.index(min(drops))]}”. What it learns costs "
            "its understanding: raise beta and flow_regularizer_weight, lower learning_rate, or go on from an earlier "
            "checkpoint."
        )
        values = {"before": change.before, "now": change.now, "standard_errors": change.errors}
        return [Alarm("understanding/fallen", message, values)]


def _png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
