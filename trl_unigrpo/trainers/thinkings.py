"""Groups of fewer thinkings than images, and images that nothing can be learnt from."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..flow.states import rows_of
from ..models.experts import parameters_by_expert
from ..trajectory import Trajectory
from . import credit
from .diversity import ImageFeatures, diverse_advantages, features_of, isolation
from .run_keeping import RunKeeping


class ThinkingsRun(RunKeeping):
    """A run whose rows may share thinkings, K of them side by side, and whose dead images are left out."""

    _image_features: ImageFeatures | None = None

    @property
    def _images_of_each(self) -> int:
        """K: in evaluation, as for a user, each image has a thinking of its own."""
        return self.args.images_per_thinking if self.mode == "train" else 1

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, num_generations: int, **kwargs: Any
    ) -> Any:
        """Sample a thinking for every K-th row, which the rows behind it repeat."""
        if not self.args.thinking:
            # TRL needs a token per completion; the image is painted as if there were none.
            return [[self._tokenizer.eos_token_id] for _ in prompt_ids], None
        each = self._images_of_each
        sampled = super()._generate_single_turn(
            prompt_ids[::each], images, multimodal_fields, num_generations // each, **kwargs
        )
        return tuple(part and [row for row in part for _ in range(each)] for part in sampled)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        outputs = super()._generate_and_score_completions(inputs)
        if self.num_rounds == 1:  # else advantages are not TRL's
            rewards, summed = self._book.rewards, self.args.multi_objective_aggregation == "sum_then_normalize"
            counted = rewards[:, (self._book.image_weights != 0).to(rewards.device)]
            compared = self._book.total(rewards)[:, None] if summed else counted
            alike = self._own(credit.alike(compared, self.group_size), inputs)
            outputs["advantages"] = outputs["advantages"].masked_fill(alike, 0.0)
            if self.mode == "train" and self.args.diversity_weight > 0:
                outputs["text_advantages"] = self._diverse(outputs["advantages"], inputs)
                if self.args.diversity_experts == "both":
                    outputs["advantages"] = outputs["text_advantages"]
        return outputs

    def _diverse(self, advantages: Tensor, inputs: Sequence[Any]) -> Tensor:
        """Pay the good images of a prompt more, the less they resemble its others."""
        features = features_of([row["images"] for row in inputs], self._image_features).to(self.accelerator.device)
        features, whole = (self.accelerator.gather(x.contiguous()).cpu() for x in (features, advantages))
        apart = isolation(features, self.group_size)
        if not apart.isnan().all():
            self._note({"images/isolation": apart.nanmean().item()})
        return self._own(diverse_advantages(whole, apart, self.args.diversity_weight, self.group_size), inputs)

    def _own(self, values: Tensor, inputs: Sequence[Any]) -> Tensor:
        """Take this process' part of the values (N, ..) of all."""
        return values.split(len(inputs))[self.accelerator.process_index].to(self.accelerator.device)

    def _share_credit(self, outputs: dict[str, Any], inputs: Sequence[Any]) -> None:
        """Pay thinkings for the mean of their images, and images for what they are beside it."""
        if (each := self._images_of_each) == 1:
            return
        whole, known = outputs["advantages"], ~self._own(self._book.rewards, inputs).isnan().all(1)
        of_text, outputs["advantages"] = credit.two_levels(whole, known, each)
        outputs["text_advantages"] = of_text + (outputs.get("text_advantages", whole) - whole)
        self._note(credit.spreads(self._book.total(self._book.rewards), each, self.group_size))

    def _leave_out_dead(self, trajectories: Sequence[Trajectory], outputs: dict[str, Any]) -> None:
        """Let images whose advantage is 0 be dead, where nothing else trains them; their share is a metric."""
        advantages = outputs.get("round_advantages", outputs["advantages"][:, None]).tolist()
        found = []  # image, whether it has an advantage, its weight in a mean over the images of a trajectory
        for trajectory, row in zip(trajectories, advantages, strict=True):
            own = [(number, image) for number, image in trajectory.painted() if len(image.steps)]
            found += [(image, row[min(number, len(row) - 1)] != 0, 1 / len(own)) for number, image in own]
        sums = torch.tensor([[1.0, not has, weight, weight * has] for _, has, weight in found]).view(-1, 4).sum(0)
        count, dead, whole, live = self.accelerator.gather(sums.to(self.accelerator.device)[None]).sum(0).tolist()
        self._note({"flow/frac_dead": dead / max(count, 1)})
        pulled = self._setup.regularized or self.args.image_objective == "nft"
        if pulled and self.args.train_dead_images:
            return
        for image, has_advantage, _ in found:
            image.share = whole / live if has_advantage else 0.0
            # Several processes wait for one another: each has an image in every table, which may weigh nothing.
            if image.dead and self.accelerator.num_processes == 1:
                image.steps = rows_of(image.steps, slice(0))

    def _without_images(self) -> Tensor:
        """Give a loss of 0 for a micro-batch without images: its gradient is 0, not none, as with dead ones in it."""
        self._note({"flow/loss": 0.0})
        return torch.stack([0 * p.sum() for p in parameters_by_expert(self.unified, self.model)["image"]]).sum()
