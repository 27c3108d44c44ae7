"""ReFL: the image expert climbs the gradient of a differentiable reward, through one late denoising step.

Reward feedback learning, as ImageReward has it (arXiv 2304.05977) and as UniGRPO's paper compares itself to. One step:

    1. sample a thinking per prompt                          no gradient        `think`
    2. denoise from noise to a late step m by the ODE        no gradient        `_paint`
    3. one velocity, and the image that it points to         x_0 = x_m - t_m v  `compute_loss`
    4. decode, score                                         r                  `reward_gradient`
    5. loss = scale mean relu(margin - r)                                       `image_losses`

Shapes: B images, N denoising steps, `latent` the model's own latent dimensions.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from ..flow import flow_timesteps, sde_window
from ..flow.sampler import RolloutPlan
from ..messages import user_text
from ..models.adapters import (
    check_own_adapters,
    load_trainable,
    merge_found_adapters,
    target_experts,
)
from ..models.contract import UnifiedModelMixin, check_contract
from ..models.experts import freeze_experts, parameters_by_expert
from ..models.prompts import as_messages, choose_system_prompt
from ..models.registry import unified_model
from ..monitoring.progress import Phases
from ..sampling import Thinking, decode_outside_autocast, paint, think
from ..seeding import (
    EVAL,
    THINK,
    TRAIN,
    WINDOW,
    row_generator,
)
from ..trajectory import Image
from .arguments import check_lengths, check_painted, find_tokenizer
from .config_numbers import read_numbers
from .dataset_checks import check_rows, check_special_tokens
from .engines import settle_engine
from .evaluation_checks import check_evaluation
from .prompt_checks import CheckedRows
from .refl import (
    as_reward,
    check_rewards,
    image_losses,
    late_step_range,
    reward_gradient,
    to_unit,
)
from .reward_checks import callback_list
from .sizes_config import SizesConfig, check_sizes
from .training_loop import TrainingLoop
from .whole_checkpoints import check_writable


TRAINS = {"text": False, "image": True}


@dataclass
class ReFLConfig(SizesConfig, TrainingArguments):
    r"""
    Configuration of [`ReFLTrainer`]. The loss has ImageReward's values, the images have those of [`UniGRPOConfig`].
    `image_size` and `eval_image_size` are one size each, see [`~trl_unigrpo.trainers.sizes_config.SizesConfig`].

    Parameters:
        thinking (`bool`, *optional*, defaults to `True`):
            Whether a thinking is sampled before each image. False paints from the prompt alone.
        max_completion_length (`int`, *optional*, defaults to `512`):
            Most tokens of a thinking.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the thinkings' sampling.
        num_inference_steps (`int`, *optional*, defaults to `25`):
            Denoising steps N, in training and in evaluation.
        timestep_shift (`float`, *optional*, defaults to `3.0`):
            Shift s of the schedule t = s u / (1 + (s - 1) u), u evenly spaced from 1 to 0.
        late_steps (`float`, *optional*, defaults to `0.25`):
            Share of the denoising steps, the last ones, of which one is drawn for each optimizer step: m uniform in
            {ceil((1 - late_steps) N), .., N - 1}, counted from 0.
        refl_loss (`str`, *optional*, defaults to `"hinge"`):
            `"hinge"`, mean relu(margin - r), or `"linear"`, -mean r; each times `refl_scale`.
        refl_margin (`float`, *optional*, defaults to `2.0`):
            Reward above which the hinge loss leaves an image alone, in units of the reward.
        refl_scale (`float`, *optional*, defaults to `1e-3`):
            Factor of the loss. Adam hardly sees it, the clipping by `max_grad_norm` does.
        system_prompt (`str`, *optional*, defaults to `"auto"`):
            System prompt of prompts that bring none: `"auto"` is the model's own, which asks it to think, `""` none.
            Without thinking there is none.
        adam_epsilon (`float`, *optional*, defaults to `1e-15`):
            Adam's epsilon: the gradients are far below 1e-8.
    """

    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Rewards may ask for any column."})
    dataloader_pin_memory: bool = field(
        default=True, metadata={"help": "Pin the data loaders' memory, where there is a GPU."}
    )
    adam_epsilon: float = field(default=1e-15, metadata={"help": "Adam's epsilon; the gradients are far below 1e-8."})
    thinking: bool = field(default=True, metadata={"help": "Sample a thinking before each image."})
    max_completion_length: int = field(default=512, metadata={"help": "Most tokens of a thinking."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the thinkings' sampling."})
    num_inference_steps: int = field(default=25, metadata={"help": "Denoising steps."})
    timestep_shift: float = field(default=3.0, metadata={"help": "Shift of the timestep schedule."})
    late_steps: float = field(
        default=0.25, metadata={"help": "Share of the steps, the last ones, of which one gets the gradient."}
    )
    refl_loss: str = field(default="hinge", metadata={"help": "'hinge' or 'linear'."})
    refl_margin: float = field(default=2.0, metadata={"help": "Reward above which the hinge loss is 0."})
    refl_scale: float = field(default=1e-3, metadata={"help": "Factor of the loss."})
    system_prompt: str = field(default="auto", metadata={"help": "'auto': the model's own; '': none."})

    def __post_init__(self) -> None:
        read_numbers(self)
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        if self.refl_loss not in ("hinge", "linear"):
            raise ValueError(f"refl_loss={self.refl_loss!r}: expected one of 'hinge', 'linear'.")
        if not math.isfinite(self.refl_margin):
            raise ValueError(f"refl_margin={self.refl_margin}: expected a finite number, in units of the reward.")
        check_sizes(self)
        for training, name in ((True, "image_size"), (False, "eval_image_size")):
            if len(self.sizes(training)) > 1:
                raise ValueError(
                    f"{name}={getattr(self, name)}: expected one size, as the images of a batch are decoded together, "
                    "and batches hold any prompts. Pass one of them, or train with UniGRPOTrainer."
                )
        for name in ("max_completion_length", "num_inference_steps"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}={value!r}: expected a whole number of at least 1.")
        for name in ("temperature", "timestep_shift", "refl_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive number.")
        late_step_range(self.num_inference_steps, self.late_steps)
        settle_engine(self)
        super().__post_init__()


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`prompts`, a list, and `columns`, the lists of all others by name."""
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    return {"prompts": [row["prompt"] for row in rows], "columns": columns}


