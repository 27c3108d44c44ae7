"""A run that is to be estimated: the model's sizes and the settings that its cost depends on."""

import math
from dataclasses import dataclass
from typing import Any

from ..flow.per_round import of_round
from ..image_sizes import GivenSize, Size, plain_size, read_size
from ..models.bagel.configuration import BagelConfig
from ..models.bagel.processing import vit_rule
from ..models.sharding import is_sharded


QUANTIZATIONS = (None, "nf4", "nf4-double")
_AT_LEAST_ONE = (
    *("prompt_length", "completion_length", "num_generations", "num_prompts", "num_inference_steps"),
    *("sde_window_size", "num_iterations", "micro_batch_size", "image_batch_size"),
    *("num_rounds", "look_length", "reflection_length", "images_per_thinking", "scout_num_inference_steps"),
    "processes",
)


@dataclass(frozen=True)
class Workload:
    """
    One generation of UniGRPO and the passes over it, on one device, or on each of several.

    Args:
        config: sizes of the model.
        image_size: side of square images, or height and width, in pixels.
        prompt_length, completion_length: tokens of a prompt (system prompt included) and of its thinking.
        num_generations, num_prompts: G trajectories for each of this many prompts.
        num_inference_steps, sde_window_size: denoising steps N, of which K are stochastic, or K points on lines.
        lines: images are trained at points on lines to them, and sampled by the ODE alone.
        num_iterations: passes over the generation.
        micro_batch_size: trajectories in one forward of the update.
        image_batch_size: images denoised and decoded at once; None for all.
        lora_ranks: of the text and the image expert's adapters, 0 for none; None for full fine-tuning, whose weights
            are stored in float32.
        quantization: of the experts' linear layers, None, "nf4" or "nf4-double" (its constants quantised again).
        half: products are computed in bfloat16, in which frozen weights are then stored, too; else all is
            float32.
        gradient_checkpointing: the update keeps only the inputs of layers and computes the rest again.
        reference: the regulariser keeps reference velocities, and full fine-tuning a copy of the weights at the start.
        ema: an average of all trained weights is held for evaluation.
        image_old_policy: one of the image expert's is held as the old policy, which computes velocities of its own.
        with_tower: the understanding tower is loaded.
        num_rounds: rounds of a trajectory, R, each with an image, and all trained.
        look_length, reflection_length: tokens of what is said to the model's own image (the system prompt included),
            and of its answer.
        round_context: "markov" or "full", see [`UniGRPOConfig`].
        images_per_thinking: images painted of each thinking, which is sampled and encoded once.
        scout_generations, scout_num_inference_steps: trajectories of a pool for each prompt, None for none, and the
            steps that its images take; G of them are painted again exactly, and trained.
        dead_share: share of images that is left out of the update, as their advantage is 0.
        processes: devices, one process each; all other numbers are those of one of them.
        fsdp: weights, gradients and optimizer state are spread over them (FSDP2); else each has all (DDP).
        gather_for_rollout: under FSDP2 each device has all weights while it thinks and paints.
        sync_each_batch: under FSDP2 gradients are reduced after each micro-batch, and not kept whole until the last.

    Raises:
        ValueError: for a size that no run can have.
    """

    config: BagelConfig
    image_size: GivenSize = 1024
    prompt_length: int = 128
    completion_length: int = 512
    num_generations: int = 24
    num_prompts: int = 1
    num_inference_steps: int = 25
    sde_window_size: int = 3
    num_iterations: int = 2
    micro_batch_size: int = 4
    image_batch_size: int | None = None
    lora_ranks: tuple[int, int] | None = (32, 32)
    quantization: str | None = None
    half: bool = True
    gradient_checkpointing: bool = True
    reference: bool = True
    ema: bool = False
    image_old_policy: bool = False
    with_tower: bool = True
    num_rounds: int = 1
    look_length: int = 128
    reflection_length: int = 256
    round_context: str = "markov"
    lines: bool = False
    images_per_thinking: int = 1
    scout_generations: int | None = None
    scout_num_inference_steps: int = 4
    dead_share: float = 0.0
    processes: int = 1
    fsdp: bool = False
    gather_for_rollout: bool = True
    sync_each_batch: bool = True

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1.")
        unit, limit = self.config.pixels_per_token, self.config.pixels_per_token * self.config.max_latent_size
        if any(side % unit or side > limit for side in self.size):
            raise ValueError(
                f"image_size={self.image_size}: this model paints images whose sides are multiples of {unit}, at most "
                f"{limit}."
            )
        self._check_group()
        self._check_spread()
        if self.sde_window_size >= self.num_inference_steps and not self.lines:
            raise ValueError(
                f"sde_window_size={self.sde_window_size} with num_inference_steps={self.num_inference_steps}: "
                "expected fewer stochastic steps than there are steps."
            )
        if self.quantization not in QUANTIZATIONS:
            raise ValueError(f"quantization={self.quantization!r}: expected None, 'nf4' or 'nf4-double'.")
        if self.quantization and self.lora_ranks is None:
            raise ValueError(f"quantization={self.quantization!r} trains adapters only: give lora_ranks, such as 32.")
        if self.lora_ranks is not None and (min(self.lora_ranks) < 0 or max(self.lora_ranks) == 0):
            raise ValueError(f"lora_ranks={self.lora_ranks}: expected two ranks, at least one of them above 0.")
        if self.round_context not in ("markov", "full"):
            raise ValueError(f"round_context={self.round_context!r}: expected 'markov' or 'full'.")
        longest = self.config.llm_config.max_position_embeddings
        if self.context > longest:
            raise ValueError(
                f"prompt and thinking make {self.context} tokens (prompt_length={self.prompt_length}, "
                f"completion_length={self.completion_length}): the model has positions for {longest}."
            )

    def _check_group(self) -> None:
        group, pool, each = self.num_generations, self.scout_generations, self.images_per_thinking
        if group % each:
            raise ValueError(f"images_per_thinking={each} with num_generations={group}: expected a divisor of it.")
        if pool is not None and (pool <= group or pool % group):
            raise ValueError(f"scout_generations={pool} with num_generations={group}: expected a multiple above it.")
        if pool is not None and self.scout_num_inference_steps > self.num_inference_steps:
            raise ValueError(
                f"scout_num_inference_steps={self.scout_num_inference_steps} with num_inference_steps="
                f"{self.num_inference_steps}: expected at most as many, as scouts are the cheaper ones."
            )
        if self.num_rounds > 1 and (pool is not None or each > 1):
            raise ValueError(
                f"num_rounds={self.num_rounds} with images_per_thinking={each}, scout_generations={pool}: only "
                "trajectories of one round are estimated with these."
            )
        if not 0 <= self.dead_share <= 1:
            raise ValueError(f"dead_share={self.dead_share}: expected a share from 0 to 1.")

    def _check_spread(self) -> None:
        if self.fsdp and self.processes == 1:
            raise ValueError("fsdp=True with processes=1: there is nothing to spread weights over. Give processes.")
        if self.fsdp and self.quantization:
            raise ValueError(
                f"fsdp=True with quantization={self.quantization!r}: quantised weights are estimated on each device "
                "whole. Leave one of the two out."
            )

    @property
    def size(self) -> Size:
        """(height, width) of the images, in pixels."""
        return read_size(self.image_size)

    @property
    def activation_bytes(self) -> int:
        return 2 if self.half else 4

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight that is not quantised."""
        return 4 if self.lora_ranks is None else self.activation_bytes

    @property
    def trajectories(self) -> int:
        return self.num_generations * self.num_prompts

    @property
    def pool(self) -> int:
        """Trajectories that are sampled and rewarded: those that are trained, or the scouts they are chosen among."""
        return (self.scout_generations or self.num_generations) * self.num_prompts

    @property
    def thinkings(self) -> int:
        """Thinkings that are sampled."""
        return self.pool // self.images_per_thinking

    @property
    def repaints(self) -> bool:
        """True where the scouts that are chosen are painted again."""
        own_steps = self.lines and self.scout_num_inference_steps == self.num_inference_steps
        return self.scout_generations is not None and not own_steps

    @property
    def context(self) -> int:
        """L, tokens that the first image sees before it."""
        return self.prompt_length + self.completion_length

    @property
    def shown(self) -> tuple[int, ...]:
        """Tokens, their two markers included, of each form in which a finished image is shown."""
        rule = vit_rule(self.config) if self.with_tower else None
        if rule is None:
            return (self.latents + 2,)
        height, width = rule.size(*self.size)
        return self.latents + 2, (height // rule.stride) * (width // rule.stride) + 2

    def seen_before(self, number: int) -> int:
        """Tokens before what a round, counted from 0, begins with: all of the rounds before, or none."""
        return self.seen(number - 1) if number and self.round_context == "full" else 0

    def seen(self, number: int) -> int:
        """Tokens that the image of a round sees before it."""
        if not number:
            return self.context
        return self.seen_before(number) + sum(self.shown) + self.look_length + self.reflection_length

    @property
    def clean(self) -> tuple[int, int]:
        """Tokens of all contexts of a trajectory, as an update reads them: the text and the image expert's."""
        later, rounds = self.num_rounds - 1, range(self.num_rounds)
        whole = self.seen(later) if self.round_context == "full" else sum(self.seen(number) for number in rounds)
        return whole - later * self.latents, later * self.latents

    @property
    def texts(self) -> int:
        """Tokens that a trajectory samples, of all rounds."""
        return self.completion_length + (self.num_rounds - 1) * self.reflection_length

    @property
    def latents(self) -> int:
        """N, tokens of an image without its two markers."""
        height, width = self.size
        return height * width // self.config.pixels_per_token**2

    @property
    def denoised_at_once(self) -> int:
        return min(self.image_batch_size or self.trajectories, self.trajectories)

    @property
    def scored_at_once(self) -> int:
        """Trajectories in one forward of the update."""
        return min(self.micro_batch_size, self.trajectories)

    @classmethod
    def of_run(cls, model: Any, args: Any, prompt_length: int = 128) -> "Workload":
        """
        Read the workload off a loaded BAGEL, adapters included, and a `UniGRPOConfig`; of settings by round the first,
        of several sizes the largest.

        Args:
            prompt_length: tokens of a prompt, which the arguments don't say.
        """
        ranks, quantization = [0, 0], None
        for name, module in model.named_modules():
            for adapter in getattr(module, "lora_A", {}).values():
                ranks["_moe_gen" in name] = max(ranks["_moe_gen" in name], adapter.out_features)
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            if state is not None:
                quantization = "nf4-double" if state.nested else "nf4"
        accumulation = getattr(args.accelerator_config, "gradient_accumulation_kwargs", None) or {}
        return cls(
            config=model.config,
            image_size=plain_size(max(args.sizes(training=True), key=math.prod)),
            prompt_length=prompt_length,
            completion_length=args.max_completion_length if args.thinking else 1,
            num_generations=args.num_generations,
            num_prompts=max(1, args.per_device_train_batch_size * args.steps_per_generation // args.num_generations),
            num_inference_steps=of_round(args, "num_inference_steps", 0),
            sde_window_size=of_round(args, "sde_window_size", 0)
            if args.image_objective == "flow_grpo"
            else args.matching_samples,
            num_iterations=args.num_iterations,
            micro_batch_size=args.per_device_train_batch_size,
            image_batch_size=args.image_batch_size or 1,  # where it is free, the rollout takes what memory is left
            lora_ranks=(ranks[0], ranks[1]) if any(ranks) else None,
            quantization=quantization,
            half=bool(args.bf16 or args.fp16),
            gradient_checkpointing=args.gradient_checkpointing,
            reference=args.flow_regularizer != "none" and args.flow_regularizer_weight > 0,
            ema=args.ema_decay is not None,
            image_old_policy=args.image_old_policy_decay is not None,
            with_tower=model.vit_model is not None,
            num_rounds=args.num_rounds,
            reflection_length=args.max_reflection_length,
            round_context=args.round_context,
            lines=args.image_objective != "flow_grpo",
            images_per_thinking=args.images_per_thinking,
            scout_generations=args.scout_generations if args.num_rounds == 1 else None,
            scout_num_inference_steps=args.scout_num_inference_steps,
            processes=args.world_size,
            fsdp=is_sharded(model),
            gather_for_rollout=args.gather_for_rollout,
            sync_each_batch=bool(accumulation.get("sync_each_batch", True)),
        )
