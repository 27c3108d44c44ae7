"""Think and paint with a unified model: what trainers, evaluation and the demo have in common."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from PIL import Image as PILImage
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..flow import flow_timesteps
from ..flow.guidance import Guidance, guided_velocity
from ..flow.sampler import RolloutPlan, draw_noise, sample_latents
from ..image_sizes import GivenSize, read_size, read_square
from ..images import alike_together, mark_failed, places_alike
from ..models.contract import UnifiedModelMixin
from ..models.memory import fitting_batches, in_fitting_batches
from ..models.prompts import as_messages, choose_system_prompt, system_ids
from ..models.registry import unified_model
from ..models.sources import (
    Sources,
    check_edits,
    place_sources,
    show_sources,
    shown_images,
    source_fault,
    with_sources,
)
from ..models.tokenizer import check_messages, never_sampled, prepare_tokenizer, read_tokenizer
from ..seeding import EVAL, rewound_on_error, row_generator
from ..trajectory import Image, Round, Trajectory


@dataclass
class Sample:
    """One prompt, the thinking about it, and the image that was painted from both."""

    prompt: Any
    thinking: str
    image: PILImage.Image
    latents: torch.Tensor


@dataclass(frozen=True)
class Thinking:
    """
    How thinkings are sampled.

    Attributes:
        thinking: False leaves them empty.
        do_sample: False is greedy.
        temperature: of the sampling.
        max_completion_length: most tokens.
    """

    thinking: bool = True
    do_sample: bool = True
    temperature: float = 1.0
    max_completion_length: int = 512


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    thinking: bool = True,
    do_sample: bool = True,
    temperature: float = 1.0,
    max_completion_length: int = 512,
    num_inference_steps: int = 50,
    timestep_shift: float = 3.0,
    image_size: GivenSize = 1024,
    guidance: Guidance | None = None,
    system_prompt: str = "auto",
    batch_size: int = 8,
    seed: int = 0,
    first_row: int = 0,
    source_images: Sequence[Any] | None = None,
) -> list[Sample]:
    """
    Sample one thinking and one image per prompt; the images by the ODE.

    Args:
        model: a unified model, adapted or not.
        prompts: strings or conversations.
        tokenizer: loaded from the model's folder if not given.
        thinking, do_sample, temperature, max_completion_length: see [`Thinking`].
        num_inference_steps, timestep_shift: how the image is sampled.
        image_size: in pixels, the side of a square, or height and width such as (384, 640) or "384x640".
        guidance: classifier-free guidance, as in `Guidance(guidance_scale=4.0)`; None for none, as in training.
        system_prompt: "auto" for the model's own, "" for none.
        batch_size: prompts at once.
        seed: of the thinkings and of each image's noise, which depends on the prompt's place in the list alone.
        first_row: place of the first prompt in a longer list. Cut into whole batches it gives the same samples.
        source_images: for each prompt the image that it edits, a PIL image or a path, or a list of them. The painted
            image is as the first of them is, with about image_size squared pixels: image_size is then a square.

    Raises:
        ValueError: for guidance by a thinking that there is not, and for source images that can't be read.
    """
    check_guidance(guidance, thinking)
    base = unified_model(model)
    given = checked_sources(base, prompts, source_images, image_size)
    tokenizer = tokenizer_of(model, tokenizer)
    how, size = Thinking(thinking, do_sample, temperature, max_completion_length), read_size(image_size)
    base.latent_shape(size)  # raises for a model or a size that can't be painted, before anything is sampled
    plan = RolloutPlan(flow_timesteps(num_inference_steps, timestep_shift), size, guidance=guidance)
    system = choose_system_prompt(base, system_prompt, thinking)
    messages = [as_messages(prompt, system) for prompt in prompts]
    samples, was_training = [], model.training
    model.eval()
    for start in range(0, len(prompts), batch_size):
        chunk, row = slice(start, start + batch_size), first_row + start
        sources = [show_sources(base, value, image_size) for value in given[chunk]]
        trajectories = think(model, tokenizer, messages[chunk], how, seed=seed + row, sources=sources)
        trajectories = trajectories if guidance is None else with_systems(trajectories, tokenizer)
        images = paint(base, trajectories, plan, [row_generator(seed, EVAL, 0, row + t.row) for t in trajectories])
        samples += _samples(prompts[chunk], trajectories, images, base, tokenizer)
    model.train(was_training)
    return samples


def tokenizer_of(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """Get a model's tokenizer ready: the one given, its own, or that of the folder it was loaded from."""
    base = unified_model(model)
    tokenizer = tokenizer or base.tokenizer or read_tokenizer(model.config.name_or_path)
    return prepare_tokenizer(tokenizer, base.chat_template)


