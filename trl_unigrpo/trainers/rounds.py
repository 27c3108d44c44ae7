"""Several rounds in one trajectory: an image, a look at it in words, another image.

A later round, for all trajectories at once:

    1. show the image that a trajectory goes on from         `_begin_round`: its own, or, in a tree, its group's;
       and what the user says to it                          reflection.py, or the next of the row's turns
    2. sample a text about it, which may keep the image      `_reflect`
    3. paint, unless it was kept                             `_painted`, as in the first round

What TRL sees of a trajectory is one row: text ++ observation ++ text .., with a mask on what was sampled. Then each
round is scored and paid (credit.py), by an advantage for each token and each image.

Shapes: B trajectories of this process, N of all; R rounds, F reward functions.
"""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..flow.sampler import RolloutPlan
from ..messages import user_text
from ..models.tokenizer import check_messages
from ..monitoring.events import Generation
from ..sampling import continue_texts
from ..sampling.reflection import reflection
from ..sampling.rounds import begin_round, show_images, take_texts, user_turn
from ..seeding import CHOICE, row_generator
from ..trajectory import Trajectory
from . import credit
from .failed_images import image_metrics, mask_failed
from .round_notes import tell_edits, tell_rounds, with_rounds
from .run_keeping import RunKeeping
from .scoring import STANDING, Standing
from .trl_bridge import unwrap_model_for_generation, with_rows
from .turn_checks import TURN_COLUMN, check_story


@dataclass
class Walk:
    """
    The rounds of a generation batch, while they are made and scored.

    Attributes:
        inputs: the dataset's rows, B of them.
        trajectories: as far as they have come.
        seen: for each the decoded images that stood after its rounds so far.
        painted: for each the decoded images of its rounds, None where it painted none.
        origins: of each later round of a tree, for each trajectory the place of the one whose image it goes on from.
        shown: for each the last of `seen` in the model's own form, as far as it was shown.
        scores: (N, F) of each round that is scored.
        source: (N, F) scores of the source image, which the first round began with; none where credit needs none.
        stood: (N, F) scores of the images that each later round began with.
        process: (N,) advantages by process rewards of each scored round.
    """

    inputs: list[dict[str, Any]]
    trajectories: list[Trajectory] = field(default_factory=list)
    seen: list[list[Any]] = field(default_factory=list)
    painted: list[list[Any]] = field(default_factory=list)
    origins: list[list[int]] = field(default_factory=list)
    shown: list[Any] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    source: list[Tensor] = field(default_factory=list)
    stood: list[Tensor] = field(default_factory=list)
    process: list[Tensor] = field(default_factory=list)


