"""Supervised fine-tuning of a unified model: cross-entropy on the thinking and flow matching on the image at once.

Shapes: B samples, T text tokens, K noise draws per image, `latent` the model's own latent dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from ..flow import line_state, shift_timesteps
from ..flow.states import LinePoints
from ..models.adapters import check_own_adapters, load_trainable
from ..models.contract import UnifiedModelMixin, check_contract
from ..models.prompts import as_messages, choose_system_prompt, system_ids
from ..models.registry import unified_model
from ..models.sources import place_images
from ..models.tokenizer import check_messages
from ..seeding import EVAL, TRAIN, row_generator
from ..trajectory import Image, Round, Steps, Trajectory
from .arguments import find_tokenizer
from .config_numbers import read_numbers
from .dataset_checks import check_rows, check_special_tokens
from .engines import settle_engine
from .evaluation_checks import check_evaluation
from .prompt_checks import CheckedRows
from .reward_checks import callback_list
from .training_loop import TrainingLoop
from .trl_bridge import take_steps
from .whole_checkpoints import check_writable


COLUMNS = ("prompt", "completion", "image")
SOURCE_IMAGE = "source_image"


@dataclass
class UnifiedSFTConfig(TrainingArguments):
    r"""
    Configuration of [`UnifiedSFTTrainer`]; the defaults are those of BAGEL's own training where it has them.

    Parameters:
        text_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the cross-entropy.
        flow_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the flow matching loss.
        noise_draws (`int`, *optional*, defaults to `1`):
            Noisy copies of each image per step. They share the text's forward.
        timestep_sampling (`str`, *optional*, defaults to `"logit_normal"`):
            Distribution of the time before the shift: `"logit_normal"` (BAGEL's) or `"uniform"`.
        timestep_shift (`float`, *optional*, defaults to `1.0`):
            Shift of the time in training.
        flow_context_grad (`str`, *optional*, defaults to `"full"`):
            Whether the image's loss stops at (`"detach"`) or flows through (`"full"`) the text that the image saw.
        context_dropout (`float`, *optional*, defaults to `0.0`):
            Share of images that see what guidance at sampling leaves of a context, the system message. BAGEL: 0.1.
        system_prompt (`str`, *optional*, defaults to `"auto"`):
            As in [`UniGRPOConfig`]. Rows without a completion get none.
    """

    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Columns are chosen by the collator."})
    dataloader_pin_memory: bool = field(
        default=True, metadata={"help": "Pin the data loaders' memory, where there is a GPU."}
    )
    adam_epsilon: float = field(default=1e-15, metadata={"help": "Adam's epsilon. BAGEL: 1e-15."})
    text_weight: float = field(default=1.0, metadata={"help": "Weight of the cross-entropy."})
    flow_weight: float = field(default=1.0, metadata={"help": "Weight of the flow matching loss."})
    noise_draws: int = field(default=1, metadata={"help": "Noisy copies of each image per step."})
    timestep_sampling: str = field(default="logit_normal", metadata={"help": "'logit_normal' or 'uniform'."})
    timestep_shift: float = field(default=1.0, metadata={"help": "Shift of the training times."})
    flow_context_grad: str = field(default="full", metadata={"help": "'detach' or 'full'."})
    context_dropout: float = field(
        default=0.0,
        metadata={"help": "Share of images that see the context of guidance. BAGEL: 0.1."},
    )
    system_prompt: str = field(default="auto", metadata={"help": "'auto': the model's own; '': none."})

    def __post_init__(self) -> None:
        settle_engine(self)
        read_numbers(self)
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        for name, choices in {
            "timestep_sampling": ("logit_normal", "uniform"),
            "flow_context_grad": ("detach", "full"),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(map(repr, choices))}.")
        if self.noise_draws < 1:
            raise ValueError(f"noise_draws={self.noise_draws}: expected at least 1.")
        if not 0 <= self.context_dropout <= 1:
            raise ValueError(f"context_dropout={self.context_dropout}: expected a share from 0 to 1.")
        if self.timestep_shift <= 0:
            raise ValueError(f"timestep_shift={self.timestep_shift}: expected a positive number.")
        for name in ("text_weight", "flow_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected 0 or more.")
        if self.text_weight == 0 and self.flow_weight == 0:
            raise ValueError("text_weight and flow_weight are both 0: nothing would be trained. Raise one of them.")
        super().__post_init__()


@dataclass
class UnifiedCollator:
    """
    Makes batches of rows with `prompt`, `completion` (the thinking; empty or None for none), `image` (PIL) and, where
    the prompt shows a finished image, `source_image` (PIL; None for none), which goes before the prompt's own words.
    A prompt that shows one may have no words, []: its completion is then a caption.

    Returns `input_ids`, `attention_mask` and `labels` (B, T), right-padded, labels -100 off the thinking; `prompts`
    (conversations with their system message), `prompt_ids` and `completion_ids`, lists; `source_images`, a list of
    those of each row; and `pixels` (B, 3, H, W) in [-1, 1].
    """

    tokenizer: PreTrainedTokenizerBase
    system_prompt: str | None
    image_placeholder: int | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        thinks = [bool(row.get("completion")) for row in rows]
        messages = [
            as_messages(row["prompt"], self.system_prompt if on else None)
            for row, on in zip(rows, thinks, strict=True)
        ]
        check_messages([*messages, *(row.get("completion") or "" for row in rows)], self.tokenizer)
        prompts = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
        sources = [[] if row.get(SOURCE_IMAGE) is None else [row[SOURCE_IMAGE]] for row in rows]
        if any(sources):
            assert self.image_placeholder is not None  # the trainer has looked
            heads, counts = system_ids(self.tokenizer, messages), [len(shown) for shown in sources]
            prompts = place_images(self.image_placeholder, prompts, heads, counts)
        thinkings = [row["completion"] if on else "" for row, on in zip(rows, thinks, strict=True)]
        completions = [
            ids + [self.tokenizer.eos_token_id] if on else []
            for ids, on in zip(self.tokenizer(thinkings)["input_ids"], thinks, strict=True)
        ]
        texts = [torch.tensor(p + c) for p, c in zip(prompts, completions, strict=True)]
        ids, lengths = pad_sequence(texts, batch_first=True), torch.tensor([len(text) for text in texts])
        column = torch.arange(ids.shape[1])
        starts = torch.tensor([len(prompt) for prompt in prompts])
        real = column < lengths[:, None]
        sizes = {row["image"].size for row in rows}
        if len(sizes) > 1:
            raise ValueError(
                f"images of one batch have the sizes {sorted(sizes)} (width x height). Resize them to one size."
            )
        pixels = np.stack([np.asarray(row["image"].convert("RGB"), dtype=np.float32) for row in rows])
        return {
            "input_ids": ids,
            "attention_mask": real.long(),
            "labels": ids.masked_fill(~real | (column < starts[:, None]), -100),
            "prompts": messages,
            "prompt_ids": prompts,
            "completion_ids": completions,
            "source_images": sources,
            "pixels": torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1,
        }


class UnifiedSFTTrainer(TrainingLoop):
    """
    Trainer for supervised fine-tuning of a unified model on rows of prompt, thinking and image.

    Args:
        model (`str` or `PreTrainedModel`): a unified model, or the folder or hub id of one.
        args ([`UnifiedSFTConfig`]): configuration.
        train_dataset, eval_dataset: rows with the columns `prompt`, `completion` and `image`, and `source_image` where
            prompts show a finished image.
        processing_class (`PreTrainedTokenizerBase`, *optional*): tokenizer; from the model's folder by default.
    """

    args: UnifiedSFTConfig
    # `compute_loss` returns what is still to be divided by the number of micro-batches.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: UnifiedSFTConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ):
        columns: set[str] = set()
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if dataset is not None:
                found = check_rows(
                    dataset, name, COLUMNS, args if name == "train_dataset" else None, shown=[SOURCE_IMAGE]
                )
                columns.update(*found.values())
        check_writable(args)
        check_evaluation(args, eval_dataset)
        kwargs["callbacks"] = callback_list(kwargs.get("callbacks"))
        if isinstance(model, str):
            model = load_trainable(model, None, dtype=torch.float32)
        base = unified_model(model)
        check_contract(base)
        if SOURCE_IMAGE in columns and base.image_placeholder is None:
            raise ValueError(
                f"The dataset has a column {SOURCE_IMAGE}, but {type(base).__name__} paints from text alone: remove "
                f'the column (`dataset.remove_columns("{SOURCE_IMAGE}")`), or take a model that sees, such as BAGEL.'
            )
        check_own_adapters(model)
        take_steps(base)
        if args.context_dropout:
            base.branch_contexts([Trajectory("", [], system_ids=[])], "text")  # raises where the model has none
        tokenizer = find_tokenizer(base, processing_class, model.config.name_or_path)
        check_special_tokens({"train_dataset": train_dataset, "eval_dataset": eval_dataset}, tokenizer)
        system = choose_system_prompt(base, args.system_prompt)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            data_collator=CheckedRows(UnifiedCollator(tokenizer, system, base.image_placeholder), SOURCE_IMAGE),
            **kwargs,
        )
        base.check_trained_weights()
        self.model_accepts_loss_kwargs = True  # so that the tokens of an optimizer step are counted
        self._sums: dict[str, list[float]] = {}
        self._batches = 0  # of this process, in the optimizer step or the evaluation

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._batches = 0
        return super().get_batch_samples(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        steps = self._noisy_copies(unified_model(self.accelerator.unwrap_model(model)), inputs)
        labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
        scored = labels != -100
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            steps=steps,
            context_grad=self.args.flow_context_grad == "full",
            scored=scored,
        )
        text_loss = F.cross_entropy(outputs.logits.float(), labels[scored], reduction="sum")
        text_loss = text_loss / self._tokens(scored.sum(), num_items_in_batch)
        flow_loss = F.mse_loss(outputs.velocity.float(), steps.states.target)
        for name, value in (("loss/text", text_loss), ("loss/flow", flow_loss)):
            self._sums.setdefault(name, []).append(value.item())
        loss = self.args.text_weight * text_loss + self.args.flow_weight * flow_loss
        return (loss, outputs) if return_outputs else loss

    def _tokens(self, scored: Tensor, of_step: Tensor | None) -> Tensor:
        """Give what a micro-batch's sum is divided by: its tokens or, where known, the optimizer step's per batch."""
        if of_step is None:
            return scored.clamp(min=1)
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return of_step.clamp(min=1) / (processes * self.current_gradient_accumulation_steps)

    def _noisy_copies(self, base: UnifiedModelMixin, inputs: dict[str, Any]) -> Steps:
        """Make the table of K noisy copies of each image, points on lines from noise to it."""
        args, pixels = self.args, inputs["pixels"]
        clean = base.encode_images(pixels).float()
        size = (pixels.shape[-2], pixels.shape[-1])
        sources = [image for images in inputs["source_images"] for image in images]
        shown = iter(base.read_images(sources) if sources else ())
        keys = ("prompts", "prompt_ids", "completion_ids", "source_images")
        trajectories = [
            Trajectory(prompt, ids, rounds=[Round(text)], images=[next(shown) for _ in images])
            for prompt, ids, text, images in zip(*(inputs[key] for key in keys), strict=True)
        ]
        contexts = hidden = base.contexts(trajectories)
        if args.context_dropout:
            systems = system_ids(self.processing_class, inputs["prompts"])
            unguided = [replace(t, system_ids=ids) for t, ids in zip(trajectories, systems, strict=True)]
            hidden = base.branch_contexts(unguided, "text")
        draws, uniform = args.noise_draws, args.timestep_sampling == "uniform"
        for i, generator in enumerate(self._generators(len(clean))):
            u = (torch.rand if uniform else torch.randn)(draws, generator=generator)
            u = u if uniform else u.sigmoid()
            t = shift_timesteps(u, args.timestep_shift).float()
            noise = torch.randn(draws, *clean.shape[1:], generator=generator).to(clean)
            dropped = torch.rand((), generator=generator) < args.context_dropout
            points = LinePoints(x=line_state(clean[i], noise, t.to(clean.device)), t=t, target=noise - clean[i])
            context = (hidden if dropped else contexts)[i]
            trajectories[i].rounds[-1].images.append(Image(clean[i], size, context, points))
        return Steps.of(trajectories)

    def _generators(self, count: int) -> list[torch.Generator]:
        """
        Make a random stream for each row of a micro-batch, by its place in the optimizer step, or in the evaluation,
        of all processes: however rows are cut into batches, each gets the same times and noise.
        """
        training, processes = self.model.training, self.accelerator.num_processes
        size = self.args.train_batch_size if training else self.args.eval_batch_size
        first = (self._batches * processes + self.accelerator.process_index) * size
        self._batches += 1
        key = (self.args.seed, TRAIN, self.state.global_step) if training else (self.args.seed, EVAL, 0)
        return [row_generator(*key, first + i) for i in range(count)]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._batches = 0
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        base = unified_model(self.accelerator.unwrap_model(self.model))
        base.save_adapters(output_dir or self.args.output_dir)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        timed = (name.removesuffix("runtime") for name in logs if name.endswith("_runtime"))
        prefix = next((name for name in timed if name != "train_"), "")  # of an evaluation, by its dataset
        for name, values in self._sums.items():
            mean = torch.tensor(sum(values) / len(values), device=self.accelerator.device)
            logs[prefix + name] = self.accelerator.reduce(mean, "mean").item()
        self._sums.clear()
        super().log(logs, start_time)
