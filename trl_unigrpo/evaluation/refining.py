"""Several rounds at inference: an image, a look at it in words, another image; and which of them is the best."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image as PILImage
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..flow import flow_timesteps
from ..flow.guidance import Guidance
from ..flow.sampler import RolloutPlan
from ..image_sizes import GivenSize, read_size
from ..images import has_failed
from ..messages import user_text
from ..models.contract import UnifiedModelMixin
from ..models.prompts import as_messages, choose_system_prompt
from ..models.registry import unified_model
from ..models.sources import Sources, show_sources
from ..rewards.common import finite
from ..sampling.generation import (
    Thinking,
    check_guidance,
    checked_sources,
    continue_texts,
    decode,
    paint,
    text_settings,
    think,
    tokenizer_of,
    with_systems,
)
from ..sampling.reflection import TEMPLATE, check_template, reflection
from ..sampling.rounds import begin_round, check_sight, image_stream, show_images, take_texts, user_turn
from ..seeding import EVAL, THINK, row_generator
from ..trajectory import Trajectory
from .scorers import called


@dataclass(frozen=True)
class Look:
    """
    How a model looks again at its image; the names are those of [`UniGRPOConfig`].

    Attributes:
        reflection_template: what is said to it, with fields `{prompt}`, `{round}` and `{or_stop}`.
        stop_text: the answer that keeps the image; None where every round paints.
        max_reflection_length: most tokens of what it says.
        round_context: "markov", it sees the system message and the image alone, or "full", all that came before.
        context_latents: "reencode", it sees the image as the user does, or "direct", as it was painted.
    """

    reflection_template: str = TEMPLATE
    stop_text: str | None = "keep"
    max_reflection_length: int = 256
    round_context: str = "markov"
    context_latents: str = "reencode"


@dataclass
class Refinement:
    """
    The rounds of one prompt: texts, images and scores.

    Attributes:
        prompt: as it was given.
        texts: of each round that it had.
        images: that stood after each of them: one that was kept is there again.
        scores: of these images by the judge, None where there is none.
        stopped: whether its last text kept the image.
        best: number of the round whose image is the best, from 0.
    """

    prompt: Any
    texts: list[str] = field(default_factory=list)
    images: list[PILImage.Image] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)
    stopped: bool = False

    @property
    def best(self) -> int:
        known = [(score, -number) for number, score in enumerate(self.scores) if score is not None]
        return -max(known)[1] if known else len(self.images) - 1

    @property
    def image(self) -> PILImage.Image:
        """The best image: the judge's choice, or without one the last."""
        return self.images[self.best]


@torch.no_grad()
def refine(
    model: Any,
    prompts: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    rounds: int = 2,
    judge: Callable[..., Any] | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
    look: Look | None = None,
    thinking: Thinking | None = None,
    num_inference_steps: int = 50,
    timestep_shift: float = 3.0,
    image_size: GivenSize = 1024,
    guidance: Guidance | None = None,
    system_prompt: str = "auto",
    batch_size: int = 8,
    seed: int = 0,
    source_images: Sequence[Any] | None = None,
) -> list[Refinement]:
    """
    Paint an image for each prompt, have the model look at it and say what is wrong, and paint again.

    Args:
        rounds: images of a prompt, at most: the model may keep one.
        judge: any reward function, which picks the best image. Without one it is the last: what the model kept, or
            painted instead of one that it did not.
        columns: further arguments of the judge by name, one entry a prompt.
        look: how the model looks again.
        thinking: how its texts are sampled.
        model, prompts, tokenizer, and all others: see [`~trl_unigrpo.sampling.generate`], which makes the same first
            images.

    Raises:
        ValueError: for a model that can't be shown an image, and for what `generate` can't do.
    """
    look, thinking, base = look or Look(), thinking or Thinking(), unified_model(model)
    if rounds < 1 or not thinking.thinking:
        raise ValueError(
            f"rounds={rounds}, thinking={thinking.thinking}: expected one or more, of a model that thinks."
        )
    check_template(look.reflection_template)
    check_sight(base, rounds)
    check_guidance(guidance, thinking.thinking)
    given = checked_sources(base, prompts, source_images, image_size)
    base.latent_shape(size := read_size(image_size))  # raises before anything is sampled
    plan = RolloutPlan(flow_timesteps(num_inference_steps, timestep_shift), size, guidance=guidance)
    refiner = _Refiner(model, tokenizer_of(model, tokenizer), plan, look, thinking, judge, seed)
    system = choose_system_prompt(base, system_prompt, thinking.thinking)
    found, was_training = [], model.training
    model.eval()
    for start in range(0, len(prompts), batch_size):
        chunk = slice(start, start + batch_size)
        sources = [show_sources(base, value, image_size) for value in given[chunk]]
        some = {name: list(values)[chunk] for name, values in (columns or {}).items()}
        messages = [as_messages(prompt, system) for prompt in prompts[chunk]]
        found += refiner.refined(prompts[chunk], messages, sources, some, start, rounds)
    model.train(was_training)
    return found


