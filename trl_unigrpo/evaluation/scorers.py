"""Scorers of images: a judge that answers questions, a detector, ShapeWorld's rule, or reward functions."""

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from ..models.sources import read_sources
from ..rewards.common import (
    Asker,
    Breaker,
    Scores,
    Seen,
    finite,
)
from .benchmark import Benchmark, Item, Metric


MAX_FAILED = 0.25
"""An image has no score if a larger share of its questions got no answer, as in `QuestionReward`."""


@dataclass(frozen=True)
class Score:
    """
    The scores that one image got.

    Attributes:
        reward: the main score; None if there is none, which is not 0.
        scores: all of them by name, the main one first.
        answers: P(yes) of each of its questions, None where none came; empty without questions.
        error: why there is no score.
    """

    reward: float | None
    scores: Mapping[str, float | None]
    answers: Sequence[float | None] = ()
    error: str = ""


class Scorer(Protocol):
    """
    Attributes:
        label: the name that numbers are to be labelled with, such as "judge Qwen3-VL-8B".
        settings: all that its scores depend on, for the record; no keys, no addresses.
    """

    label: str
    settings: dict[str, Any]

    def __call__(self, items: Sequence[Item], images: Sequence[Image.Image], thinkings: Sequence[str]) -> list[Score]:
        """Give one score per image."""
        ...


class JudgeScorer:
    """
    A judge's answers to the items' questions, by the benchmark's metric.

    Args:
        asker: a judge, see [`~trl_unigrpo.rewards.common.Asker`].
        metric: the benchmark's.
        name: of the judge's model.
        settings: all else that its answers depend on.
        max_dead_batches: see [`~trl_unigrpo.rewards.common.Breaker`].
    """

    def __init__(
        self,
        asker: Asker,
        metric: Metric,
        name: str,
        settings: Mapping[str, Any] | None = None,
        max_dead_batches: int = 3,
    ):
        self.asker, self.metric = asker, metric
        self.label = f"judge {name}"
        self.settings = {"judge": name, **(settings or {})}
        self._breaker = Breaker(f"The judge {name}", max_dead_batches)

    def __call__(self, items: Sequence[Item], images: Sequence[Image.Image], thinkings: Sequence[str]) -> list[Score]:
        shown = [
            [*read_sources(item.source_images), image] if item.source_images else image
            for item, image in zip(items, images, strict=True)
        ]
        pairs = [(seen, question.text) for item, seen in zip(items, shown, strict=True) for question in item.questions]
        unread = iter(asyncio.run(_answers(self.asker, pairs)))
        error = str(getattr(self.asker, "last_error", "") or "")
        found = [
            question_score(self.metric, item, [next(unread) for _ in item.questions], error or "no answer")
            for item in items
        ]
        self._breaker.observe([score.reward for score in found], error)
        return found


async def _answers(asker: Asker, pairs: Sequence[tuple[Seen, str]]) -> Scores:
    return await asker.ask(pairs) if pairs else []


def question_score(metric: Metric, item: Item, answers: Scores, error: str = "no answer") -> Score:
    """Score one image by the answers to its item's questions."""
    scores = metric(item.questions, answers)
    if sum(answer is None for answer in answers) > MAX_FAILED * len(answers):
        scores = dict.fromkeys(scores)
    reward = next(iter(scores.values()))
    return Score(reward, scores, answers, "" if reward is not None else error)


class ShapeWorldScorer:
    """ShapeWorld's rule: the share of a prompt's checks that hold, whether all do, and how clean the image is."""

    label = "rule"

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {"rule": "shapeworld"}

    def __call__(self, items: Sequence[Item], images: Sequence[Image.Image], thinkings: Sequence[str]) -> list[Score]:
        from ..shapeworld.grammar import parse_prompt
        from ..shapeworld.plan import score_plans
        from ..shapeworld.verifier import images_to_array, read_cells, score

        specs = [parse_prompt(item.prompt) for item in items]
        cells, errors = read_cells(images_to_array(images))
        found = score(specs, cells)
        columns = {
            "reward": found.score,
            "strict": found.strict,
            "plan": score_plans(specs, list(thinkings)),
            "image_error": errors.mean(1),
        }
        rows = zip(*(values.tolist() for values in columns.values()), strict=True)
        return [Score(row[0], dict(zip(columns, row, strict=True))) for row in rows]


