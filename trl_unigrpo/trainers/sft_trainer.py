"""Supervised fine-tuning of a unified model: cross-entropy on the thinking and flow matching on the image at once.

Shapes: B samples, T text tokens, K noise draws per image, `latent` the model's own latent dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from ..flow import line_state, shift_timesteps
from ..flow.states import LinePoints
from ..models.contract import UnifiedModelMixin, check_contract
from ..models.prompts import as_messages, choose_system_prompt
from ..models.registry import load_unified_model, unified_model
from ..models.tokenizer import check_messages
from ..trajectory import Image, Round, Steps, Trajectory
from .arguments import find_tokenizer
from .dataset_checks import check_columns, check_special_tokens
from .trl_bridge import take_steps


COLUMNS = ("prompt", "completion", "image")


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
            Share of images that see no context, which guidance at sampling needs. BAGEL: 0.1.
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
        metadata={"help": "Share of images that see no context. BAGEL: 0.1."},
    )
    system_prompt: str = field(default="auto", metadata={"help": "'auto': the model's own; '': none."})

    def __post_init__(self) -> None:
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
    Makes batches of rows with `prompt`, `completion` (the thinking; empty or None for none) and `image` (PIL).

    Returns `input_ids`, `attention_mask` and `labels` (B, T), right-padded, labels -100 off the thinking; `prompts`,
    `prompt_ids` and `completion_ids`, lists; and `pixels` (B, 3, H, W) in [-1, 1].
    """

    tokenizer: PreTrainedTokenizerBase
    system_prompt: str | None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        thinks = [bool(row.get("completion")) for row in rows]
        messages = [
            as_messages(row["prompt"], self.system_prompt if on else None)
            for row, on in zip(rows, thinks, strict=True)
        ]
        check_messages([*messages, *(row.get("completion") or "" for row in rows)], self.tokenizer)
        prompts = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
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
            "prompts": [row["prompt"] for row in rows],
            "prompt_ids": prompts,
            "completion_ids": completions,
            "pixels": torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1,
        }


class UnifiedSFTTrainer(Trainer):
    """
    Trainer for supervised fine-tuning of a unified model on rows of prompt, thinking and image.

    Args:
        model (`str` or `PreTrainedModel`): a unified model, or the folder or hub id of one.
        args ([`UnifiedSFTConfig`]): configuration.
        train_dataset, eval_dataset: rows with the columns `prompt`, `completion` and `image`.
        processing_class (`PreTrainedTokenizerBase`, *optional*): tokenizer; from the model's folder by default.
    """

    args: UnifiedSFTConfig
    # `compute_loss` returns the mean of a micro-batch.
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
        source = model if isinstance(model, str) else None
        if isinstance(model, str):
            model = load_unified_model(model, dtype=torch.float32)
        base = unified_model(model)
        check_contract(base)
        take_steps(base)
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if dataset is not None:
                check_columns(dataset, name, COLUMNS)
        tokenizer = find_tokenizer(base, processing_class, source or model.config.name_or_path)
        check_special_tokens({"train_dataset": train_dataset, "eval_dataset": eval_dataset}, tokenizer)
        system = choose_system_prompt(base, args.system_prompt)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            data_collator=UnifiedCollator(tokenizer, system),
            **kwargs,
        )
        base.check_trained_weights()
        self._sums: dict[str, list[float]] = {}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        base = unified_model(self.accelerator.unwrap_model(model))
        steps = self._noisy_copies(base, inputs)
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            steps=steps,
            context_grad=self.args.flow_context_grad == "full",
        )
        labels = inputs["labels"][:, 1:]
        scored = labels != -100
        logits = base.get_output_embeddings()(outputs.last_hidden_state[:, :-1][scored])
        text_loss = F.cross_entropy(logits.float(), labels[scored]) if scored.any() else logits.sum()
        flow_loss = F.mse_loss(outputs.velocity.float(), steps.states.target)
        for name, value in (("loss/text", text_loss), ("loss/flow", flow_loss)):
            self._sums.setdefault(name, []).append(value.item())
        loss = self.args.text_weight * text_loss + self.args.flow_weight * flow_loss
        return (loss, outputs) if return_outputs else loss

    def _noisy_copies(self, base: UnifiedModelMixin, inputs: dict[str, Any]) -> Steps:
        """Make the table of K noisy copies of each image, points on lines from noise to it."""
        args, pixels = self.args, inputs["pixels"]
        clean = base.encode_images(pixels)[:, None]
        batch, draws = len(clean), args.noise_draws
        u = torch.rand(batch, draws) if args.timestep_sampling == "uniform" else torch.randn(batch, draws).sigmoid()
        t = shift_timesteps(u, args.timestep_shift).to(clean)
        noise = torch.randn(batch, draws, *clean.shape[2:]).to(clean)
        rows = zip(inputs["prompts"], inputs["prompt_ids"], inputs["completion_ids"], strict=True)
        trajectories = [Trajectory(prompt, ids, rounds=[Round(text)]) for prompt, ids, text in rows]
        contexts = base.contexts(trajectories)
        if args.context_dropout:
            (nothing,) = base.contexts([Trajectory("", [])])
            kept = (torch.rand(batch) >= args.context_dropout).tolist()
            contexts = [context if keep else nothing for context, keep in zip(contexts, kept, strict=True)]
        size = (pixels.shape[-2], pixels.shape[-1])
        for i, trajectory in enumerate(trajectories):
            points = LinePoints(x=line_state(clean[i], noise[i], t[i]), t=t[i].cpu(), target=noise[i] - clean[i])
            trajectory.rounds[-1].images.append(Image(clean[i, 0], size, contexts[i], points))
        return Steps.of(trajectories)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        device = self.accelerator.device
        # Every evaluation draws the same noise and times, and training goes on as if there had been none.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.args.seed + self.accelerator.process_index)
            return super().evaluate(*args, **kwargs)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        prefix = "eval_" if any(key.startswith("eval_") for key in logs) else ""
        logs.update({prefix + name: sum(values) / len(values) for name, values in self._sums.items()})
        self._sums.clear()
        super().log(logs, start_time)