def checked_sources(
    base: UnifiedModelMixin, prompts: Sequence[Any], given: Sequence[Any] | None, image_size: GivenSize
) -> Sequence[Any]:
    """Check all source images, and the size that is painted of them, before any is painted from."""
    if given is None:
        return []
    check_edits(base)
    read_square(image_size)
    if len(given) != len(prompts):
        raise ValueError(f"Got source_images for {len(given)} of {len(prompts)} prompts: pass some for each.")
    for place, value in enumerate(given):
        if (fault := source_fault(value)) is not None:
            raise ValueError(f"source_images[{place}] is {fault}.")
    return given


def check_guidance(guidance: Guidance | None, thinking: bool) -> None:
    """Raise ValueError for guidance by a thinking that there is not."""
    if guidance is not None and "image" in guidance.branches and not thinking:
        raise ValueError(
            f"image_guidance_scale={guidance.image_guidance_scale} pushes the image towards its thinking, but "
            "thinking=False leaves none. Set it to 1 and raise guidance_scale, or think."
        )


def with_systems(trajectories: Sequence[Trajectory], tokenizer: PreTrainedTokenizerBase) -> list[Trajectory]:
    """Say which tokens of each prompt are its system message's, as guidance needs to know."""
    systems = system_ids(tokenizer, [trajectory.prompt for trajectory in trajectories])
    return [replace(t, system_ids=ids) for t, ids in zip(trajectories, systems, strict=True)]


def _samples(
    prompts: Sequence[Any],
    trajectories: Sequence[Trajectory],
    images: Sequence[Image],
    base: UnifiedModelMixin,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Sample]:
    texts = tokenizer.batch_decode([t.text_ids for t in trajectories], skip_special_tokens=True)
    latents = [image.latents.cpu() for image in images]
    return [Sample(*row) for row in zip(prompts, texts, decode(base, images), latents, strict=True)]


@torch.no_grad()
def think(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[list[dict[str, Any]]],
    how: Thinking,
    seed: int = 0,
    sources: Sequence[Sources] = (),
) -> list[Trajectory]:
    """
    Sample one thinking for each of B conversations: trajectories of one round, without its image.

    Args:
        model: a unified model, adapted or not, in the mode that it is to be sampled in.
        tokenizer: as [`prepare_tokenizer`] returns it.
        messages: conversations, with their system prompts.
        how: how thinkings are sampled.
        seed: of the B thinkings together. The global random state stays as it is.
        sources: the B conversations' source images, or none.
    """
    base = unified_model(model)
    check_messages(messages, tokenizer)
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    ).to(base.device)
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    prompt_ids = [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]
    shown = shown_images(base, sources)
    if shown:
        prompt_ids = place_sources(base, tokenizer, messages, prompt_ids, sources)
        padded = tokenizer.pad({"input_ids": prompt_ids}, return_tensors="pt").to(base.device)
        ids, mask = padded["input_ids"], padded["attention_mask"]
    texts: list[list[int]] = [[] for _ in prompt_ids]
    if how.thinking:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                **text_settings(base, tokenizer, how),
                **shown,
            )
        texts = [trim(row, tokenizer.eos_token_id) for row in out[:, ids.shape[1] :].tolist()]
    rows = enumerate(zip(messages, prompt_ids, texts, strict=True))
    trajectories = [Trajectory(prompt, ids, row, [Round(text)]) for row, (prompt, ids, text) in rows]
    return with_sources(trajectories, sources)


