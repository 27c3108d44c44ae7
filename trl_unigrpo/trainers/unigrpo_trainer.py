"""UniGRPO (arXiv 2603.23500): one reward on the image trains the thinking and the denoising of a unified model.

One step, as the paper's algorithm has it:

    1. sample a group of thinkings per prompt                        TRL's `_generate`
    2. paint one image per thinking, K of the steps stochastic       `_generate` -> `_paint`
       (other image objectives: all steps ODE, K states on lines)    image_objectives.py
    3. reward the images, advantages within the group                TRL's `_generate_and_score_completions`
    4. velocities of the reference model at the stochastic steps     `_generate_and_score_completions`
    5. for each PPO epoch, one packed forward:                       `_compute_loss`
       text objective + lambda * flow objective + w * velocity MSE
    6. clip the gradients of each expert, one optimizer step         `_clip_grad_norm`, `create_optimizer`

Shapes: B trajectories, K stochastic steps, `latent` the model's own latent dimensions.
"""

import copy
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object, is_peft_model
from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from ..flow import flow_timesteps, scale_with_latents, sde_window
from ..flow.guidance import Guidance
from ..flow.objectives import OBJECTIVES, States
from ..flow.sampler import FlowRecord, RolloutPlan
from ..models.adapters import (
    add_reference_adapter,
    keep_adapters_in_float32,
    target_experts,
    trained_weights,
)
from ..models.contract import Conditioning, FlowInputs, UnifiedModelMixin
from ..models.experts import (
    check_trained,
    clip_by_expert,
    freeze_experts,
    split_groups,
)
from ..models.prompts import as_messages, system_ids
from ..models.quantization import keep_trainable_layout
from ..models.registry import unified_model
from ..models.tokenizer import never_sampled, prepare_tokenizer
from ..monitoring.alarms import default_alarms
from ..monitoring.events import Generation, Update, Watcher
from ..monitoring.expected import ExpectedCost
from ..monitoring.images import pixel_spread, write_completion_images
from ..monitoring.progress import Phases
from ..monitoring.signals import SaveOnSignal
from ..monitoring.trust import TrustChecks
from ..reporting.gallery import Gallery
from ..reporting.model_card import rewrite_card
from ..rewards.thinking import reward_scope
from ..seeding import (
    EVAL,
    TRAIN,
    WINDOW,
    row_generator,
)
from .checkpoint import load_rollouts, save_rollouts
from .packing import pack, return_velocity
from .scoring import mask_failed_rewards, process_advantages, with_name
from .setup import (
    check_arguments,
    check_lengths,
    default_config,
    load_model,
    load_tokenizer,
)
from .trl_bridge import (
    TRLChangedError,
    check_attributes,
    check_trl,
    disable_gradient_checkpointing,
    generation_fields,
    profiling_context,
    unwrap_model_for_generation,
)
from .unigrpo_config import UniGRPOConfig


