"""The hooks by which prompts show source images, and images have their sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..models.patching import attributes
from ..models.sources import Sources, place_sources, show_sources, shown_images, source_fault, with_sources
from ..trajectory import Round, Trajectory
from .run_keeping import RunKeeping
from .setup import Setup
from .source_checks import LEAVE_OUT, SOURCE_COLUMNS, check_sources
from .turn_checks import check_turns
from .windows import draw_size


class EditingRun(RunKeeping):
    """
    A run whose dataset may have source images, or whose images have several sizes.

    Sources are read and encoded once for each group, and shown by placeholders in the tokens of its prompts. Without
    a column of them, and with one size, nothing here does anything.
    """

    _setup: Setup
    _sources: Sequence[Sources] = ()

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            given = {"eval_dataset": eval_dataset}
            for column, trained, found in (
                ("'source_image' or 'source_images'", self._setup.edits, check_sources(given, self.args)),
                ("'turns'", self._setup.stories, check_turns(given, self.args)),
            ):
                if found != trained:
                    raise ValueError(
                        f"A column {column}: train_dataset {'has' if trained else 'has not'} one, eval_dataset "
                        "differs. Evaluate on prompts like those trained on."
                    )
        return super().evaluate(eval_dataset, *args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._sources = self._group_sources(inputs) if self._setup.edits else ()
        return super()._generate_and_score_completions(inputs)

    def _group_sources(self, rows: Sequence[dict[str, Any]]) -> list[Sources]:
        """Show the model each group's source images, and leave the rows with `source_images`, lists of RGB images."""
        first, sources, groups = self.accelerator.process_index * len(rows), [], {}
        for place, row in enumerate(rows, start=first):
            column = next((name for name in SOURCE_COLUMNS if name in row), SOURCE_COLUMNS[0])
            value, group = row.pop(column, None), place // self.group_size
            if group not in groups:
                if (fault := source_fault(value)) is not None:
                    raise ValueError(
                        f"The {column} of the prompt {row['prompt']!r} is {fault}. {LEAVE_OUT.format(column)}"
                    )
                groups[group] = show_sources(self.unified, value, self.args.sizes(self.mode == "train")[0])
            row["source_images"] = groups[group].originals
            sources.append(groups[group])
        return sources

    def with_sources(self, trajectories: list[Trajectory]) -> list[Trajectory]:
        """Let trajectories show the source images of their prompts, and have the sizes of their groups."""
        training = self.mode == "train"
        if len(self.args.sizes(training)) == 1:
            return with_sources(trajectories, self._sources)
        generation, groups = self.generation if training else 0, [t.row // self.group_size for t in trajectories]
        sizes = {group: draw_size(self.args, training, generation, group) for group in set(groups)}
        return [replace(t, size=sizes[group]) for t, group in zip(trajectories, groups, strict=True)]

    def read_as(
        self, trajectories: Sequence[Trajectory], completion_ids: Sequence[list[int]]
    ) -> list[Trajectory] | None:
        """Say what TRL's rows of one round are read as; None where they show no image, and are what they are."""
        if not shown_images(self.unified, self._sources):
            return None
        return [replace(t, rounds=[Round(ids)]) for t, ids in zip(trajectories, completion_ids, strict=True)]

    # Text

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        prompt_ids, *others = super()._tokenize_prompts(prompts)
        placed = place_sources(
            self.unified, self._tokenizer, prompts, prompt_ids, self._sources, **self.chat_template_kwargs
        )
        return placed, *others

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        base = self.unified
        sources = self._sources[:: len(self._sources) // len(prompt_ids) or 1]  # several rows may share a thinking
        if not (shown := shown_images(base, sources)):
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        with attributes(base, generate=partial(base.generate, **shown)):
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    # Sizes

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        of_several = bool(self._sources) or len(self.args.sizes(training=True)) > 1
        if self.mode == "eval" or self._buffered_inputs is before or not of_several:
            return inputs
        self._buffered_inputs = of_one_size(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]


def of_one_size(batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """
    Deal the rows of micro-batches anew where images of several sizes are in one. Rows stay in their random order, and
    so do the micro-batches.

    Args:
        batches: each with its `trajectories`, if images are trained; of each size there are rows for whole ones.
    """
    rows = [trajectory for batch in batches for trajectory in batch.get("trajectories", ())]
    sizes, each = [row.size for row in rows], len(rows) // len(batches)
    if len(set(sizes)) < 2:
        return [dict(batch) for batch in batches]
    order = sorted(range(len(rows)), key=lambda place: sizes.index(sizes[place]))  # stable
    chosen = [order[start : start + each] for start in range(0, len(order), each)]
    chosen = [chosen[place] for place in torch.randperm(len(chosen)).tolist()]
    whole = {key: _joined([batch[key] for batch in batches]) for key in batches[0]}
    return [{key: taken(value, places) for key, value in whole.items()} for places in chosen]


def _joined(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Tensor) and values[0].ndim:
        return torch.cat(list(values))
    return [item for value in values for item in value] if isinstance(values[0], list) else values[0]


def taken(value: Any, places: list[int]) -> Any:
    """Take some rows of what TRL's buffer holds of all: tensors, lists, or one value for all."""
    if isinstance(value, Tensor) and value.ndim:
        return value[places]
    return [value[place] for place in places] if isinstance(value, list) else value