def text_settings(model: UnifiedModelMixin, tokenizer: PreTrainedTokenizerBase, how: Thinking) -> dict[str, Any]:
    """Give the arguments of transformers' `generate` that sample texts in such a way."""
    return {
        "do_sample": how.do_sample,
        "temperature": how.temperature if how.do_sample else None,
        "top_k": 0 if how.do_sample else None,
        "top_p": 1.0 if how.do_sample else None,
        "max_new_tokens": how.max_completion_length,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "suppress_tokens": never_sampled(model, tokenizer, [tokenizer.eos_token_id]),
        "use_cache": True,
    }


@torch.no_grad()
def continue_texts(
    model: Any, trajectories: Sequence[Trajectory], how: GenerationConfig, pad: int, ends: Sequence[int]
) -> list[list[int]]:
    """
    Sample the text of each trajectory's last round, which has none yet.

    Args:
        model: a unified model with an `image_placeholder`, adapted or not, in the mode that it is to be sampled in.
        how: how texts are sampled.
        pad: token that fills up shorter prompts.
        ends: tokens that end a text.
    """
    seen = [trajectory.now() for trajectory in trajectories]
    prompts = [torch.tensor(t.prompt_ids) for t in seen]
    ids = pad_sequence(prompts, batch_first=True, padding_value=pad, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in prompts], batch_first=True, padding_side="left")
    device = unified_model(model).device
    out = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        images=[t.images for t in seen],
        generation_config=how,
    )
    return [trim(row, *ends) for row in out[:, ids.shape[1] :].tolist()]


def trim(ids: list[int], *ends: int) -> list[int]:
    """Keep the tokens up to the first of `ends`, which stays."""
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids)) + 1]


def paint(
    model: UnifiedModelMixin,
    trajectories: Sequence[Trajectory],
    plan: RolloutPlan,
    generators: Sequence[torch.Generator],
) -> list[Image]:
    """
    Paint the next image of each trajectory with the hybrid ODE/SDE sampler of the plan, and keep its SDE steps.

    The branches of guidance are further contexts, whose velocities are computed one after the other.

    Args:
        model: a unified model, out of any wrapper.
        trajectories: B of them; they stay as they are.
        plan: steps, windows, noise, guidance, and the size of images whose trajectory has none of its own.
        generators: B random generators; each draws all the noise of its own image, so that the result does not depend
            on how images are batched.
    """
    painted = dict(_by_place(paint_chunks(model, trajectories, plan, generators)))
    return [painted[place] for place in range(len(trajectories))]


def paint_and_decode(
    model: UnifiedModelMixin,
    trajectories: Sequence[Trajectory],
    plan: RolloutPlan,
    generators: Sequence[torch.Generator],
    show: Callable[[Sequence[Trajectory], Sequence[PILImage.Image]], None],
) -> tuple[list[Image], list[PILImage.Image]]:
    """
    Paint the next image of each trajectory as [`paint`] does, and decode it as soon as it is finished.

    Args:
        show: called with some trajectories and their decoded images, before others are painted.
    """
    chunks, seen = [], []
    for places, images in paint_chunks(model, trajectories, plan, generators):
        decoded = decode(model, images, plan.batch_size)
        show([trajectories[i] for i in places], decoded)
        chunks.append((places, images))
        seen.append((places, decoded))
    painted, shown = dict(_by_place(chunks)), dict(_by_place(seen))
    return [painted[i] for i in range(len(trajectories))], [shown[i] for i in range(len(trajectories))]


def _by_place(chunks: Iterable[tuple[Sequence[int], Sequence[Any]]]) -> Iterator[tuple[int, Any]]:
    return (pair for places, some in chunks for pair in zip(places, some, strict=True))


@torch.no_grad()
def paint_chunks(
    model: UnifiedModelMixin,
    trajectories: Sequence[Trajectory],
    plan: RolloutPlan,
    generators: Sequence[torch.Generator],
) -> Iterator[tuple[list[int], list[Image]]]:
    """
    Paint as [`paint`] does, and yield the places of some trajectories and their images whenever these are finished:
    as many as are painted at once, all of one size.
    """
    if len(generators) != len(trajectories):
        raise ValueError(f"Got {len(generators)} generators for {len(trajectories)} trajectories: pass one for each.")
    sizes = [t.size or plan.image_size for t in trajectories]
    for rows in places_alike(sizes):
        own, left = replace(plan.rows(rows), image_size=sizes[rows[0]]), iter(rows)
        for images in _paint_alike(model, [trajectories[i] for i in rows], own, [generators[i] for i in rows]):
            yield list(islice(left, len(images))), images


