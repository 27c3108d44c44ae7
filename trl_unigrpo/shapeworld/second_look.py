"""How well a model looks again at its images, and edits images, on prompts and instructions that it has never seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..flow import flow_timesteps
from ..flow.sampler import RolloutPlan
from ..models.contract import UnifiedModelMixin
from ..models.prompts import as_messages
from ..models.registry import unified_model
from ..models.tokenizer import never_sampled, prepare_tokenizer
from ..sampling import Sample, decode, paint, trim
from ..seeding import EVAL, row_generator
from ..statistics import FloatArray
from ..trajectory import Round, Trajectory
from .dataset import shapeworld_edit_dataset
from .edits import EditScores, draw_scene, parse_edit, score_edits
from .evaluate import EVALUATION_SEED, MAX_COMPLETION_LENGTH, NUM_INFERENCE_STEPS, Evaluation
from .grammar import parse_prompt
from .plan import parse_plan, plan_cells
from .reflection import REFLECTION_TEMPLATE, diagnosis_f1, parse_reflection
from .render import IMAGE_SIZE, render_images
from .second_corpus import DESCRIBE
from .verifier import images_to_array, read_cells, score
from .world import EMPTY, MAX_OBJECTS


_AT_ONCE = 210


@torch.no_grad()
def look_and_paint(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[str],
    images: Sequence[Image.Image],
    seed: int = EVALUATION_SEED,
    do_sample: bool = True,
) -> list[Sample]:
    """Show a model B images, each before its instruction; sample what it says, and the image that it paints then."""
    base, was_training = unified_model(model), model.training
    tokenizer = prepare_tokenizer(tokenizer, base.chat_template)
    plan = RolloutPlan(flow_timesteps(NUM_INFERENCE_STEPS, 3.0), (IMAGE_SIZE, IMAGE_SIZE))
    model.eval()
    samples: list[Sample] = []
    for start in range(0, len(instructions), _AT_ONCE):
        chunk = slice(start, start + _AT_ONCE)
        some = _look(base, tokenizer, instructions[chunk], images[chunk], seed + start, do_sample)
        painted = paint(base, some, plan, [row_generator(seed, EVAL, 1, start + t.row) for t in some])
        texts = tokenizer.batch_decode([t.text_ids for t in some], skip_special_tokens=True)
        latents = [image.latents for image in painted]
        samples += map(Sample, instructions[chunk], texts, decode(base, painted), latents)
    model.train(was_training)
    return samples


def _look(
    base: UnifiedModelMixin,
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[str],
    images: Sequence[Image.Image],
    seed: int,
    do_sample: bool,
) -> list[Trajectory]:
    """Sample what a model says to images and instructions."""
    assert base.image_placeholder is not None
    messages = [as_messages(instruction, None) for instruction in instructions]
    texts = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
    prompts = [[base.image_placeholder, *ids] for ids in texts]
    shown = [[image] for image in base.read_images(images)]
    ids = pad_sequence([torch.tensor(p) for p in prompts], batch_first=True, padding_side="left")
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out: Any = base.generate(
            ids.to(base.device),
            images=shown,
            attention_mask=(torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]).long().to(base.device),
            do_sample=do_sample,
            temperature=1.0 if do_sample else None,
            top_k=0 if do_sample else None,
            top_p=1.0 if do_sample else None,
            max_new_tokens=MAX_COMPLETION_LENGTH,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=never_sampled(base, tokenizer, [tokenizer.eos_token_id]),
        )
    said = [trim(row, tokenizer.eos_token_id) for row in out[:, ids.shape[1] :].tolist()]
    rows = enumerate(zip(messages, prompts, said, shown, strict=True))
    return [Trajectory(message, p, row, [Round(text)], images=image) for row, (message, p, text, image) in rows]


@dataclass
class SecondLook:
    """
    N images of a model, and what it made of them when it looked again.

    Attributes:
        said: what it said about its images.
        images: those that it has now; kept ones are as they were.
        first, reward: (N,) shares of the prompt's checks that hold before and after.
        first_strict, strict: (N,) 1 where all do.
        diagnosis: (N,) F1 of what it found.
        kept: (N,) 1 where it kept its image.
        harmed: (N,) share of the objects that it did not mean to change that changed; NaN where it kept the image.
    """

    said: list[str]
    images: list[Image.Image]
    first: FloatArray
    reward: FloatArray
    first_strict: FloatArray
    strict: FloatArray
    diagnosis: FloatArray
    kept: FloatArray
    harmed: FloatArray


def evaluate_second_look(
    model: Any, tokenizer: PreTrainedTokenizerBase, first: Evaluation, seed: int = EVALUATION_SEED
) -> SecondLook:
    """Have a model look again at the images that it painted, and repair or keep them."""
    asked = [REFLECTION_TEMPLATE.format(prompt=prompt) for prompt in first.prompts]
    samples = look_and_paint(model, tokenizer, asked, first.images, seed)
    looks = [parse_reflection(sample.thinking) for sample in samples]
    kept = np.array([look is not None and not look.fixes for look in looks])
    images = [old if keep else new.image for old, new, keep in zip(first.images, samples, kept, strict=True)]
    specs = [parse_prompt(prompt) for prompt in first.prompts]
    before, after = (read_cells(images_to_array(some))[0] for some in (first.images, images))
    old, new = score(specs, before), score(specs, after)
    harmed = np.full(len(specs), np.nan)
    for row, look in enumerate(looks):
        stays = before[row] > EMPTY
        if look is not None and look.fixes:
            stays[list(look.fixes)] = False
            harmed[row] = (before[row] != after[row])[stays].mean() if stays.any() else np.nan
    return SecondLook(
        said=[sample.thinking for sample in samples],
        images=images,
        first=old.score,
        reward=new.score,
        first_strict=old.strict,
        strict=new.strict,
        diagnosis=np.array(
            [diagnosis_f1(*row) for row in zip(specs, before, [s.thinking for s in samples], strict=True)]
        ),
        kept=kept.astype(float),
        harmed=harmed,
    )


def evaluate_edits(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    num_rows: int = 630,
    split: str = "test",
    seed: int = EVALUATION_SEED,
) -> EditScores:
    """Have a model edit drawings as instructions of a split say, and score the images."""
    dataset = shapeworld_edit_dataset(split, num_rows, seed)
    texts, sources = list(dataset["prompt"]), list(dataset["source_image"])
    samples = look_and_paint(model, tokenizer, texts, sources, seed)
    before, after = (read_cells(images_to_array(some))[0] for some in (sources, [s.image for s in samples]))
    return score_edits([parse_edit(text) for text in texts], before, after)


def reading_accuracy(
    model: Any, tokenizer: PreTrainedTokenizerBase, num_images: int = 630, seed: int = EVALUATION_SEED
) -> float:
    """Tell how well a model reads: the share of the objects of random drawings that it names, in their places."""
    rng = np.random.default_rng(seed)
    cells = np.stack([draw_scene(rng, 1, MAX_OBJECTS) for _ in range(num_images)])
    samples = look_and_paint(model, tokenizer, [DESCRIBE] * num_images, render_images(cells), seed, do_sample=False)
    said = np.stack([plan_cells(parse_plan(sample.thinking) or []) for sample in samples])
    return float((said == cells)[cells > EMPTY].mean())