def check_names(columns: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError if a dataset, by its name, has a column that the reward's own arguments leave no room for."""
    for part, names in columns.items():
        for name in {"pixels", "prompts"}.intersection(names):
            raise ValueError(
                f"{part} has a column {name!r}, a name that is taken: rewards get the images as `pixels` and the "
                f"prompts as `prompts`. Rename it: dataset.rename_column({name!r}, ...)."
            )


class ReFLTrainer(TrainingLoop):
    """
    Trainer for reward feedback learning (ReFL, arXiv 2304.05977) of a unified model's image expert.

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from trl_unigrpo import ReFLConfig, ReFLTrainer
    from trl_unigrpo.rewards import pick_score

    trainer = ReFLTrainer(
        model="ByteDance-Seed/BAGEL-7B-MoT",
        reward=pick_score(scale=100 / 26),
        args=ReFLConfig("bagel-refl", image_size=512, learning_rate=1e-4, bf16=True, gradient_checkpointing=True),
        train_dataset=load_dataset("csv", data_files="prompts.csv", split="train"),
        peft_config=LoraConfig(r=32, lora_alpha=64),
    )
    trainer.train()
    ```

    Several processes work as DistributedDataParallel; DeepSpeed and FSDP are refused.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): a unified model, or the folder or hub id of one.
        reward: an object with `differentiable(pixels, prompts)`, such as `ClipReward`, or a function
            `reward(pixels, prompts, **columns)`. Pixels are (B, 3, H, W) in [0, 1], prompts plain texts, columns the
            dataset's others; it returns (B,), NaN for an image that can't be scored.
        args ([`ReFLConfig`]): configuration.
        train_dataset, eval_dataset: rows with a column `prompt`, a string or a conversation.
        processing_class (`PreTrainedTokenizerBase`, *optional*): tokenizer; from the model's folder by default.
        peft_config (`PeftConfig`, *optional*): adapters. Without `target_modules` they go to the image expert's linear
            layers.
    """

    args: ReFLConfig
    # `compute_loss` returns the mean of a micro-batch.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward: Any,
        args: ReFLConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        self.reward = as_reward(reward)
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if dataset is not None:
                check_names(check_rows(dataset, name, ("prompt",), args if name == "train_dataset" else None))
        check_writable(args)
        check_evaluation(args, eval_dataset)
        kwargs["callbacks"] = callback_list(kwargs.get("callbacks"))
        source = model if isinstance(model, str) else None
        if isinstance(model, str):
            frozen_in_bf16 = args.bf16 and peft_config is not None
            model = load_trainable(model, peft_config, dtype=torch.bfloat16 if frozen_in_bf16 else torch.float32)
            if isinstance(model, PeftModel):  # the folder held adapters
                peft_config, source = None, None
        base = unified_model(model)
        check_contract(base)
        check_own_adapters(model)
        check_lengths(args, base)
        base.try_out(args.device)
        check_painted(args, base)
        tokenizer = find_tokenizer(base, processing_class, source or model.config.name_or_path)
        check_special_tokens({"train_dataset": train_dataset, "eval_dataset": eval_dataset}, tokenizer)
        if peft_config is not None:
            if isinstance(model, PeftModel):
                raise ValueError("peft_config is given, but the model has adapters already. Leave one of them out.")
            merge_found_adapters(model)
            set_seed(args.seed)  # adapters start at random
            model = get_peft_model(model, target_experts(peft_config, base, TRAINS))
        freeze_experts(base, model, TRAINS)
        if not parameters_by_expert(base, model):
            raise ValueError(
                "The image expert has no trainable weights. Leave the peft_config's target_modules unset, load the "
                "adapter with is_trainable=True, or unfreeze the model."
            )
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            data_collator=CheckedRows(collate),
            **kwargs,
        )
        base.check_trained_weights()
        self._system = choose_system_prompt(base, args.system_prompt, args.thinking)
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._mode = "train"
        self._phases = Phases(self._record_seconds, shows=args.local_process_index == 0 and not args.disable_tqdm)
        self._eval_rows = 0

    @property
    def unified(self) -> UnifiedModelMixin:
        """The unified model, out of any wrapper."""
        return unified_model(self.accelerator.unwrap_model(self.model))

    # Training

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        batches, number = super().get_batch_samples(*args, **kwargs)
        # The place in the optimizer step, so that noise does not depend on how the step is cut into micro-batches.
        return [{**batch, "micro_step": place} for place, batch in enumerate(batches)], number

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        args, base, step = self.args, self.unified, self.state.global_step
        steps = late_step_range(args.num_inference_steps, args.late_steps)
        (m,) = sde_window(steps, size=1, seed=(args.seed, WINDOW, step))
        nodes = self._nodes
        batches = inputs["micro_step"] * self.accelerator.num_processes + self.accelerator.process_index
        images = self._paint("train", inputs["prompts"], nodes[: m + 1], step, batches * args.train_batch_size)
        latents, t = torch.stack([image.latents for image in images]), nodes[m].item()
        size = images[0].size
        with self.accelerator.autocast():
            with torch.no_grad():
                context = base.encode_context([image.context for image in images])
            velocity = base.predict_velocity(context, latents, latents.new_full((len(images),), t), size)
        pixels = decode_outside_autocast(base, latents - t * velocity.float(), size, output_type="pt")
        with self._phases("reward"):
            rewards, loss, gradient = reward_gradient(lambda x: self._score(x, inputs), pixels, self._losses)
        self._record("train", rewards)
        if step == 0 and not gradient.any():
            warnings.warn(
                "The gradient is 0 at every pixel of the first batch, so that nothing is learned from it. A reward "
                "that rounds or compares has no other gradient, nor has a hinge loss above its margin "
                f"(refl_margin={args.refl_margin})."
            )
        for name, value in (("refl/step", m), ("refl/timestep", t), ("refl/clamped", clamped_share(pixels))):
            self._metrics["train"][name].append(value)
        # The loss' value, with the gradient that was computed at the pixels.
        loss = loss + ((pixels - pixels.detach()) * gradient).sum()
        return (loss, {"rewards": rewards}) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.num_processes > 1 and self.accelerator.sync_gradients:
            # DistributedDataParallel does this for calls of the wrapped model alone, and painting is none.
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        return loss

    @property
    def _nodes(self) -> Tensor:
        """(N + 1,) times from 1 to 0."""
        return flow_timesteps(self.args.num_inference_steps, self.args.timestep_shift)

    @torch.no_grad()
    def _paint(self, mode: str, prompts: list[Any], nodes: Tensor, step: int, first_row: int) -> list[Image]:
        """Think, and denoise from the first of the nodes to the last: B images, the last state in `latents`."""
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        self._mode = mode
        purpose = TRAIN if mode == "train" else EVAL
        messages = [as_messages(prompt, self._system) for prompt in prompts]
        how = Thinking(args.thinking, temperature=args.temperature, max_completion_length=args.max_completion_length)
        with sampling(model), self.accelerator.autocast():
            with self._phases("think"):
                seed = row_generator(args.seed, THINK, purpose, step, first_row).initial_seed()
                trajectories = think(model, self.processing_class, messages, how, seed=seed)
            generators = [row_generator(args.seed, purpose, step, first_row + t.row) for t in trajectories]
            with self._phases("paint"):
                plan = RolloutPlan(nodes, args.sizes(training=mode == "train")[0])
                return paint(self.unified, trajectories, plan, generators)

    def _record_seconds(self, phase: str, seconds: float) -> None:
        self._metrics[self._mode][f"time/{phase}"].append(seconds)

    def _score(self, images: Tensor, inputs: dict[str, Any]) -> Tensor:
        texts = [user_text(prompt) for prompt in inputs["prompts"]]
        return check_rewards(self.reward(images, texts, **inputs["columns"]), images)

    def _losses(self, rewards: Tensor) -> Tensor:
        return image_losses(rewards, self.args.refl_loss, self.args.refl_margin, self.args.refl_scale)

    # Evaluation and logs

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._eval_rows = 0
        device = self.accelerator.device
        # Training goes on as if there had been no evaluation.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in self._means("eval").items()})
        return output

    @torch.no_grad()
    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss of the finished images."""
        inputs, number = self._prepare_inputs(inputs), len(inputs["prompts"])
        first_row = self._eval_rows + self.accelerator.process_index * number
        self._eval_rows += number * self.accelerator.num_processes
        images = self._paint("eval", inputs["prompts"], self._nodes, 0, first_row)
        latents = torch.stack([image.latents for image in images])
        pixels = decode_outside_autocast(self.unified, latents, images[0].size, output_type="pt")
        with self._phases("reward"):
            rewards = self._score(to_unit(pixels), inputs)
        self._record("eval", rewards)
        return self._losses(rewards[rewards.isfinite()]).mean(), None, None

    def _record(self, mode: str, rewards: Tensor) -> None:
        gather = self.accelerator.gather if mode == "train" else self.accelerator.gather_for_metrics
        rewards = gather(rewards.detach().float())
        counts = rewards.isfinite()
        if not counts.all():
            warnings.warn(
                "Some images have no reward (NaN or infinity, or such a gradient): they don't count. The metric "
                "`reward/frac_none` has their share."
            )
        self._metrics[mode]["reward"] += rewards[counts].tolist()
        self._metrics[mode]["reward/frac_none"].append(1 - counts.float().mean().item())

    def _means(self, mode: str) -> dict[str, float]:
        means = {name: sum(values) / len(values) for name, values in self._metrics[mode].items() if values}
        self._metrics[mode].clear()
        return means

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        self.unified.save_adapters(output_dir or self.args.output_dir)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._means("train"))
        super().log(logs, start_time)


@contextmanager
def sampling(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode: no dropout, no gradient checkpointing."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def clamped_share(pixels: Tensor) -> float:
    """Share of pixels outside of [-1, 1]."""
    return (pixels.detach().abs() > 1).float().mean().item()
