"""The one type that training knows: a trajectory, its rounds of text and images, and the table of their trained steps.

    Trajectory   a prompt, and what the model made of it:     rounds
    Round        one text, and the images painted after it:   images
    Passage      a stretch of rounds that is read as one row:  ids
    Image        a finished image, and its trained states:    steps
    Steps        a table of the trained steps of a micro-batch, one row a step, of any number of images a trajectory

Plain UniGRPO is one round with one image. Nothing here knows a model or a trainer.

Shapes: S steps of a micro-batch, `latent` the model's own latent dimensions.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from .flow.guidance import Guidance
from .flow.states import LinePoints, SDESteps, join, on_device, rows_of, without_nan


@dataclass
class Image:
    """
    One image that the policy painted.

    Attributes:
        latents: (*latent) the finished image.
        size: (height, width) in pixels.
        context: what stood before it, in the model's own form.
        steps: its trained states, `SDESteps` or `LinePoints`.
        seed: key of the random stream that it was painted with, which is its name in a generation batch.
        guidance: the sampler's, which training repeats.
        branches: what stood before it in each branch of that guidance, by name.
        share: what it counts in a mean over the images that are not dead, of means over all; 0 for a dead one.
    """

    latents: Tensor
    size: tuple[int, int]
    context: Any
    steps: Any
    seed: tuple[int, ...] = ()
    guidance: Guidance | None = None
    branches: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0

    @property
    def dead(self) -> bool:
        """True where nothing is to be learnt from it: its steps are in no table."""
        return self.share == 0

    def to(self, device: torch.device | str) -> "Image":
        """Bring latents and trained states to a device, times to the CPU; what stood before it stays."""
        return replace(self, latents=self.latents.to(device), steps=on_device(self.steps, device))


@dataclass
class Round:
    """
    A text and the images that were painted after it.

    Attributes:
        text_ids: tokens of the text, as sampled; none where the images follow what came before.
        images: in the order in which they were painted.
        observation_ids: tokens between the round before and the text, which the policy did not sample, with a
            placeholder for each image that they show.
        shown: these images, in the model's own form.
        fresh: whether the observation stands behind the system message alone, and not behind all that came before.
        stopped: whether the text keeps the image of the round before: none is painted.
        reward: of the image, where rounds are scored; None where it has no score.
    """

    text_ids: list[int] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    observation_ids: list[int] = field(default_factory=list)
    shown: list[Any] = field(default_factory=list)
    fresh: bool = False
    stopped: bool = False
    reward: float | None = None


@dataclass
class Passage:
    """
    A stretch of a trajectory that is read as one row.

    Attributes:
        ids: its tokens.
        images: finished images that they show.
        repeated: how many of the tokens, at the beginning, are the system message once more, and no part of the
            trajectory's own.
        rounds: how many rounds it has.
    """

    ids: list[int]
    images: list[Any]
    repeated: int = 0
    rounds: int = 0


@dataclass
class Trajectory:
    """
    One sample of a prompt.

    Attributes:
        prompt: as the dataset has it, a string or a conversation, with the system prompt that was added.
        prompt_ids: its tokens.
        row: place in the generation batch.
        rounds: in their order.
        system_ids: tokens of its system message, none where it has none; needed for guidance and for fresh rounds.
        images: finished images that the prompt shows by a placeholder each, in the model's own form.
        size: (height, width) in pixels of the images painted next; None for the run's own.
    """

    prompt: Any
    prompt_ids: list[int]
    row: int = 0
    rounds: list[Round] = field(default_factory=list)
    system_ids: list[int] | None = None
    images: list[Any] = field(default_factory=list)
    size: tuple[int, int] | None = None

    @property
    def text_ids(self) -> list[int]:
        """Tokens of all rounds' texts."""
        return [token for part in self.rounds for token in part.text_ids]

    @property
    def row_ids(self) -> list[int]:
        """All its tokens behind the prompt, in their order: texts, and what was observed between them."""
        return [token for part in self.rounds for token in (*part.observation_ids, *part.text_ids)]

    @property
    def looks(self) -> int:
        """Number of its rounds that began with a look at what came before."""
        return sum(bool(part.observation_ids) for part in self.rounds)

    def painted(self) -> Iterator[tuple[int, Image]]:
        """Walk through all images: the number of its round, and the image."""
        for number, part in enumerate(self.rounds):
            for image in part.images:
                yield number, image

    def passages(self) -> list[Passage]:
        """Cut it where a round is fresh; without such it is one passage."""
        found = [Passage(list(self.prompt_ids), list(self.images))]
        for part in self.rounds:
            if part.fresh:
                system = self.system_ids or []
                found.append(Passage(list(system), [], len(system)))
            found[-1].ids += [*part.observation_ids, *part.text_ids]
            found[-1].images += part.shown
            found[-1].rounds += 1
        return found

    def now(self) -> "Trajectory":
        """Give what its last round sees, as a trajectory of this round alone: all before its text is the prompt."""
        if not self.looks:
            return self
        last, text = self.passages()[-1], self.rounds[-1].text_ids
        prompt_ids = last.ids[: len(last.ids) - len(text)]
        return replace(self, prompt_ids=prompt_ids, images=last.images, rounds=[Round(text)])