class RewardScorer:
    """
    TRL reward functions; the main score is their sum, as in a training, and None where one of them gave none.

    Args:
        rewards: by name. They are called with `prompts`, `completions`, `images` and the rows' columns.
        label: the name that numbers are labelled with.
        settings: for the record.
        total: name of the main score.
    """

    def __init__(
        self,
        rewards: Mapping[str, Callable[..., Any]],
        label: str = "",
        settings: Mapping[str, Any] | None = None,
        total: str = "reward",
    ):
        self.rewards, self.total = dict(rewards), total
        self.label = label or f"rewards {', '.join(rewards)}"
        self.settings = dict(settings) if settings is not None else {"rewards": list(rewards)}

    def __call__(self, items: Sequence[Item], images: Sequence[Image.Image], thinkings: Sequence[str]) -> list[Score]:
        names = dict.fromkeys(name for item in items for name in item.columns if name != "prompt")
        columns = {name: [item.columns.get(name) for item in items] for name in names}
        if any(item.source_images for item in items):
            columns["source_images"] = [read_sources(item.source_images) for item in items]
        prompts = [item.prompt for item in items]
        given: dict[str, list[float | None]] = {}
        for name, reward in self.rewards.items():
            scores = called(reward, prompts=prompts, completions=list(thinkings), images=list(images), **columns)
            if len(scores) != len(items):
                raise ValueError(f"The reward {name} gave {len(scores)} scores for {len(items)} images.")
            given[name] = [finite(score) for score in scores]
        found = []
        for row in zip(*given.values(), strict=True):
            total = None if None in row else float(sum(row))
            parts = dict(zip(given, row, strict=True)) if len(given) > 1 else {}
            found.append(Score(total, {self.total: total, **parts}, error="" if total is not None else self._why(row)))
        return found

    def _why(self, row: Sequence[float | None]) -> str:
        failed = [
            (name, reward) for (name, reward), score in zip(self.rewards.items(), row, strict=True) if score is None
        ]
        return "; ".join(f"{name}: {getattr(reward, 'last_error', '') or 'no score'}" for name, reward in failed)


def called(reward: Callable[..., Any], **arguments: Any) -> Sequence[float | None]:
    """Call a reward function, asynchronous or not."""
    scores = reward(**arguments)
    return asyncio.run(scores) if inspect.iscoroutine(scores) else scores


def detector_scorer(detector: Any, colors: Any, name: str) -> RewardScorer:
    """
    Score by GenEval's own rule, with a detector and a CLIP.

    Args:
        detector, colors: see [`GenEvalReward`].
        name: of the detector, for the label.
    """
    from ..rewards.geneval.geneval_reward import GenEvalReward

    reward = GenEvalReward(metadata_column="row", detector=detector, colors=colors)

    def strict(prompts: Sequence[str], images: Sequence[Image.Image], **columns: Any) -> Scores:
        keys = ("tag", "include", "exclude")
        rows = [
            {key: columns[key][i] for key in keys if columns.get(key) and columns[key][i]} for i in range(len(prompts))
        ]
        return reward(prompts, images=images, row=rows)

    return RewardScorer({"correct": strict}, f"detector {name}", {"detector": name}, total="correct")


def scorer_kind(benchmark: Benchmark) -> str:
    """Name the kind of scorer that fits a benchmark: "rule", "detector", "judge" or "rewards"."""
    if benchmark.name == "shapeworld":
        return "rule"
    if benchmark.name == "geneval":
        return "detector"
    return "judge" if benchmark.metric is not None else "rewards"
