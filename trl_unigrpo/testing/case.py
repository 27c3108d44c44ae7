"""The case that the promises of the contract are tried on: two prompts, their thinkings, and states of their images.

Shapes: B = 2 trajectories, S = 5 steps, T text tokens, `latent` the model's own latent dimensions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..flow import flow_timesteps
from ..flow.sampler import RolloutPlan
from ..flow.states import States
from ..models.contract import UnifiedModelMixin
from ..models.prompts import as_messages, system_ids
from ..sampling import paint
from ..trajectory import Image, Round, Steps, Trajectory


class ContractError(AssertionError):
    """A promise of the contract that a model does not keep."""


def expect(kept: bool, method: str, found: str) -> None:
    """Raise [`ContractError`], naming the method, unless a promise is kept."""
    if not kept:
        raise ContractError(f"`{method}` {found}")


@dataclass
class Case:
    """
    A model under test, and what is asked of it.

    Attributes:
        model: a copy, in evaluation mode, which a check may change.
        tokenizer: as [`prepare_tokenizer`] returns it.
        image_size: (height, width) in pixels.
        prompts, thinkings: two each, of different lengths.
        impossible_size: (height, width) that the model can't paint, or None.
        separates_context: whether a velocity takes its context as it was encoded, and computes none of it again.
        tolerance: relative difference of what is the same but for rounding.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    image_size: tuple[int, int]
    prompts: Sequence[str]
    thinkings: Sequence[str]
    impossible_size: tuple[int, int] | None = None
    separates_context: bool = True
    tolerance: float = 1e-4

    # What is asked

    def messages(self) -> list[list[dict[str, Any]]]:
        """The prompts as conversations, with the model's own system prompt."""
        return [as_messages(prompt, self.model.default_system_prompt) for prompt in self.prompts]

    def trajectories(self, thinking: bool = True) -> list[Trajectory]:
        """Trajectories of one round each, without its image."""
        messages = self.messages()
        prompts = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
        texts = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in self.thinkings]
        texts = [[*text, self.tokenizer.eos_token_id] if thinking else [] for text in texts]
        rows = enumerate(zip(messages, prompts, texts, system_ids(self.tokenizer, messages), strict=True))
        return [Trajectory(m, ids, row, [Round(text)], system) for row, (m, ids, text, system) in rows]

    def contexts(self) -> list[Any]:
        """Say what stands before the image of each."""
        return self.model.contexts(self.trajectories())

    def text(self) -> tuple[Tensor, Tensor]:
        """Tokens and mask (B, T) as TRL lays them out: prompts padded on the left, thinkings on the right."""
        made, pad = self.trajectories(), self.tokenizer.pad_token_id
        before, after = (max(map(len, part)) for part in ([t.prompt_ids for t in made], [t.text_ids for t in made]))
        ids = torch.full((len(made), before + after), pad, device=self.model.device)
        mask = torch.zeros_like(ids)
        for row, t in enumerate(made):
            real = slice(before - len(t.prompt_ids), before + len(t.text_ids))
            ids[row, real] = torch.tensor([*t.prompt_ids, *t.text_ids], device=ids.device)
            mask[row, real] = 1
        return ids, mask

    def latents(self, count: int = 2, seed: int = 0) -> Tensor:
        """Noise (count, *latent)."""
        shape = (count, *self.model.latent_shape(self.image_size))
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.model.device)

    def times(self, *values: float) -> Tensor:
        """Times, beside the model's weights."""
        return torch.tensor(values, device=self.model.device)

    def steps(self) -> Steps:
        """Make a table of three states of the first image, and two of the second."""
        made, numbers = self.trajectories(), ((0.9, 0.5, 0.2), (0.7, 0.3))
        for row, (trajectory, context) in enumerate(zip(made, self.model.contexts(made), strict=True)):
            states = States(self.latents(len(numbers[row]), seed=row), torch.tensor(numbers[row]))
            trajectory.rounds[0].images.append(Image(states.x[0], self.image_size, context, states))
        return Steps.of(made).to(self.model.device)

    # What the model answers

    def velocity(self, contexts: Sequence[Any], latents: Tensor, times: Tensor) -> Tensor:
        """Compute the velocities at states behind contexts that are encoded anew."""
        return self.model.predict_velocity(self.model.encode_context(contexts), latents, times, self.image_size)

    @torch.no_grad()
    def outputs(self, model: UnifiedModelMixin | None = None) -> list[Tensor]:
        """Compute hidden states and velocities of a model: what its two experts compute."""
        model = self.model if model is None else model
        contexts, (ids, mask) = self.contexts(), self.text()
        latents, times = self.latents(), self.times(0.5, 0.5)
        velocity = model.predict_velocity(model.encode_context(contexts), latents, times, self.image_size)
        hidden = model.backbone(ids, mask).last_hidden_state
        assert hidden is not None
        return [hidden * mask[..., None], velocity]

    def painted(self, batch_size: int | None = None) -> list[Image]:
        """Paint images of four steps, of which the second is stochastic."""
        made = self.trajectories()
        plan = RolloutPlan(flow_timesteps(4), self.image_size, torch.tensor([1]), batch_size=batch_size)
        generators = [torch.Generator().manual_seed(t.row) for t in made]
        return paint(self.model, made, plan, generators)

    def gradients(self, backward: Callable[[], None]) -> dict[str, Tensor]:
        """Collect the gradient of every trained weight, zeros where there is none."""
        self.model.zero_grad()
        backward()
        trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained}

    def same(self, a: Tensor, b: Tensor) -> bool:
        """Say whether two tensors differ by rounding alone."""
        return a.shape == b.shape and bool((a.float() - b.float()).norm() <= self.tolerance * b.float().norm())