class UniGRPOTrainer(GRPOTrainer):
    """
    Trainer for UniGRPO (arXiv 2603.23500): GRPO on the thinking tokens and FlowGRPO-Fast on the denoising steps of a
    unified model, from one reward on the finished image.

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from .. import UniGRPOConfig, UniGRPOTrainer

    def redness(prompts, completions, images, **columns):
        return [image.resize((1, 1)).getpixel((0, 0))[0] / 255 for image in images]

    trainer = UniGRPOTrainer(
        model="ByteDance-Seed/BAGEL-7B-MoT",
        reward_funcs=redness,
        args=UniGRPOConfig.single_gpu(output_dir="bagel-unigrpo"),
        train_dataset=load_dataset("csv", data_files="prompts.csv", split="train"),
        peft_config=LoraConfig(r=32),
    )
    trainer.train()
    ```

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`):
            A unified model ([`~trl_unigrpo.models.contract.UnifiedModelMixin`]), or the folder or hub id of one.
        reward_funcs (`Callable`, or list of them):
            TRL reward functions. Beside `prompts`, `completions` (the thinking) and the dataset's columns they get
            `images`, a flat list of PIL images, one per completion. `None` for a sample that could not be scored.
        args ([`UniGRPOConfig`], *optional*):
            Configuration.
        train_dataset, eval_dataset (`Dataset` or `IterableDataset`):
            Rows with a column `prompt`, a string or a conversation.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer; loaded from the model's folder if not given.
        peft_config (`PeftConfig`, *optional*):
            Adapters. Without `target_modules` they go to the linear layers of the experts that are trained.
        quantization_config, reward_processing_classes, callbacks, optimizers:
            As in [`~trl.GRPOTrainer`].
    """

    args: UniGRPOConfig
    model: PreTrainedModel
    num_generations: int
    reward_weights: Tensor

    _tag_names = ("trl", "unigrpo")
    _name = "UniGRPO"
    _paper: ClassVar = {
        "title": "UniGRPO",
        "id": "2603.23500",
        "citation": "@article{unigrpo2026,\n    title = {UniGRPO},\n    year = 2026,\n    eprint = {2603.23500}\n}",
    }

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Callable | list[Callable],
        args: UniGRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        **unsupported: Any,
    ):
        check_trl()
        if isinstance(model, str):
            source, adapted = model, peft_config is not None
        else:
            unified_model(model)  # raises for a model that paints no images
            source, adapted = model.config.name_or_path, peft_config is not None or is_peft_model(model)
        args = args or default_config(source)
        datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        check_arguments(args, reward_funcs, datasets, processing_class, unsupported)

        set_seed(args.seed)  # adapters start at random
        if isinstance(model, str):
            model, args = load_model(source, args, quantization_config, peft_config)
            quantization_config = None
        base = unified_model(model)
        check_lengths(args, base)
        num_latent_dims = math.prod(base.latent_shape((args.image_size, args.image_size)))
        if args.beta != 0 and not adapted:
            raise ValueError(
                f"beta={args.beta}: the text KL needs adapters to switch off. Pass a peft_config, or beta=0."
            )

        tokenizer = prepare_tokenizer(processing_class or base.tokenizer or load_tokenizer(source), base.chat_template)
        base.check_tokenizer(tokenizer)
        self._trains = {"text": args.text_weight > 0, "image": args.flow_weight > 0}
        regularizer_weight = 0.0 if args.flow_regularizer == "none" else args.flow_regularizer_weight
        self._regularized = self._trains["image"] and regularizer_weight > 0
        if not adapted:
            freeze_experts(base, model, self._trains)
        base.keep_reference(None)  # of an earlier run
        if self._regularized and not adapted:
            base.keep_reference(copy.deepcopy(base))
        elif self._regularized and is_peft_model(model) and args.beta == 0:
            add_reference_adapter(model)  # with beta, TRL adds it itself

        masters = trained_weights(model) if is_peft_model(model) else {}
        scale = scale_with_latents if args.scale_with_latents else (lambda value, _: value)
        epsilon = scale(args.flow_epsilon or 0.0, num_latent_dims)  # never None: the config chooses
        self._objective = OBJECTIVES[args.image_objective](args, epsilon)
        self._regularizer_weight = scale(regularizer_weight, num_latent_dims)
        self._trust = TrustChecks(args.trust_checks)
        self._records: list[FlowRecord] = []  # of the rollout in progress
        self._flow: FlowInputs | None = None  # of the packed forward in progress
        self._eval_rows = 0
        self._learning_rates: dict[str, float] = {}
        self._flow_metrics: dict[str, list[float]] = {}  # of the optimizer step in progress
        self._scored: tuple[list[dict[str, Any]], Tensor] = ([], torch.empty(0))  # see `_observed`
        self._images: deque[Any] = deque(maxlen=args.generation_batch_size)
        self._phases = Phases(self._record_seconds, shows=args.local_process_index == 0 and not args.disable_tqdm)

        super().__init__(
            model=model,
            reward_funcs=[with_name(f) for f in (reward_funcs if isinstance(reward_funcs, list) else [reward_funcs])],
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            reward_processing_classes=reward_processing_classes,
            callbacks=[*(callbacks or []), *default_alarms(args.alarms), Gallery(), SaveOnSignal(), ExpectedCost()],
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=target_experts(peft_config, base, self._trains),
        )
        check_attributes(self)
        # TRL calls and logs process rewards like any other, but they count nothing in the advantages that it computes.
        self._is_process = torch.tensor([reward_scope(f) == "text" for f in self.reward_funcs])
        self._process_weights = self.reward_weights[self._is_process]
        self.reward_weights = self.reward_weights.masked_fill(self._is_process, 0.0)
        if not base.packs_velocities and self.accelerator.num_processes > 1:
            raise ValueError(
                f"{type(base).__name__} computes its velocities one by one, which several processes don't support yet."
            )
        if not base.packs_velocities and self._objective.pools_steps and self._trains["image"]:
            raise ValueError(
                f"image_objective={args.image_objective!r} needs all velocities of an image at once, but "
                f"{type(base).__name__} computes them one by one. Use 'awm', which has a ratio of its own for each."
            )
        freeze_experts(base, self.model, self._trains)
        check_trained(base, self.model, self._trains)
        keep_adapters_in_float32(self.model, masters)
        keep_trainable_layout(self.model)
        self._trust.weights(self.model)
        return_velocity(base)
        if base._reference is not None:
            base._reference.to(self.accelerator.device)
        self.generation_config.suppress_tokens = never_sampled(base, self._tokenizer, self.eos_token_ids)

    @property
    def unified(self) -> UnifiedModelMixin:
        """The unified model, out of any wrapper."""
        return unified_model(self.accelerator.unwrap_model(self.model))

    @property
    def _generation(self) -> int:
        """Number of the generation batch that is trained on: the same however it is cut into micro-batches."""
        return self._step // (self.args.steps_per_generation * self.num_iterations)

    # 1. Thinking

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        return super()._tokenize_prompts(self._with_system_prompt(prompts))

    def _with_system_prompt(self, prompts: list[Any]) -> list[Any]:
        if self.processing_class.chat_template is None:
            return prompts
        own = self.args.system_prompt == "auto"
        system = self.unified.default_system_prompt if own else self.args.system_prompt
        return [as_messages(prompt, system if self.args.thinking else None) for prompt in prompts]

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        if self.args.thinking:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        # TRL needs a token per completion; the image is painted as if there were none.
        return [[self._tokenizer.eos_token_id] for _ in prompt_ids], None

    # 2. Images

    def _generate(self, prompts: list[Any]) -> Any:
        self._trust.sampling(self.generation_config, self.temperature)
        with self._phases("think"):
            outputs = super()._generate(prompts)
        prompt_ids, completion_ids, extra_fields = generation_fields(outputs)
        conditioning = Conditioning(prompt_ids, completion_ids if self.args.thinking else [[] for _ in prompt_ids])
        if self._guidance() is not None:
            prompts = self._with_system_prompt(prompts)
            conditioning.system_ids = system_ids(self._tokenizer, prompts, **self.chat_template_kwargs)
        conditioning.prompts = prompts
        with profiling_context(self, "image_rollout"), self._phases("paint"):
            self._records, images = self._paint(conditioning)
        metrics = self._metrics["train" if self.model.training else "eval"]
        number = len(images) * self.accelerator.num_processes
        metrics["time/images_per_second"].append(number / metrics["time/paint"][-1])
        extra_fields["images"] = images  # becomes an argument of every reward function
        return outputs

    @torch.no_grad()
    def _paint(self, conditioning: Conditioning) -> tuple[list[FlowRecord], list[Any]]:
        """Sample one image per thinking: records of B rollouts and B PIL images."""
        args, mode = self.args, "train" if self.model.training else "eval"
        trains = mode == "train" and self._trains["image"]
        stochastic = trains and self._objective.stochastic
        size = (args.image_size, args.image_size)
        plan = RolloutPlan(
            timesteps=self._timesteps(mode),
            image_size=size,
            windows=self._draw_windows(len(conditioning)) if stochastic else None,
            sde_type=args.sde_type,
            noise_level=args.noise_level,
            batch_size=args.image_batch_size,
            guidance=self._guidance(),
        )
        key = (args.seed, TRAIN, self._generation) if mode == "train" else (args.seed, EVAL, 0)
        generators = [row_generator(*key, row) for row in self._rows(mode, len(conditioning))]
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
            ) as model,
            self.accelerator.autocast(),
        ):
            base = unified_model(model)
            records = base.rollout(conditioning, plan, generators)
            chunk = args.image_batch_size or len(records)
            images = []
            for start in range(0, len(records), chunk):
                latents = torch.stack([record.final_latents for record in records[start : start + chunk]])
                images += base.decode_latents(latents, size)
        spread = torch.tensor(pixel_spread(images), device=self.accelerator.device)
        self._metrics[mode]["images/pixel_std"].append(self.accelerator.gather(spread).mean().item())
        if trains:
            records = self._objective.states(records, generators)
            one_window = stochastic and args.sde_window_scope == "generation"
            noise = self._objective.transition if stochastic else None
            self._trust.records(records, self.num_generations, one_window, noise)
            if one_window:
                window = records[0].timesteps[None].to(self.accelerator.device)
                self._trust.windows(self.accelerator.gather(window))
        return records, images

    def _rows(self, mode: str, count: int) -> range:
        """Places of this process' samples in the generation batch, or in the whole evaluation."""
        first = self.accelerator.process_index * count
        if mode == "eval":
            first += self._eval_rows
            self._eval_rows += count * self.accelerator.num_processes
        return range(first, first + count)

    def _timesteps(self, mode: str) -> Tensor:
        args = self.args
        steps = args.num_inference_steps if mode == "train" else args.eval_num_inference_steps
        return flow_timesteps(steps, args.timestep_shift)

    def _guidance(self) -> Guidance | None:
        scale = self.args.guidance_scale if self.model.training else self.args.eval_guidance_scale
        return Guidance(scale) if scale > 1 else None

    def _draw_windows(self, batch_size: int) -> Tensor:
        """Step indices (K,) of the batch's window or (B, K) of each sample's."""
        args, process = self.args, self.accelerator.process_index
        low, high = args.sde_window_range
        draw = partial(sde_window, (low, high), args.sde_window_size, args.sde_window_mode)
        key = (args.seed, WINDOW, self._generation)
        if args.sde_window_scope == "generation":
            return torch.tensor(draw(key))
        if args.sde_window_scope == "rank":
            return torch.tensor(draw((*key, process)))
        span = self.num_generations if args.sde_window_scope == "group" else 1
        rows = range(process * batch_size, (process + 1) * batch_size)
        return torch.tensor([draw((*key, row // span)) for row in rows])

    # 3. Rewards

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        if "images" not in inputs[0]:
            raise TRLChangedError("extra fields that _generate returns do not reach the rewards")
        with self._phases("reward"):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        mode = "train" if self.model.training else "eval"
        group_size = self.num_generations if mode == "train" else self.num_generations_eval
        of_images, failed = mask_failed_rewards(rewards[:, ~self._is_process], group_size)
        if self._is_process.any():
            advantages, metrics = process_advantages(
                rewards[:, self._is_process], self._process_weights, group_size, self.scale_rewards
            )
            first = self.accelerator.process_index * len(prompts)
            self._process_advantages = advantages[first : first + len(prompts)]
            for name, value in metrics.items():
                self._metrics[mode][name].append(value)
            # To TRL a sample without a score of its image has none.
            rewards = torch.where(rewards.isfinite(), rewards, torch.nan)
            rewards = rewards.masked_fill(of_images.isnan().all(dim=1, keepdim=True), torch.nan)
        rewards[:, ~self._is_process] = of_images
        if failed:
            warnings.warn(
                "Some samples have no score (None, NaN or infinity, from at least one reward function): they don't "
                "count. The metric `reward/frac_none` has their share."
            )
        self._metrics[mode]["reward/frac_none"].append(failed)
        logged = {name: values for name, values in self._pending_extra_logs.items() if len(values) == len(prompts)}
        extra = [dict(zip(logged, values, strict=True)) for values in zip(*logged.values(), strict=True)]
        rows = zip(prompts, completions, extra or [{}] * len(prompts), strict=True)
        names = ("prompt", "thinking", "extra")
        self._scored = [dict(zip(names, row, strict=True)) for row in rows], rewards
        return rewards

    # 4. Old and reference velocities

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        outputs = super()._generate_and_score_completions(inputs)
        freeze_experts(self.unified, self.model, self._trains)  # TRL's reference pass thaws adapters
        records, self._records = self._records, []
        if self.args.process_reward_weight > 0:
            bonus = self.args.process_reward_weight * self._process_advantages
            outputs["text_advantages"] = outputs["advantages"] + bonus
        logs_images = self.args.log_completions and (self.log_multimodal or self.args.log_completions_images)
        if logs_images or self._watchers:
            images = gather_object([row["images"] for row in inputs])
            if logs_images:
                self._images.extend(images)
                if self.log_multimodal:
                    self._logs["images"].extend([image] for image in images)
            observed = self._observed(mode, images, outputs["advantages"])
            self._tell("on_generation", generation=observed, metrics=self._metrics[mode])
        if mode == "eval" or not self._trains["image"]:
            return outputs
        outputs["flow_records"] = records
        with self._phases("old_and_reference"):
            if self._regularized:
                with self.unified.reference() as reference:
                    outputs["flow_reference_velocities"] = self._velocities(reference, records)
            if self.args.flow_old_source == "rollout":
                outputs["flow_old_velocities"] = torch.stack([record.velocities for record in records])
            elif self.args.gradient_accumulation_steps % self.args.steps_per_generation:
                # The first pass over this generation spans optimizer steps: it can't be its own old policy.
                outputs["flow_old_velocities"] = self._velocities(self.unified, records)
        return outputs

    def _record_seconds(self, phase: str, seconds: float) -> None:
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][f"time/{phase}"].append(seconds)

    @property
    def _watchers(self) -> list[Watcher]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, Watcher)]

    def _tell(self, event: str, **what: Any) -> None:
        """Call an event of all watchers, as TRL's own events are called."""
        for watcher in self._watchers:
            callbacks = self.callback_handler.callbacks
            getattr(watcher, event)(self.args, self.state, self.control, model=self.model, callbacks=callbacks, **what)

    def _observed(self, mode: str, images: Sequence[Any], advantages: Tensor) -> Generation:
        """The generation batch of all processes, of which this one has its rewards from `_calculate_rewards`."""
        rows, rewards = self._scored
        rows = gather_object(rows)
        columns = sorted({name for row in rows for name in row["extra"]})
        return Generation(
            mode=mode,
            group_size=self.num_generations if mode == "train" else self.num_generations_eval,
            prompts=[row["prompt"] for row in rows],
            thinking=[row["thinking"] for row in rows],
            images=images,
            rewards={name: rewards[:, i].tolist() for i, name in enumerate(self.reward_func_names)},
            weights={
                self.reward_func_names[i]: self.reward_weights[i].item() for i in (~self._is_process).nonzero()[:, 0]
            },
            advantages=self.accelerator.gather(advantages).tolist(),
            extra={name: [row["extra"].get(name) for row in rows] for name in columns},
        )

    @torch.no_grad()
    def _velocities(self, model: UnifiedModelMixin, records: Sequence[FlowRecord]) -> Tensor:
        """Velocities (B, K, *latent) of a model at the recorded steps, by the training forward, in micro-batches."""
        size = self.args.per_device_train_batch_size
        velocities = []
        with (
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            self.accelerator.autocast(),
        ):
            for start in range(0, len(records), size):
                chunk = records[start : start + size]
                if model.packs_velocities:
                    velocity = model.predict_velocities(model.flow_inputs(chunk))
                    velocities.append(model.guided(velocity, chunk))
                else:
                    velocities.append(torch.stack([velocity for _, velocity in model.velocities(chunk)], dim=1))
        return torch.cat(velocities)

    # 5. Loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self.model.training:
            self._phases.begin("update")  # ended by `_get_learning_rate`
        of_text = inputs
        if "text_advantages" in inputs:
            of_text = {**inputs, "advantages": inputs["text_advantages"]}
        if "flow_records" not in inputs:
            return self.args.text_weight * super()._compute_loss(model, of_text)
        records, base = inputs["flow_records"], self.unified
        context_grad = self.args.flow_context_grad == "full"
        accumulation = self.current_gradient_accumulation_steps
        first_pass = "flow_old_velocities" not in inputs
        if first_pass:
            sampled = torch.stack([record.velocities for record in records])
            inputs["flow_old_velocities"] = torch.empty_like(sampled, device=self.accelerator.device)
        if base.packs_velocities:
            self._flow = base.flow_inputs(records, context_grad)
            text_loss = super()._compute_loss(model, of_text)
            velocity, self._flow = self._flow.velocity, None
            if velocity is None:
                raise TRLChangedError("GRPOTrainer._compute_loss did not call _get_per_token_logps_and_entropies")
            with self.accelerator.autocast():
                velocity = base.guided(velocity, records, context_grad)
            flow_loss = self._flow_loss(velocity, inputs, slice(None), first_pass)
        else:
            text_loss = super()._compute_loss(model, of_text)
            flow_loss, steps = torch.zeros((), device=self.accelerator.device), len(records[0].timesteps)
            for k, velocity in self._in_autocast(base.velocities(records, context_grad)):
                # Back-propagated at once, so that only one step's activations are alive; the last with the text's.
                loss = self._flow_loss(velocity[:, None], inputs, slice(k, k + 1), first_pass) / steps
                if k + 1 < steps:
                    self.accelerator.backward(loss / accumulation)
                    loss = loss.detach()
                flow_loss = flow_loss + loss
        return self.args.text_weight * text_loss + flow_loss / accumulation

    def _in_autocast(self, items: Iterator[Any]) -> Iterator[Any]:
        """The items of a generator, computed in the precision of the run; what is done with them is not."""
        while True:
            with self.accelerator.autocast():
                item = next(items, None)
            if item is None:
                return
            yield item

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self._flow is not None:
            model = pack(model, self._flow)
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def _flow_loss(self, velocity: Tensor, inputs: dict[str, Any], steps: slice, first_pass: bool) -> Tensor:
        """
        lambda * flow objective + w * regulariser, a scalar.

        Args:
            velocity: (B, K', *latent) of the current weights at the recorded steps `steps`.
            first_pass: whether these weights are the old policy themselves.
        """
        args, velocity = self.args, velocity.float()
        states = States.of(inputs["flow_records"], steps, velocity.device)
        if first_pass:
            inputs["flow_old_velocities"][:, steps] = velocity.detach()
            if self._objective.stochastic:
                low_precision = args.bf16 or args.fp16
                tr, epsilon = self._objective.transition(states), self._objective.epsilon
                self._trust.velocities(velocity.detach(), states.velocities, tr, epsilon, low_precision)
        old = inputs["flow_old_velocities"][:, steps].to(velocity.device)
        advantages = inputs["advantages"].to(velocity.device)[:, None]
        objective, metrics = self._objective.loss(velocity, old, states, advantages)
        loss = args.flow_weight * objective
        if self._regularized:
            reference = inputs["flow_reference_velocities"][:, steps].to(velocity.device)
            regularizer = self._objective.regularizer(velocity, reference, states)
            self._trust.regularizer(regularizer)
            loss = loss + self._regularizer_weight * regularizer
            metrics[f"flow/{args.flow_regularizer}"] = regularizer
        for name, value in metrics.items():
            mean = self.accelerator.gather(value.detach()).mean().item()
            self._metrics["train"][name].append(mean)
            self._flow_metrics.setdefault(name, []).append(mean)
        return loss

    # 6. Optimizer

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh:
            split_groups(self.unified, self.model, optimizer, self.args.image_learning_rate)
        return optimizer

    def _clip_grad_norm(self, model: Any) -> Tensor:
        self.accelerator.unscale_gradients()
        norms = clip_by_expert(self.unified, self.model, self.args.max_grad_norm)
        for name, norm in norms.items():
            self._metrics["train"][f"grad_norm/{name}"].append(norm.item())
        metrics = {name: sum(values) / len(values) for name, values in self._flow_metrics.items()}
        self._flow_metrics = {}
        self._tell("on_update", update=Update({name: norm.item() for name, norm in norms.items()}, metrics))
        return torch.stack(list(norms.values())).norm()

    def _get_learning_rate(self) -> float:
        # Called between the optimizer's step and the scheduler's: these are the rates that were used.
        groups = self.optimizer.param_groups
        self._phases.end("update")
        self._learning_rates = {f"learning_rate/{group['name']}": group["lr"] for group in groups if "name" in group}
        return super()._get_learning_rate()

    # Evaluation, logs and checkpoints

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._eval_rows = 0
        device = self.accelerator.device
        # Every evaluation draws the same thinkings and the same noise, and training goes on as if there had been none.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.args.seed + self.accelerator.process_index)
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        if "learning_rate" in logs:
            logs.update(self._learning_rates)
        super().log(logs, start_time)
        if self._images and self.args.log_completions_images and self.accelerator.is_main_process:
            columns = {
                "prompt": list(self._logs["prompt"]),
                "completion": list(self._logs["completion"]),
                **{name: list(values) for name, values in self._logs["rewards"].items()},
                "advantage": list(self._logs["advantages"]),
            }
            write_completion_images(self.args.output_dir, self.state.global_step, columns, self._images)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.unified.save_adapters(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        passes_left = self._step % (self.args.steps_per_generation * self.num_iterations)
        state = {
            "step": self._step,
            "geometry": self._geometry,
            "buffer": self._buffered_inputs if passes_left else None,
        }
        save_rollouts(folder, self.accelerator.process_index, state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.unified.load_checkpoint(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = load_rollouts(checkpoint, self.accelerator.process_index, self.accelerator.device)
        if state is not None and state["geometry"] == self._geometry:
            self._step, self._buffered_inputs = state["step"], state["buffer"]
            return
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        warnings.warn(
            f"{checkpoint} has no rollouts of a run with these batch sizes and processes. Training goes on, but a "
            "generation batch that was in use is sampled anew."
        )

    @property
    def _geometry(self) -> list[int]:
        """How a generation batch is cut: rollouts are of use to a run that cuts them alike."""
        args = self.args
        sizes = [args.per_device_train_batch_size, args.steps_per_generation, self.num_iterations]
        return [self.accelerator.num_processes, *sizes]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, Gallery):
                    callback.wait()
            names, weights = self.reward_func_names, self.reward_weights.clone()
            weights[self._is_process] = self._process_weights.to(weights)
            rewrite_card(
                Path(self.args.output_dir) / "README.md",
                self.accelerator.unwrap_model(self.model),
                self.args,
                self.state.global_step,
                rewards=dict(zip(names, weights.tolist(), strict=True)),
                process=[name for name, of_text in zip(names, self._is_process.tolist(), strict=True) if of_text],
                source=self.hub_model_id or self.args.output_dir,
            )
