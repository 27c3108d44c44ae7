"""The books of a run: what watchers are told, logs, checkpoints, the model card."""

import math
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, reduce, send_to_device
from torch import Tensor
from transformers.trainer_utils import has_length

from ..models.patching import attributes
from ..monitoring.events import Generation, Rollout, Watcher
from ..monitoring.image_statistics import image_statistics
from ..monitoring.progress import Phases
from ..monitoring.watchdog import under_watch
from ..reporting.completion_images import write_completion_images
from ..reporting.gallery import Gallery
from ..reporting.model_card import rewrite_card
from ..trajectory import Trajectory
from .averages import AveragedRun
from .checkpoint import load_rollouts, save_rollouts
from .dataset_checks import check_dataset
from .kept import KeptVelocities
from .scoring import RewardBook
from .setup import Setup
from .training_loop import EpochsInOrder
from .trl_bridge import TextAndVelocities
from .unigrpo_config import UniGRPOConfig


@dataclass
class Progress:
    """
    The work in progress of a step, handed from one of TRL's hooks to the next.

    Attributes:
        trajectories: of the rollout that is being rewarded.
        inputs: the dataset's rows that it is made of.
        walk: its rounds, where there are several.
        told: of these rounds, for watchers.
        reading: trajectories whose texts are being read, where these show images.
        forward: of the micro-batch whose loss is being computed.
        parts: metrics of the image's objective, of the parts of the micro-batch, each times its share of the whole.
        metrics: the same of the optimizer step's micro-batches, over all processes.
        learning_rates: that the last optimizer step used, for the log.
        eval_rows: trajectories of the evaluation so far.
        eval_total: trajectories of the whole evaluation; None where its length is not known.
        eval_counts: how many each of its batches had.
        real: how many trajectories of the batch count; None for all. Accelerate fills an evaluation's last batch with
            rows of the first.
        eval_prefix: of its metrics' names.
        images: of the last generation batches, for the log's tables.
        resumed_log: what a checkpoint had ready for its next log, until the first step.
    """

    trajectories: list[Trajectory] = field(default_factory=list)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    walk: Any = None
    told: list[Any] = field(default_factory=list)
    reading: Sequence[Trajectory] | None = None
    forward: TextAndVelocities | None = None
    parts: list[dict[str, Tensor]] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    learning_rates: dict[str, float] = field(default_factory=dict)
    eval_rows: int = 0
    eval_total: int | None = None
    eval_counts: list[int] = field(default_factory=list)
    real: int | None = None
    eval_prefix: str = "eval"
    images: deque[Any] = field(default_factory=deque)
    resumed_log: dict[str, Any] | None = None