class RoundsTrainer(RunKeeping):
    """The rounds of [`UniGRPOTrainer`] after the first."""

    @property
    def num_rounds(self) -> int:
        """Images of a trajectory, at most."""
        args = self.args
        return args.num_rounds if self.mode == "train" or args.eval_num_rounds is None else args.eval_num_rounds

    @property
    def _tree(self) -> bool:
        """True where all of a group go on from one image: in training, as a user has but one trajectory."""
        return self.args.round_group == "tree" and self.mode == "train"

    @property
    def _may_stop(self) -> bool:
        """True where a round may keep the image now."""
        warm = self.mode == "eval" or self.state.global_step >= self.args.stop_warmup_steps
        return self.args.allow_stop and warm

    def _painted(self, trajectories: list[Trajectory], plan: RolloutPlan | None = None) -> list[Any]:
        raise NotImplementedError

    # 1. Rollout

    def _go_on(self, outputs: tuple, images: list[Any]) -> tuple[tuple, list[Any]]:
        """Make the later rounds of the trajectories begun: TRL's outputs, with all rounds, and the last images."""
        walk = self._progress.walk = Walk(self._progress.inputs, self._progress.trajectories)
        walk.seen, walk.painted = ([[image] for image in images] for _ in range(2))
        walk.shown = [None] * len(images)
        for number in range(1, self.num_rounds):
            going = self._begin_round(walk, number)
            self._reflect(going)
            on = [t for t in going if not t.rounds[-1].stopped]
            painted = dict(zip(map(id, on), self._painted(on), strict=True))
            for t, seen, own in zip(walk.trajectories, walk.seen, walk.painted, strict=True):
                own.append(painted.get(id(t)))
                seen.append(seen[-1] if own[-1] is None else own[-1])
            self._note(image_metrics(self.accelerator, [seen[-1] for seen in walk.seen], self._progress.real))
            if self._trains_image:
                self._tell_rollout(
                    [replace(t, rounds=t.rounds[number:][:1]) for t in walk.trajectories], number=number
                )
        self._progress.reading = walk.trajectories
        masks = [self._sampled(t) for t in walk.trajectories]
        rows, texts = [t.row_ids for t in walk.trajectories], self._completions(walk.trajectories)
        return with_rows(outputs, rows, masks, texts), [seen[-1] for seen in walk.seen]

    def _begin_round(self, walk: Walk, number: int) -> list[Trajectory]:
        """Show each trajectory that goes on the image that it goes on from; returns these."""
        args = self.args
        going = [i for i in range(len(walk.trajectories)) if self._goes_on(walk, i, number)]
        if self._tree:
            self._share_images(walk, number, going)
        else:
            self._show_images(walk, going)
        going, placeholder = [i for i in going if walk.shown[i] is not None], self.unified.image_placeholder
        assert placeholder is not None
        # A fresh round does not see the text before it, which need not be closed then.
        ends = () if args.round_context == "markov" else (self._tokenizer.eos_token_id, *self.eos_token_ids)
        for i in going:
            t = walk.trajectories[i]
            said = user_turn(self._tokenizer, self._said(walk, i, number), **self.chat_template_kwargs)
            begin_round(t, placeholder, walk.shown[i], said, ends)
        return [walk.trajectories[i] for i in going]

    def _goes_on(self, walk: Walk, place: int, number: int) -> bool:
        """Say whether a trajectory has this round: whether its story has, or its image is not kept."""
        if self._setup.stories:
            return number < len(walk.inputs[place][TURN_COLUMN])
        return self._tree or not walk.trajectories[place].rounds[-1].stopped

    def _said(self, walk: Walk, place: int, number: int) -> str:
        """Give what the user says to the image that a round begins with."""
        if self._setup.stories:
            turn: str = walk.inputs[place][TURN_COLUMN][number]
            check_messages([turn], self._tokenizer)
            return turn
        stop_text = self.args.stop_text if self._may_stop else None
        prompt = user_text(walk.trajectories[place].prompt)
        return reflection(self.args.reflection_template, prompt, number + 1, stop_text)

    def _show_images(self, walk: Walk, places: Sequence[int]) -> None:
        """Bring the last images of these trajectories into the model's own form; failed ones are None."""
        new = [i for i in places if walk.trajectories[i].rounds[-1].images]
        images = [walk.trajectories[i].rounds[-1].images[-1] for i in new]
        with torch.no_grad(), self.accelerator.autocast():
            reencode = self.args.context_latents == "reencode"
            shown = show_images(self.unified, images, [walk.seen[i][-1] for i in new], reencode)
        for i, image in zip(new, shown, strict=True):
            walk.shown[i] = image

    def _reflect(self, trajectories: Sequence[Trajectory]) -> None:
        """Sample the texts of the rounds begun, and see which of them keep the image."""
        if not trajectories:
            return
        texts = self._sampled_texts(trajectories)
        stop_text = self.args.stop_text if self._may_stop else None
        take_texts(trajectories, texts, self._decoded(texts), stop_text, self.eos_token_ids)

    def _sampled_texts(self, trajectories: Sequence[Trajectory]) -> list[list[int]]:
        config = copy.copy(self.generation_config)
        config.max_new_tokens = self.args.max_reflection_length
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                generation_kwargs=self.generation_kwargs,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            self.accelerator.autocast(),
        ):
            return continue_texts(model, trajectories, config, self._tokenizer.pad_token_id, self.eos_token_ids)

    # 2. What TRL sees

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self._setup.stories:
            for row in inputs:
                check_story(row, self.num_rounds)
        outputs = super()._generate_and_score_completions(inputs)
        if self._progress.reading is not None:
            outputs["rounds"], self._progress.reading = self._progress.reading, None
        return outputs

    def _decoded(self, texts: Sequence[list[int]]) -> list[str]:
        return self.processing_class.batch_decode(texts, skip_special_tokens=True)

    def _sampled(self, trajectory: Trajectory) -> list[int]:
        """Mark the tokens that the text's objective trains, 1, among those of the trajectory's row."""
        mask: list[int] = []
        for number, part in enumerate(trajectory.rounds):
            trained = int(self.mode == "eval" or self.args.trains_round(number))
            mask += [0] * len(part.observation_ids) + [trained] * len(part.text_ids)
        return mask

    def _completions(self, trajectories: Sequence[Trajectory], number: int | None = None) -> list[Any]:
        """Give the texts of a round, or, joined, of all, in the form of TRL's completions."""
        texts = []
        for t in trajectories:
            parts = self._decoded([part.text_ids for part in t.rounds])
            shown = "".join(f"{text} [image {i + 1}] " for i, text in enumerate(parts[:-1])) + parts[-1]
            texts.append(shown if number is None else parts[min(number, len(parts) - 1)])
        chat = isinstance(self._progress.inputs[0]["prompt"], list)
        return [[{"role": "assistant", "content": text}] for text in texts] if chat else texts

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        known = (logits_to_keep,)
        if (read := self._progress.reading) is None:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, *known, batch_size=batch_size, **kwargs
            )
        # TRL cuts the rows itself, and knows nothing of what stands in them: here they are cut before.
        parts = []
        for rows in torch.arange(len(input_ids)).split(batch_size or len(input_ids)):
            reads = functools.partial(model, passages=[read[row].passages() for row in rows.tolist()])
            ids, mask = input_ids[rows.to(input_ids.device)], attention_mask[rows.to(input_ids.device)]
            parts.append(super()._get_per_token_logps_and_entropies(reads, ids, mask, *known, **kwargs))
        log_probs, entropies, *rest = zip(*parts, strict=True)
        means = [None if part[0] is None else torch.stack(part).mean() for part in rest]
        return torch.cat(log_probs), None if entropies[0] is None else torch.cat(entropies), *means

    # 3. Rewards

    def _score(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """Score one image of each trajectory: (N, F), without failures."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        rewards = mask_failed(self.accelerator, rewards, inputs)
        return self._book.enter(rewards, self.group_size, self.scale_rewards, self._progress.real)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """Score what credit needs of the rounds that are not scored yet; returns the last images' (N, F)."""
        if (walk := self._progress.walk) is None:
            return self._score(inputs, prompts, completions, completion_ids_list)
        if self._setup.edits and self.args.no_improve != "none":
            walk.source = [self._source_scores(walk)]  # else the same number for all of a group, which credit cancels
        last = self.num_rounds - 1
        whole = self.mode == "eval" or self.args.scores_each_round or self.args.process_reward_weight > 0
        each = whole or any(getattr(function, "every_round", False) for function in self.reward_funcs)
        for number in range(len(walk.scores) if each else last, last + 1):
            if len(walk.stood) < number <= len(walk.scores):
                walk.stood.append(walk.scores[number - 1])  # each went on from its own image
            self._score_round(walk, number, optional=not whole and number < last)
        return walk.scores[-1]

    def _score_round(self, walk: Walk, number: int, optional: bool = False) -> None:
        """Score the images that stand after a round. Those that stood before keep their scores."""
        kept = self._kept_scores(walk, number)
        for row, t, seen, known in zip(walk.inputs, walk.trajectories, walk.seen, kept, strict=True):
            row |= {"images": seen[number], "previous_images": seen[:number], STANDING: Standing(known, optional)}
            row |= {"round_index": min(number, len(t.rounds) - 1), "source_images": row.get("source_images")}
        self._pending_extra_logs.clear()  # the log has a row for each trajectory: its last round's
        ids = [t.rounds[min(number, len(t.rounds) - 1)].text_ids for t in walk.trajectories]
        prompts = [row["prompt"] for row in walk.inputs]
        walk.scores.append(self._score(walk.inputs, prompts, self._completions(walk.trajectories, number), ids))
        walk.process.append(self._book.process_advantages)
        for row in walk.inputs:
            del row[STANDING]

    def _kept_scores(self, walk: Walk, number: int) -> list[list[float] | None]:
        """Give the scores of each trajectory's image where it stood before the round; None where it is new."""
        if not 0 < number <= len(walk.stood):
            return [None] * len(walk.inputs)
        before = walk.stood[number - 1].split(len(walk.inputs))[self.accelerator.process_index].tolist()
        new = [number < len(t.rounds) and not t.rounds[number].stopped for t in walk.trajectories]
        return [None if painted else scores for painted, scores in zip(new, before, strict=True)]

    def _source_scores(self, walk: Walk) -> Tensor:
        """Score the source image of each group, by its first trajectory: (N, F)."""
        group, count, functions = self.group_size, len(walk.inputs), len(self.reward_funcs)
        first = self.accelerator.process_index * count
        for place, row in enumerate(walk.inputs, start=first):
            known = [0.0] * functions if place % group else None
            row |= {"images": row["source_images"][0], "previous_images": [], "round_index": -1}
            row[STANDING] = Standing(known)
        prompts, ids = [row["prompt"] for row in walk.inputs], [t.rounds[0].text_ids for t in walk.trajectories]
        completions = self._completions(walk.trajectories, 0)
        scores = super()._calculate_rewards(walk.inputs, prompts, completions, ids)[::group]
        return scores.masked_fill(~scores.isfinite(), torch.nan).repeat_interleave(group, 0)

    @property
    def _perfect(self) -> float:
        """The reward from which on an image is perfect: all that the weights give."""
        return self._book.image_weights.sum().item()

    # 4. Credit

    def _pay(self, outputs: dict[str, Any]) -> None:
        """Put advantages of each round and of each token into TRL's outputs, beside those of the last image."""
        walk, args = self._progress.walk, self.args
        assert walk is not None
        count, process = len(walk.inputs), self.accelerator.process_index
        own = slice(count * process, count * (process + 1))
        acted, painted = self._acts(walk)
        rewards = torch.stack([self._book.total(scores) for scores in walk.scores], 1)
        if rewards.shape != acted.shape:  # the last alone was scored
            rewards = torch.cat([rewards.new_full(acted[:, 1:].shape, torch.nan), rewards], 1)
        began = [*walk.source, *walk.stood]
        stood = torch.stack([self._book.total(scores) for scores in began], 1) if began else rewards[:, :-1]
        earlier = credit.before(stood, self.group_size)
        counted = acted if self._setup.stories else torch.ones_like(acted)
        paid = "own" if self._tree else args.round_reward
        led_to = credit.returns(rewards, painted, paid, args.round_cost, counted)
        led_to = led_to + args.stop_bonus * (acted & ~painted & (rewards >= self._perfect))
        led_to = led_to.masked_fill(~acted, torch.nan)
        if args.round_baseline is None and self.mode == "train":
            self._baseline = credit.running(self._baseline, credit.slope(led_to, earlier, self.group_size))
        share = args.round_baseline if args.round_baseline is not None else self._baseline or 0.0
        how = args.no_improve, self.group_size, self.scale_rewards
        advantages = credit.round_advantages(led_to, earlier, share, *how)
        outputs["round_advantages"], of_texts = advantages[own], advantages
        if args.process_reward_weight > 0:
            of_texts = of_texts + args.process_reward_weight * torch.stack(walk.process, 1)
        outputs["text_advantages"] = self._of_tokens(walk.trajectories, of_texts[own], outputs["completion_ids"])
        self._progress.walk = None
        for t, row in zip(walk.trajectories, rewards[own].tolist(), strict=True):
            for part, reward in zip(t.rounds, row, strict=False):
                part.reward = None if reward != reward else reward
        texts = [self._decoded([part.text_ids for part in t.rounds]) for t in walk.trajectories]
        self._progress.told = tell_rounds(walk, own.start, texts, rewards[own], stood[own], advantages[own])
        told = rewards.masked_fill(~counted, torch.nan)
        real = (values[: self._progress.real] for values in (told, stood, acted, painted))
        self._note({"rounds/baseline": share, **_metrics(*real)})

    def _observed(self, rows: Sequence[dict[str, Any]], advantages: Tensor) -> Generation:
        """Describe the generation batch of all processes, with its rounds."""
        observed = super()._observed(rows, advantages)
        told, self._progress.told = self._progress.told, []
        return with_rounds(observed, told or tell_edits(observed, rows))

    def _acts(self, walk: Walk) -> tuple[Tensor, Tensor]:
        """Mark the rounds (N, R) that have a text, and those that have painted an image."""
        flags = torch.zeros(len(walk.trajectories), self.num_rounds, 2, dtype=torch.bool)
        for row, t in zip(flags, walk.trajectories, strict=True):
            row[: len(t.rounds)] = torch.tensor([[True, not part.stopped] for part in t.rounds])
        return self.accelerator.gather(flags.to(self.accelerator.device)).unbind(-1)

    @staticmethod
    def _of_tokens(trajectories: Sequence[Trajectory], advantages: Tensor, ids: Tensor) -> Tensor:
        """Spread advantages of rounds (B, R) over the tokens (B, T) of their texts."""
        spread = torch.zeros(ids.shape)
        for row, (t, values) in enumerate(zip(trajectories, advantages.tolist(), strict=True)):
            at = 0
            for part, value in zip(t.rounds, values, strict=False):
                at += len(part.observation_ids)
                spread[row, at : at + len(part.text_ids)] = value
                at += len(part.text_ids)
        return spread.to(ids.device)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Compute TRL's loss of the texts of a micro-batch, of all rounds."""
        self._progress.reading = inputs.get("rounds")
        loss = super()._compute_loss(model, inputs)
        self._progress.reading = None
        return loss

    # 5. Trees

    def _share_images(self, walk: Walk, number: int, going: Sequence[int]) -> None:
        """
        Let all of a group go on from one of its images, which all processes choose alike.

        Args:
            going: those that go on, whole groups.
        """
        self._score_round(walk, number - 1)
        scores, args, group = walk.scores[-1], self.args, self.group_size
        chosen = []
        for index, rewards in enumerate(self._book.total(scores).split(group)):
            generator = row_generator(args.seed, CHOICE, self.generation, index, number)
            winner = credit.choose_image(rewards, args.round_select, generator, self._perfect, args.keep_perfect)
            chosen.append(index * group + winner)
        winners = torch.tensor(chosen, device=scores.device).repeat_interleave(group)
        first, count = self.accelerator.process_index * len(walk.inputs), len(walk.inputs)
        ended = torch.tensor([i not in going for i in range(count)], device=scores.device)
        ended = self.accelerator.gather(ended)
        winners = torch.where(ended, torch.arange(len(scores), device=scores.device), winners)
        walk.stood.append(scores[winners])
        walk.origins.append(winners[first : first + count].tolist())
        mine = [winner - first for winner in sorted(set(winners[~ended].tolist())) if first <= winner < first + count]
        self._show_images(walk, mine)
        found = {first + i: (walk.shown[i], walk.seen[i][-1]) for i in mine}
        if count % group:  # else all of a group are in one process, and no image need travel
            found = {winner: image for part in gather_object([found]) for winner, image in part.items()}
        for i in going:
            walk.shown[i], walk.seen[i][-1] = found[int(winners[first + i])]


def _metrics(rewards: Tensor, stood: Tensor, acted: Tensor, painted: Tensor) -> dict[str, float]:
    """Measure the rounds (N, R) of a generation batch; a share of nothing is NaN, which no log averages."""
    found = {"rounds/images": painted.sum(1).float().mean().item()}
    first = rewards.shape[1] - stood.shape[1]
    if not rewards.isnan().all(0).any():  # each round is scored
        best = rewards.nan_to_num(nan=-torch.inf).amax(1)
        found["rounds/best"] = best[best.isfinite()].mean().item()
    for number in range(rewards.shape[1]):
        found[f"rounds/reward_{number + 1}"] = rewards[:, number].nanmean().item()
        if number:
            stopped = acted[:, number] & ~painted[:, number]
            found[f"rounds/kept_{number + 1}"] = (stopped.sum() / acted[:, number].sum()).item()
        if number >= first:
            gain = rewards[:, number] - stood[:, number - first]
            known = painted[:, number] & ~gain.isnan()
            found[f"rounds/better_{number + 1}"] = (gain[known] > 0).float().mean().item()
            found[f"rounds/worse_{number + 1}"] = (gain[known] < 0).float().mean().item()
    return {name: value for name, value in found.items() if value == value}