@dataclass
class _Refiner:
    """Settings of the rounds of some prompts: see [`refine`]."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    plan: RolloutPlan
    look: Look
    thinking: Thinking
    judge: Callable[..., Any] | None
    seed: int

    @property
    def base(self) -> UnifiedModelMixin:
        return unified_model(self.model)

    def refined(
        self,
        prompts: Sequence[Any],
        messages: Sequence[Any],
        sources: Sequence[Sources],
        columns: Mapping[str, Sequence[Any]],
        first: int,
        rounds: int,
    ) -> list[Refinement]:
        """Make the rounds of some prompts, the first of which is in this place among all."""
        if sources:
            columns = {**columns, "source_images": [one.originals for one in sources]}
        found = [Refinement(prompt) for prompt in prompts]
        trajectories = think(self.model, self.tokenizer, messages, self.thinking, self.seed + first, sources)
        trajectories = [replace(t, row=first + t.row) for t in with_systems(trajectories, self.tokenizer)]
        for number in range(rounds):
            going = [i for i, one in enumerate(found) if not (one.stopped or (number and has_failed(one.images[-1])))]
            if not going:
                break
            if number:
                self._look_again([(trajectories[i], found[i].images[-1]) for i in going], first, number)
            new = [i for i in going if not trajectories[i].rounds[-1].stopped]
            painted = dict(zip(new, self._painted([trajectories[i] for i in new]), strict=True))
            texts = dict(zip(going, self._decoded([trajectories[i] for i in going]), strict=True))
            scores = self._scores(painted, texts, found, columns)
            for i in going:
                found[i].texts.append(texts[i])
                found[i].images.append(painted[i] if i in painted else found[i].images[-1])
                found[i].scores.append(scores[i] if i in painted else found[i].scores[-1])
                found[i].stopped = i not in painted
        return found

    def _look_again(self, shown: Sequence[tuple[Trajectory, PILImage.Image]], first: int, number: int) -> None:
        """Begin a round of trajectories, each with its last image, and sample its text."""
        if not shown:
            return
        trajectories, seen = (list(part) for part in zip(*shown, strict=True))
        images = [t.rounds[-1].images[-1] for t in trajectories]
        placeholder, look, ends = self.base.image_placeholder, self.look, (self.tokenizer.eos_token_id,)
        assert placeholder is not None  # `check_sight`
        observed = show_images(self.base, images, seen, look.context_latents == "reencode")
        for t, image in zip(trajectories, observed, strict=True):
            asked = reflection(look.reflection_template, user_text(t.prompt), number + 1, look.stop_text)
            said = user_turn(self.tokenizer, asked)
            begin_round(t, placeholder, image, said, () if look.round_context == "markov" else ends)
        how = replace(self.thinking, max_completion_length=look.max_reflection_length)
        config = copy.copy(self.base.generation_config or GenerationConfig())
        config.update(**text_settings(self.base, self.tokenizer, how))
        with torch.random.fork_rng():
            torch.manual_seed(row_generator(self.seed, THINK, first, number).initial_seed())
            ids = continue_texts(self.model, trajectories, config, self.tokenizer.pad_token_id, ends)
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        take_texts(trajectories, ids, texts, look.stop_text, ends)

    def _painted(self, trajectories: Sequence[Trajectory]) -> list[PILImage.Image]:
        """Paint the next image of each trajectory, with the noise that the trainer's evaluation has."""
        if not trajectories:
            return []
        generators = [row_generator(*image_stream(t, self.seed, EVAL, 0)) for t in trajectories]
        images = paint(self.base, trajectories, self.plan, generators)
        for t, image in zip(trajectories, images, strict=True):
            t.rounds[-1].images.append(image)
        return decode(self.base, images)

    def _decoded(self, trajectories: Sequence[Trajectory]) -> list[str]:
        return self.tokenizer.batch_decode([t.rounds[-1].text_ids for t in trajectories], skip_special_tokens=True)

    def _scores(
        self,
        painted: Mapping[int, PILImage.Image],
        texts: Mapping[int, str],
        found: Sequence[Refinement],
        columns: Mapping[str, Sequence[Any]],
    ) -> dict[int, float | None]:
        """Score new images, by their places; those that are not numbers have no score."""
        scores: dict[int, float | None] = dict.fromkeys(painted)
        sound = [i for i, image in painted.items() if not has_failed(image)]
        if self.judge is None or not sound:
            return scores
        prompts = [found[i].prompt for i in sound]
        said = [
            [{"role": "assistant", "content": texts[i]}] if isinstance(found[i].prompt, list) else texts[i]
            for i in sound
        ]
        given = called(
            self.judge,
            prompts=prompts,
            completions=said,
            images=[painted[i] for i in sound],
            previous_images=[found[i].images for i in sound],
            round_index=[len(found[i].images) for i in sound],
            **{name: [values[i] for i in sound] for name, values in columns.items()},
        )
        return scores | {i: finite(score) for i, score in zip(sound, given, strict=True)}