def gathered_means(accelerator: Accelerator, metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Average scalars over processes: all in one gather, and one wait for the device."""
    own = torch.stack([value.detach().float() for value in metrics.values()])
    return dict(zip(metrics, accelerator.gather(own[None]).mean(0).tolist(), strict=True))


def _plain(value: Any) -> Any:
    """Turn a log's table into what a checkpoint keeps of it: texts and numbers, no images."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, (str, bool, int, float)) else None


class RunKeeping(AveragedRun):
    """The hooks of `GRPOTrainer` that are not the algorithm. [`UniGRPOTrainer`] sets the attributes."""

    args: UniGRPOConfig
    num_generations: int
    reward_weights: Tensor

    _book: RewardBook
    _kept: KeptVelocities
    _phases: Phases
    _progress: Progress
    _setup: Setup
    _baseline: float | None = None  # of later rounds' rewards: see credit.py

    @property
    def mode(self) -> str:
        """Name of TRL's metrics now: "train" or "eval"."""
        return "train" if self.model.training else "eval"

    @property
    def group_size(self) -> int:
        """Trajectories of one prompt."""
        return self.num_generations if self.mode == "train" else self.num_generations_eval

    @property
    def generation(self) -> int:
        """Number of the generation batch that is trained on: the same however it is cut into micro-batches."""
        return self._step // self._generation_steps

    @property
    def _trains_image(self) -> bool:
        return self.model.training and self._setup.trains["image"]

    def rows(self, count: int) -> range:
        """Give the places of this process' trajectories in the generation batch, or in the whole evaluation."""
        first = self.accelerator.process_index * count
        if self.mode == "eval":
            first += self._progress.eval_rows
            self._progress.eval_rows += count * self.accelerator.num_processes
        return range(first, first + count)

    # Each row once

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        rows = len(dataloader.dataset) if has_length(dataloader.dataset) else None
        self._progress.eval_total = rows and rows * self.num_generations_eval
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def _generate(self, prompts: list[Any]) -> Any:
        """Sample texts, whose lengths TRL gathers for its metrics: there, too, only rows that count."""
        progress, gather = self._progress, self.accelerator.gather
        if self.mode == "train":
            progress.real = None
            return super()._generate(prompts)
        count, total = len(prompts) * self.accelerator.num_processes, progress.eval_total
        real = progress.real = count if total is None else min(count, total - sum(progress.eval_counts))
        progress.eval_counts.append(real)
        with attributes(self.accelerator, gather=lambda tensor: gather(tensor)[:real]):
            return super()._generate(prompts)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        outputs = super()._generate_and_score_completions(inputs)
        if self.mode == "eval" and (real := self._progress.real):
            # TRL counts groups without a reward among those that differ, but for groups of one, which are all alike.
            shares = self._metrics["eval"]["frac_reward_zero_std"]
            shares[-1] = min(1.0, shares[-1] * len(self._book.rewards) / real)
        return outputs

    # The precision of the rollout

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        # One autocast for all tokens: it casts each trained weight once and keeps it. vLLM has a precision of its own.
        with nullcontext() if self.use_vllm else self.accelerator.autocast():
            return super()._generate_single_turn(*args, **kwargs)

    # What watchers are told

    @property
    def _watchers(self) -> list[Watcher]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, Watcher)]

    def _tell(self, event: str, **what: Any) -> None:
        """Call an event of all watchers, as TRL's own events are called."""
        for watcher in self._watchers:
            callbacks = self.callback_handler.callbacks
            getattr(watcher, event)(self.args, self.state, self.control, model=self.model, callbacks=callbacks, **what)

    def _tell_rollout(self, trajectories: list[Trajectory], windows: Tensor | None = None, number: int = 0) -> None:
        """
        Tell watchers of images that were painted in a round; `windows` are those of all processes, where they are to
        agree.
        """
        objective = self._setup.objective
        transition = partial(objective.transition, rounds=number) if objective.stochastic else None
        self._tell("on_rollout", rollout=Rollout(trajectories, self.num_generations, transition, windows))

    def _show(self, rows: Sequence[dict[str, Any]], advantages: Tensor) -> None:
        """Show the generation batch, of which these are this process' rows, to watchers and to the log's tables."""
        logs_images = self.args.log_completions and (self.log_multimodal or self.args.log_completions_images)
        if not (logs_images or self._watchers):
            return
        observed = self._observed(rows, advantages)
        if logs_images:
            shown = list(observed.fetch(range(len(observed.prompts))).values())
            self._progress.images.extend(shown)
            if self.log_multimodal:
                self._logs["images"].extend([image] for image in shown)
        counted = observed.first_of(self._progress.real)
        self._tell("on_generation", generation=counted, metrics=self._metrics[self.mode])

    def _observed(self, rows: Sequence[dict[str, Any]], advantages: Tensor) -> Generation:
        """Describe the generation batch of all processes."""
        book, images, scored = self._book, [row["images"] for row in rows], gather_object(self._book.rows)
        columns = sorted({name for row in scored for name in row["extra"]})
        names = self.reward_func_names
        return Generation(
            mode=self.mode,
            group_size=self.group_size,
            prompts=[row["prompt"] for row in scored],
            thinking=[row["thinking"] for row in scored],
            images=images,
            first=self.accelerator.process_index * len(images),
            statistics=gather_object([image_statistics(image) for image in images]),
            rewards={name: book.rewards[:, i].tolist() for i, name in enumerate(names)},
            weights={names[i]: book.weights[i].item() for i in (~book.is_process).nonzero()[:, 0]},
            advantages=self.accelerator.gather(advantages).tolist(),
            extra={name: [row["extra"].get(name) for row in scored] for name in columns},
        )

    # Metrics and logs

    def _note(self, metrics: Mapping[str, float]) -> None:
        """Add to the values that the next log averages."""
        for name, value in metrics.items():
            self._metrics[self.mode][name].append(value)

    def _note_parts(self) -> None:
        """Note the metrics of a micro-batch's images: gathered once, as not every process has as many parts."""
        parts, self._progress.parts = self._progress.parts, []
        whole = {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]}
        for name, mean in gathered_means(self.accelerator, whole).items():
            self._note({name: mean})
            self._progress.metrics.setdefault(name, []).append(mean)

    def _record_seconds(self, phase: str, seconds: float) -> None:
        self._note({f"time/{phase}": seconds})

    def _note_speed(self, images: int) -> None:
        """Say how many images a second the painting that has just ended made."""
        seconds = self._metrics[self.mode]["time/paint"][-1]
        self._note({"time/images_per_second": images * self.accelerator.num_processes / seconds})

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with under_watch(self.accelerator, self._phases, self.args.ddp_timeout):
                return super().train(*args, **kwargs)
        finally:  # an error leaves an update half done
            self._phases.stop()
            self._progress.forward = self._progress.reading = self._progress.walk = None
            self._progress.told, self._progress.parts = [], []
            self._progress.metrics.clear()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            check_dataset(eval_dataset, "eval_dataset")
        self._progress.eval_rows, self._progress.eval_prefix = 0, metric_key_prefix
        self._progress.eval_counts.clear()
        device = self.accelerator.device
        # Every evaluation draws the same thinkings and the same noise, and training goes on as if there had been none.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.args.seed + self.accelerator.process_index)
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        if "learning_rate" in logs:
            logs.update(self._progress.learning_rates)
        if self.mode == "eval":  # TRL names the metrics of all evaluation sets alike
            logs.update(self._eval_means())
        super().log(logs, start_time)
        if self._progress.images and self.args.log_completions_images and self.accelerator.is_main_process:
            columns = {
                "prompt": list(self._logs["prompt"]),
                "completion": list(self._logs["completion"]),
                **{name: list(values) for name, values in self._logs["rewards"].items()},
                "advantage": list(self._logs["advantages"]),
            }
            write_completion_images(self.args.output_dir, self.state.global_step, columns, self._progress.images)

    def _eval_means(self) -> dict[str, float | None]:
        """Take the metrics of an evaluation, under the name of its dataset: each batch counts by its rows."""
        means: dict[str, float | None] = {}
        for name, values in self._metrics["eval"].items():
            counts = self._progress.eval_counts
            shares = [n / counts[0] for n in counts] if len(values) == len(counts) else [1.0] * len(values)
            known = [(value, share) for value, share in zip(values, shares, strict=True) if not math.isnan(value)]
            whole = sum(value * share for value, share in known)
            means[f"{self._progress.eval_prefix}_{name}"] = whole / sum(share for _, share in known) if known else None
        self._metrics["eval"].clear()
        return means

    # Checkpoints and the card

    def _add_to_checkpoint(self, folder: Path) -> None:
        super()._add_to_checkpoint(folder)
        passes_left = self._step % self._generation_steps
        state = {
            "step": self._step,
            "geometry": self._geometry,
            "buffer": self._buffered_inputs if passes_left else None,
            "velocities": self._kept.state() if passes_left else {},
            "baseline": self._baseline,
            "log": self._open_log(),
        }
        save_rollouts(folder, self.accelerator.process_index, state, self.unified.context_types)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> EpochsInOrder:
        return EpochsInOrder(super()._get_train_sampler(*args, **kwargs), lambda: int(self.state.epoch or 0))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._resume_generation(checkpoint)

    def _resume_generation(self, checkpoint: str) -> None:
        """Go on where a checkpoint stands between the passes over a generation batch, if all processes can."""
        types, processes = self.unified.context_types, self.accelerator.num_processes
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        own = load_rollouts(checkpoint, self.accelerator.process_index, types)
        fits = own is not None and own["geometry"] == self._geometry
        known = own if own is not None else load_rollouts(checkpoint, 0, types)
        ended = known is not None and known["buffer"] is None and self._step % self._generation_steps == 0
        # A process that samples anew while another trains would wait for it for ever, and it for this one.
        able = reduce(torch.tensor(float(fits or ended), device=self.args.device), reduction="sum")
        if known is None or able < processes:
            warnings.warn(
                f"{checkpoint} has no rollouts of a run with these batch sizes and processes, or not for each of its "
                "processes. Training goes on, but a generation batch that was in use is sampled anew."
            )
            return
        self._baseline = known.get("baseline")
        if fits:
            # TRL's tensors go to the device; trajectories are no containers to it, and stay.
            self._step, self._buffered_inputs = known["step"], send_to_device(known["buffer"], self.accelerator.device)
            self._kept.restore(known["velocities"])
            self._progress.resumed_log = known.get("log")

    def _open_log(self) -> dict[str, Any]:
        """Give what the next log will average, of the steps since the last, and the texts of its table."""
        tells = self.args.log_completions and self.accelerator.is_main_process
        return {
            "metrics": self._metrics["train"],
            "loss": self._tr_loss,
            "since": self._globalstep_last_logged,
            "table": _plain({name: values for name, values in self._logs.items() if tells and name != "images"}),
        }

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        log, self._progress.resumed_log = self._progress.resumed_log, None
        if log is not None:  # transformers has just begun one
            self._metrics["train"].update(log["metrics"])
            self._tr_loss, self._globalstep_last_logged = log["loss"].to(self.args.device), log["since"]
            for name, kept in log["table"].items():
                columns = kept.items() if isinstance(kept, dict) else [(None, kept)]
                for column, values in columns:
                    (self._logs[name] if column is None else self._logs[name][column]).extend(values)
        return super().get_batch_samples(*args, **kwargs)

    @property
    def _generation_steps(self) -> int:
        """Micro-steps that a generation batch is used for."""
        return self.args.steps_per_generation * self.num_iterations

    @property
    def _geometry(self) -> list[int]:
        """Describe how a generation batch is cut: rollouts are of use to a run that cuts them alike."""
        args = self.args
        sizes = [args.per_device_train_batch_size, args.steps_per_generation, self.num_iterations]
        return [self.accelerator.num_processes, *sizes]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, Gallery):
                    callback.wait()
            names, book = self.reward_func_names, self._book
            rewrite_card(
                Path(self.args.output_dir) / "README.md",
                self.accelerator.unwrap_model(self.model),
                self.args,
                self.state.global_step,
                rewards=dict(zip(names, book.weights.tolist(), strict=True)),
                process=[name for name, of_text in zip(names, book.is_process.tolist(), strict=True) if of_text],
                source=self.hub_model_id or self.args.output_dir,
            )