@dataclass
class Steps:
    """
    The trained steps of a micro-batch of B trajectories with I images: a table of S rows.

    `steps[index]` is a part of the table, which keeps its numbers and its share in the mean.

    Attributes:
        states: S of them, all `SDESteps` or all `LinePoints`.
        image: (S,) number of each step's image, 0 .. I - 1.
        row: (S,) number of its trajectory, 0 .. B - 1.
        round: (S,) number of its round.
        weight: (S,) its weight in [`mean`]: a mean over the steps of an image, the images of a trajectory, and
            trajectories.
        total: S of the whole table.
        images: the I images.
    """

    states: Any
    image: Tensor
    row: Tensor
    round: Tensor
    weight: Tensor
    total: int
    images: Sequence[Image]

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory], counts_for: Tensor | None = None) -> "Steps":
        """
        Make the table of a micro-batch. Raises ValueError where it has no step, or images of several sizes.

        Steps of an image that is not a finite number are zeros and weigh nothing: one such image costs no update.
        Dead images are left out, but count in the mean; where all are dead, the first stays and weighs nothing.

        Args:
            counts_for: (B,) False for trajectories whose steps weigh nothing; they count in the mean all the same.
        """
        found = [(row, number, image) for row, t in enumerate(trajectories) for number, image in t.painted()]
        if not found:
            raise ValueError("The trajectories have no images: there is nothing to train the image expert on.")
        sizes = sorted({image.size for *_, image in found})
        if len(sizes) != 1:
            raise ValueError(f"Images of one batch must have one size, got {sizes}: make a batch per size.")
        trained = torch.zeros(len(trajectories))  # images of each trajectory
        for at, _, image in found:
            trained[at] += image.dead or len(image.steps) > 0
        live = [item for item in found if not item[2].dead]
        dead = [item for item in found if item[2].dead and len(item[2].steps)]
        found = live if any(len(image.steps) for *_, image in live) else dead[:1] or found
        rows, rounds, images = zip(*found, strict=True)
        counts = torch.tensor([len(image.steps) for image in images])
        if not counts.any():
            raise ValueError("The images have no trained step: there is nothing to train the image expert on.")
        number = torch.arange(len(images)).repeat_interleave(counts)
        row = torch.tensor(rows)
        share = counts * trained[row] * len(trajectories)
        broken = ~torch.stack([image.latents.isfinite().all() for image in images]).cpu()
        weight = (len(number) / share).masked_fill(broken | torch.tensor([image.dead for image in images]), 0.0)
        if counts_for is not None:
            weight = weight * counts_for.cpu()[row]
        return cls(
            states=join(
                [without_nan(image.steps) if bad else image.steps for image, bad in zip(images, broken, strict=True)]
            ),
            image=number,
            row=row[number],
            round=torch.tensor(rounds)[number],
            weight=weight[number],
            total=len(number),
            images=images,
        )

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: Any) -> "Steps":
        at = index.cpu() if isinstance(index, Tensor) else index
        if isinstance(at, Tensor) and torch.equal(at, torch.arange(len(self))):
            return self  # all of it, which no device need copy
        parts = {name: getattr(self, name)[at] for name in ("image", "row", "round", "weight")}
        return replace(self, states=rows_of(self.states, index), **parts)

    def to(self, device: torch.device) -> "Steps":
        """Bring states and weights to a device; numbers and times stay on the CPU."""
        return replace(self, states=on_device(self.states, device), weight=self.weight.to(device))

    def mean(self, values: Tensor) -> Tensor:
        """Average values (S,) over steps, then images, then trajectories: their share of the whole table's mean."""
        return (values * self.weight.to(values.device)).sum() / self.total

    def mean_of_live(self, values: Tensor) -> Tensor:
        """Average values (S,) as [`mean`] does, but over the images that are not dead alone, however they are cut."""
        if all(image.share == 1 for image in self.images):
            return self.mean(values)
        shares = torch.tensor([image.share for image in self.images])[self.image]
        return self.mean(values * shares.to(values.device))

    def by_place(self) -> list[Tensor]:
        """List the numbers of the k-th steps of all images, k = 0, 1, ..: none has two steps of one image."""
        order = torch.argsort(self.image, stable=True)
        counts = torch.bincount(self.image, minlength=len(self.images))
        place = torch.empty_like(self.image)
        place[order] = torch.arange(len(order)) - (counts.cumsum(0) - counts)[self.image[order]]
        return [(place == k).nonzero().flatten() for k in range(int(counts.max()) if len(self) else 0)]

    def branch(self, name: str) -> "Steps":
        """Put the same steps behind the contexts of a branch of guidance."""
        return replace(self, images=[replace(image, context=image.branches[name]) for image in self.images])

    @property
    def x(self) -> Tensor:
        """(S, *latent) the states."""
        return self.states.x

    @property
    def t(self) -> Tensor:
        """(S,) their times, on the CPU."""
        return self.states.t

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels, one for the batch."""
        return self.images[0].size

    @property
    def contexts(self) -> list[Any]:
        """Contexts of the S steps."""
        return [self.images[i].context for i in self.image.tolist()]

    @property
    def guidance(self) -> Guidance:
        """The guidance that the images were sampled with; raises ValueError where it is not one for all."""
        first = self.images[0].guidance
        if any(image.guidance != first for image in self.images):
            raise ValueError("Images of one batch were sampled with different guidance: make a batch for each.")
        return first or Guidance()


def has_steps(trajectories: Sequence[Trajectory]) -> bool:
    """Say whether any image has a trained step."""
    return any(len(image.steps) for trajectory in trajectories for _, image in trajectory.painted())


def in_order(parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Join the values (S', ..) of parts of a table, each beside its numbers of steps (S',), in the table's order."""
    order, values = zip(*parts, strict=True)
    return torch.cat(values)[torch.cat(order).argsort()]