def _paint_alike(
    model: UnifiedModelMixin,
    trajectories: Sequence[Trajectory],
    plan: RolloutPlan,
    generators: Sequence[torch.Generator],
) -> Iterator[list[Image]]:
    """
    Paint images of one size, the plan's, and yield those that are painted at once. Where all before some of them is
    the same, it is one context that they have.
    """
    shape, size = model.latent_shape(plan.image_size), plan.image_size
    seen = [trajectory.now() for trajectory in trajectories]
    first: dict[Any, int] = {}
    same = [first.setdefault(_said(trajectory), place) for place, trajectory in enumerate(seen)]
    own = [seen[place] for place in first.values()]

    def shared(made: Sequence[Any]) -> list[Any]:
        at = dict(zip(first.values(), made, strict=True))
        return [at[place] for place in same]

    contexts = shared(model.contexts(own))
    names = plan.guidance.branches if plan.guidance is not None else ()
    branches = {name: shared(model.branch_contexts(own, name)) for name in names}

    def paint_some(chunk: slice) -> list[Image]:
        own, rows = generators[chunk], range(len(contexts[chunk]))
        with rewound_on_error(own):
            velocity = guided_velocity(
                model.velocity_after(contexts[chunk], size),
                {name: model.velocity_after(branch[chunk], size) for name, branch in branches.items()},
                plan.guidance,
            )
            start = model.initial_latents(size, own)
            start = draw_noise(shape, own, rows, model.device) if start is None else start.to(model.device)
            latents, steps = sample_latents(velocity, start, plan.rows(chunk), own)
        return [
            Image(
                latents=latents[i].clone(),  # a view would keep the whole batch
                size=size,
                context=contexts[chunk][i],
                steps=steps[i],
                guidance=plan.guidance,
                branches={name: branch[chunk][i] for name, branch in branches.items()},
            )
            for i in rows
        ]

    clear_device_cache()  # thinking leaves the allocator's reserve in pieces, too small for what is counted as free
    at_once = plan.batch_size or max(1, model.images_at_once(size) or len(contexts))
    yield from fitting_batches(model, len(contexts), at_once, paint_some)


def _said(trajectory: Trajectory) -> tuple[Any, ...]:
    """Give all that a trajectory's next image sees before it, as a key."""
    texts, images = [tuple(part.text_ids) for part in trajectory.rounds], map(id, trajectory.images)
    prompt = repr(trajectory.prompt), tuple(trajectory.prompt_ids), tuple(trajectory.system_ids or ())
    return *prompt, *texts, tuple(images)


def decode(model: UnifiedModelMixin, images: Sequence[Image], at_once: int | None = None) -> list[PILImage.Image]:
    """Decode finished images, so many at once; None for all of a size. Those that are not numbers are marked."""

    def decode_alike(rows: list[int]) -> list[PILImage.Image]:
        alike = [images[i] for i in rows]

        def decode_some(chunk: slice) -> list[PILImage.Image]:
            some = alike[chunk]
            decoded = decode_outside_autocast(model, torch.stack([image.latents for image in some]), some[0].size)
            return mark_failed(decoded, [bool(image.latents.isfinite().all()) for image in some])

        return in_fitting_batches(model, len(alike), at_once or len(alike), decode_some)

    return alike_together([image.size for image in images], decode_alike)


def decode_outside_autocast(
    model: UnifiedModelMixin, latents: torch.Tensor, image_size: tuple[int, int], output_type: str = "pil"
) -> Any:
    """
    Decode latents (B, *latent) in the precision of the VAE's own weights, under an autocast, too: training scores the
    image that evaluation shows.
    """
    with torch.autocast(latents.device.type, enabled=False):
        return model.decode_latents(latents, image_size, output_type)
