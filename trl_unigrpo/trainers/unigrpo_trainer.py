"""UniGRPO (arXiv 2603.23500): one reward on the image trains the thinking and the denoising of a unified model.

One step, as the paper's algorithm has it; each line is a section below:

    1. sample a group of thinkings per prompt                        TRL's `_generate`; thinkings.py
    2. paint the images, K of the denoising steps stochastic         `_paint`: flow/sampler.py; windows.py, scouts.py
       (other image objectives: all steps ODE, K states on lines)    flow/objectives.py
       with several rounds: look at the image, think, paint again    rounds.py
    3. reward the images; failures are masked                        `_calculate_rewards`: scoring.py
       advantages within the group (eq. 1)                           TRL's `_generate_and_score_completions`; credit.py
    4. velocities of the old and the reference model                 `_keep_velocities`: kept.py
    5. the joint objective (eq. 7): the text's (eq. 2, TRL's)        `_compute_loss`
       + lambda * flow objective (eqs. 3, 5) + w * velocity MSE (8)  `_flow_loss`: flow/objectives.py, flow/ratio.py
    6. clip the gradients of each expert, one optimizer step         `_clip_grad_norm`, `create_optimizer`
       5 and 6 are repeated for each PPO epoch                       TRL's `num_iterations`

Shapes: B trajectories, S trained steps of their images, `latent` the model's own latent dimensions.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ..flow.sampler import RolloutPlan
from ..flow.states import rows_of
from ..models.contract import UnifiedModelMixin
from ..models.experts import clip_by_expert, rates_by_expert, split_groups
from ..models.prompts import as_messages, choose_system_prompt, system_ids
from ..models.tokenizer import check_messages
from ..monitoring.alarms import default_alarms
from ..monitoring.events import ImageLoss, Update
from ..monitoring.expected import ExpectedCost
from ..monitoring.progress import Phases
from ..monitoring.signals import SaveOnSignal
from ..monitoring.trust import default_checks
from ..reporting.gallery import Gallery
from ..sampling import paint_and_decode
from ..sampling.rounds import image_stream
from ..seeding import EVAL, TRAIN, row_generator
from ..trajectory import Round, Steps, Trajectory, has_steps, in_order
from .diversity import ImageFeatures
from .editing import EditingRun
from .failed_images import image_metrics
from .kept import KeptVelocities
from .reward_checks import as_list, callback_list
from .run_keeping import Progress
from .scoring import RewardBook, with_names
from .scouts import ScoutingRun
from .setup import finish_run, prepare_run
from .thinkings import ThinkingsRun
from .trl_bridge import (
    TextAndVelocities,
    TRLChangedError,
    disable_gradient_checkpointing,
    generation_fields,
    profiling_context,
)
from .unigrpo_config import UniGRPOConfig
from .windows import draw_windows, guidance_of, rollout_plan


class UniGRPOTrainer(ScoutingRun, ThinkingsRun, EditingRun):
    """
    Trainer for UniGRPO (arXiv 2603.23500): GRPO on the thinking tokens and FlowGRPO-Fast on the denoising steps of a
    unified model, from one reward on the finished image.

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from trl_unigrpo import UniGRPOConfig, UniGRPOTrainer

    def redness(prompts, completions, images, **columns):
        return [image.resize((1, 1)).getpixel((0, 0))[0] / 255 for image in images]

    trainer = UniGRPOTrainer(
        model="ByteDance-Seed/BAGEL-7B-MoT",
        reward_funcs=redness,
        args=UniGRPOConfig.single_gpu(output_dir="bagel-unigrpo"),
        train_dataset=load_dataset("csv", data_files="prompts.csv", split="train"),
        peft_config=LoraConfig(r=32, lora_alpha=64),
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
            Rows with a column `prompt`, a string or a conversation; `source_image(s)` to edit, `turns` for a story.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer; loaded from the model's folder if not given.
        peft_config (`PeftConfig`, *optional*):
            Adapters. Without `target_modules` they go to the linear layers of the experts that are trained.
        image_features (`Callable`, *optional*):
            For `diversity_weight`: takes a list of N PIL images, gives (N, F) features. By default small thumbnails.
        quantization_config, reward_processing_classes, callbacks, optimizers:
            As in [`~trl.GRPOTrainer`].
    """

    model: PreTrainedModel

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
        reward_funcs: Callable | Sequence[Callable] | None = None,
        args: UniGRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: TrainerCallback | Sequence[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        image_features: ImageFeatures | None = None,
        **unsupported: Any,
    ):
        reward_funcs, callbacks = as_list(reward_funcs), callback_list(callbacks)
        datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        setup = prepare_run(
            model, args, reward_funcs, datasets, processing_class, quantization_config, peft_config, unsupported
        )
        args = setup.args
        self._setup, self._kept, self._image_features = setup, KeptVelocities(), image_features
        self._progress = Progress(images=deque(maxlen=args.generation_batch_size))
        self._phases = Phases(self._record_seconds, shows=args.local_process_index == 0 and not args.disable_tqdm)
        watchers = [*default_checks(args.trust_checks), *default_alarms(args.alarms), Gallery()]
        super().__init__(
            model=setup.model,
            reward_funcs=with_names(reward_funcs),
            args=args,
            **datasets,
            processing_class=setup.tokenizer,
            reward_processing_classes=reward_processing_classes,
            callbacks=[*callbacks, *watchers, SaveOnSignal(), ExpectedCost()],
            optimizers=optimizers,
            quantization_config=setup.quantization_config,
            peft_config=setup.peft_config,
        )
        finish_run(self, setup)
        self._book = RewardBook(self.reward_funcs, self.reward_weights)
        self.reward_weights = self._book.image_weights  # process rewards count nothing in TRL's advantages
        self._tell("on_ready")

    # 1. Thinking

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        return super()._tokenize_prompts(self._with_system_prompt(prompts))

    def _with_system_prompt(self, prompts: list[Any]) -> list[Any]:
        if self.processing_class.chat_template is None:
            return prompts
        system = choose_system_prompt(self.unified, self.args.system_prompt, self.args.thinking)
        return list(check_messages([as_messages(prompt, system) for prompt in prompts], self._tokenizer))

    def _generate(self, prompts: list[Any]) -> Any:
        self._tell("on_rollout_begin", generation_config=self.generation_config)
        with self._gathered():
            return self._rollout(prompts)

    def _rollout(self, prompts: list[Any]) -> Any:
        with self._phases("think"):
            outputs = super()._generate(prompts)
        prompt_ids, completion_ids, extra_fields = generation_fields(outputs)
        trajectories = self._progress.trajectories = self._trajectories(prompts, prompt_ids, completion_ids)
        with profiling_context(self, "image_rollout"), self._phases("paint"):
            images = self._paint_first(trajectories)
        self._note_speed(len(images))
        self._progress.reading = self.read_as(trajectories, completion_ids)
        if self.num_rounds > 1:
            with self._phases("rounds"):
                outputs, images = self._go_on(outputs, images)
        extra_fields["images"] = images  # becomes an argument of every reward function
        return outputs

    def _trajectories(
        self, prompts: list[Any], prompt_ids: list[list[int]], completion_ids: list[list[int]]
    ) -> list[Trajectory]:
        """Begin the trajectories, with one round each and no image yet."""
        texts = completion_ids if self.args.thinking else [[] for _ in prompts]
        made = map(Trajectory, prompts, prompt_ids, self.rows(len(prompts)), [[Round(text)] for text in texts])
        trajectories = self.with_sources(list(made))
        if guidance_of(self.args, self.model.training) is not None or self.num_rounds > 1:
            prompts = self._with_system_prompt(prompts)
            systems = system_ids(self._tokenizer, prompts, **self.chat_template_kwargs)
            for trajectory, prompt, ids in zip(trajectories, prompts, systems, strict=True):
                trajectory.prompt, trajectory.system_ids = prompt, ids
        return trajectories

    # 2. Images

    def _paint(self, trajectories: list[Trajectory]) -> list[Any]:
        """Paint the next image of each trajectory, and tell of it; returns them as PIL images."""
        painted = self._painted(trajectories)
        self._note(image_metrics(self.accelerator, painted, self._progress.real))
        if self._trains_image:
            one_window = self._setup.objective.stochastic and self.args.sde_window_scope == "generation"
            window = trajectories[0].rounds[-1].images[-1].steps.t[None].to(self.accelerator.device)
            self._tell_rollout(trajectories, self.accelerator.gather(window) if one_window else None)
        return painted

    @torch.no_grad()
    def _painted(self, trajectories: list[Trajectory], plan: RolloutPlan | None = None) -> list[Any]:
        if not trajectories:
            return []
        args = self.args
        key = (args.seed, TRAIN, self.generation) if self.mode == "train" else (args.seed, EVAL, 0)
        seeds = [image_stream(t, *key) for t in trajectories]
        generators = [row_generator(*seed) for seed in seeds]
        with self._old_policy(), self._sampling_model() as model:
            plan, ask = plan or self._plan(trajectories), self._score_early
            images, painted = paint_and_decode(model, trajectories, plan, generators, ask)
        for trajectory, image, seed, generator in zip(trajectories, images, seeds, generators, strict=True):
            image.seed = seed
            if self._trains_image:
                image.steps = self._setup.objective.states(image.latents, image.steps, generator)
                image.steps = rows_of(image.steps, slice(None if args.trains_round(trajectory.looks) else 0))
            trajectory.rounds[-1].images.append(image.to("cpu"))  # `Steps` brings back what a micro-batch needs
        return painted

    def _plan(self, trajectories: list[Trajectory]) -> RolloutPlan:
        args, number, rows = self.args, trajectories[0].looks, [t.row for t in trajectories]
        noisy = self._trains_image and self._setup.objective.stochastic and args.trains_round(number)
        windows = draw_windows(args, self.generation, self.accelerator.process_index, rows, number) if noisy else None
        return rollout_plan(args, self.model.training, windows, number)

    # 3. Rewards

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        if "images" not in inputs[0]:
            raise TRLChangedError("extra fields that _generate returns do not reach the rewards")
        with self._phases("reward"):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._note(self._book.metrics)
        self._book.remember(prompts, completions, self._pending_extra_logs)
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with self._pool(inputs) as inputs:
            self._progress.inputs = inputs
            outputs = super()._generate_and_score_completions(inputs)
            trajectories, self._progress.trajectories, self._progress.inputs = self._progress.trajectories, [], []
            if self.num_rounds > 1:
                self._pay(outputs)
            elif self.args.process_reward_weight > 0:
                process = self._book.process_advantages.split(len(inputs))[self.accelerator.process_index]
                of_text = outputs.get("text_advantages", outputs["advantages"])
                outputs["text_advantages"] = of_text + self.args.process_reward_weight * process
            self._show(inputs, outputs["advantages"])
            self._share_credit(outputs, inputs)
            outputs, trajectories = self._chosen(outputs, trajectories)
        if self._trains_image:
            outputs["trajectories"] = trajectories
            self._leave_out_dead(trajectories, outputs)
            with self._phases("old_and_reference"):
                self._keep_velocities(trajectories)
        return outputs

    # 4. Old and reference velocities

    def _keep_velocities(self, trajectories: Sequence[Trajectory]) -> None:
        """Keep what the loss compares with. An old policy that is the first pass' own is kept there, by the loss."""
        args, size = self.args, self.args.per_device_train_batch_size
        chunks = [trajectories[start : start + size] for start in range(0, len(trajectories), size)]
        tables = [Steps.of(chunk) for chunk in chunks if has_steps(chunk)]
        self._kept.clear()
        if self._setup.regularized:
            with self.unified.reference() as reference:
                for steps in tables:
                    self._kept.keep("reference", steps, self._velocities(reference, steps))
        averaged = args.image_old_policy_decay is not None
        for steps in tables:
            if args.flow_old_source == "rollout":
                self._kept.keep("old", steps, steps.states.velocity)
            elif averaged or args.gradient_accumulation_steps % args.steps_per_generation:
                # It is an average, or the first pass spans optimizer steps: that can't be its own old policy.
                with self._old_policy():
                    self._kept.keep("old", steps, self._velocities(self.unified, steps))

    @torch.no_grad()
    def _velocities(self, model: UnifiedModelMixin, steps: Steps) -> Tensor:
        """Compute the velocities (S, *latent) of a model, by the training forward."""
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            return in_order(model.velocities(steps, autocast=self.accelerator.autocast))

    # 5. Loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Compute text_weight * text loss + flow_weight * flow objective + w * regulariser, of one micro-batch."""
        if self.model.training:
            self._phases.begin("update")  # ended by `_get_learning_rate`
        of_text = {**inputs, "advantages": inputs.get("text_advantages", inputs["advantages"])}
        if not has_steps(inputs.get("trajectories", [])):
            loss = self.args.text_weight * super()._compute_loss(model, of_text)
            return loss + self._without_images() if self._trains_image else loss
        # TRL blanks the rows that `mask_truncated_completions` leaves out of training: so are their images.
        steps = Steps.of(inputs["trajectories"], inputs["completion_mask"].any(1)).to(self.accelerator.device)
        forward = self._progress.forward = TextAndVelocities(
            self.unified, steps, self.args.flow_context_grad == "full", self.accelerator.autocast
        )
        old, reference = self._kept.at("old", steps), self._kept.at("reference", steps)
        advantages = inputs.get("round_advantages", inputs["advantages"])
        loss, seen = torch.zeros((), device=steps.x.device), []
        for index, velocity, text_loss in forward.parts(model, partial(super()._compute_loss, model, of_text)):
            if old is None:
                seen.append((index, velocity.detach().float()))
            of_old, of_ref = (None if known is None else known[index] for known in (old, reference))
            flow_loss = self._flow_loss(velocity.float(), of_old, of_ref, steps[index], advantages)
            flow_loss = flow_loss / self.current_gradient_accumulation_steps
            if text_loss is None:  # back-propagated at once, so that only one part's activations are alive
                self.accelerator.backward(flow_loss)
                loss = loss + flow_loss.detach()
            else:
                loss = loss + self.args.text_weight * text_loss + flow_loss
        self._progress.forward = None
        self._note_parts()
        if old is None:
            self._kept.keep("old", steps, in_order(seen))
        return loss

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self._progress.forward is not None:
            model = self._progress.forward.pack(model)
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def _flow_loss(
        self, velocity: Tensor, old: Tensor | None, reference: Tensor | None, steps: Steps, advantages: Tensor
    ) -> Tensor:
        """
        Compute lambda * flow objective + w * regulariser, of velocities (S', *latent) at some of the steps. `old` is
        None in the first pass, whose own velocities are the old policy's.
        """
        objective, place = self._setup.objective, (steps.row, steps.round)[: advantages.ndim]
        of_step = advantages[tuple(x.to(advantages.device) for x in place)].to(velocity.device)
        old_velocity, share = velocity.detach() if old is None else old, len(steps) / steps.total
        losses, metrics = objective.loss(velocity, old_velocity, steps.states, of_step, steps.image, steps.round)
        flow, regularizer = steps.mean(losses), None
        metrics = {"flow/loss": flow, **{name: share * value for name, value in metrics.items()}}
        loss = self.args.flow_weight * flow
        if self._setup.regularized:
            reference = velocity.detach() if reference is None else reference  # of dead images none is kept
            distance = objective.regularizer(velocity, reference, steps.states, steps.round)
            regularizer = steps.mean_of_live(distance)
            loss = loss + self._setup.weight_of(velocity) * regularizer
            metrics[f"flow/{self.args.flow_regularizer}"] = regularizer
        told = ImageLoss(velocity.detach(), steps.states, old is None, objective, regularizer, reference, steps.round)
        self._tell("on_image_loss", image_loss=told)
        self._progress.parts.append({name: value.detach() for name, value in metrics.items()})
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
        joint = torch.stack(list(norms.values()))
        found = dict(zip(norms, joint.tolist(), strict=True))
        self._note({f"grad_norm/{name}": norm for name, norm in found.items()})
        metrics, self._progress.metrics = self._progress.metrics, {}
        means = {name: sum(values) / len(values) for name, values in metrics.items()}
        self._tell("on_update", update=Update(found, means, self._metrics["train"].get("kl", [])))
        return joint.norm()

    def _get_learning_rate(self) -> float:
        # Called between the optimizer's step and the scheduler's: these are the rates that were used.
        self._phases.end("update")
        rates = rates_by_expert(self.unified, self.model, self.optimizer)
        self._progress.learning_rates = {f"learning_rate/{name}": rate for name, rate in rates.items()}
        return super()._get_learning_rate()