TYPES = (Trajectory, Round, Image, SDESteps, LinePoints, Guidance)
"""Types that a buffer holds beside tensors, numbers and texts; a model's contexts may add their own."""

_TYPE = "__type__"


def to_state(value: Any, types: Sequence[type] = ()) -> Any:
    """
    Turn anything that is made of tensors, numbers, texts, lists, dicts and dataclasses into such without dataclasses.

    What is held in two places is one thing in the state, too.

    Args:
        types: dataclasses beside [`TYPES`] that it may hold.

    Raises:
        TypeError: for anything else, which a checkpoint could not be trusted to give back.
    """
    known: dict[str, Any] = {kind.__name__: kind for kind in (*TYPES, *types)}
    made: dict[int, Any] = {}  # by identity

    def build(value: Any) -> Any:
        if value is None:
            return None
        for plain in (bool, int, float, str):
            if isinstance(value, plain):
                return plain(value)  # NumPy has subclasses of these
        if isinstance(value, (list, tuple)):
            return [build(item) for item in value] if isinstance(value, list) else tuple(map(build, value))
        if isinstance(value, Mapping):
            return {build(key): build(item) for key, item in value.items()}
        if id(value) not in made:
            made[id(value)] = value, _tensor(value) if isinstance(value, Tensor) else parts(value)
        return made[id(value)][1]

    def parts(value: Any) -> dict[str, Any]:
        name = type(value).__name__
        if known.get(name) is not type(value):
            raise TypeError(
                f"A checkpoint can't keep a {name}: what a model's `contexts` returns must be made of tensors, "
                "numbers, texts, lists, dicts, and dataclasses that its `context_types` names."
            )
        return {_TYPE: name, **{part.name: build(getattr(value, part.name)) for part in fields(value) if part.init}}

    return build(value)


def _tensor(value: Tensor) -> Tensor:
    whole = value.untyped_storage().nbytes() == value.nbytes
    return value.detach() if whole else value.detach().clone()  # a view would keep all of what it looks at


def from_state(state: Any, types: Sequence[type] = ()) -> Any:
    """
    Rebuild the value that [`to_state`] was given.

    Args:
        types: dataclasses beside [`TYPES`] that it may hold.

    Raises:
        ValueError: for a dataclass that is neither.
    """
    known: dict[str, Any] = {kind.__name__: kind for kind in (*TYPES, *types)}
    made: dict[int, Any] = {}  # by identity

    def build(value: Any) -> Any:
        if isinstance(value, list):
            return [build(item) for item in value]
        if isinstance(value, tuple):
            return tuple(build(item) for item in value)
        if not isinstance(value, dict):
            return value
        if _TYPE not in value:
            return {key: build(item) for key, item in value.items()}
        if value[_TYPE] not in known:
            raise ValueError(
                f"The checkpoint holds a {value[_TYPE]}, which this model does not know. Name the dataclass in the "
                "model's `context_types`."
            )
        if id(value) not in made:
            parts = {key: build(item) for key, item in value.items() if key != _TYPE}
            made[id(value)] = known[value[_TYPE]](**parts)
        return made[id(value)]

    return build(state)
