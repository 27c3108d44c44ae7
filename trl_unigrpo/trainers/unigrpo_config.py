"""Every knob of UniGRPO: its unit, the paper's value, and what is refused."""

import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import GRPOConfig

from ..flow.per_round import PER_ROUND
from .averages_config import AveragesConfig, check_averages
from .config_checks import check_choices, check_epochs, check_groups, check_sampling, check_values, check_window
from .config_numbers import FloatOfRounds, IntOfRounds, RangeOfRounds, read_numbers
from .evaluation_checks import whole_groups
from .recipes import EDITING, FAST, REFLECT_UNTIL_GOOD, SELF_REFINEMENT, SELF_REWARDED, SINGLE_GPU
from .rounds_config import RoundsConfig, check_rounds
from .scouts_config import ScoutsConfig, check_scouts
from .sharding_config import ShardingConfig, check_sharding
from .sizes_config import SizesConfig, check_micro_batches, check_sizes
from .thinkings_config import ThinkingsConfig, check_thinkings
from .trl_versions import check_options


_EPSILON = {"flow_grpo": 1e-6, "fpo": 3e-5, "awm": 1e-4, "nft": 1e-6}
"""Clip range of each image objective; DiffusionNFT has none."""


@dataclass
class UniGRPOConfig(
    SizesConfig, RoundsConfig, AveragesConfig, ScoutsConfig, ThinkingsConfig, ShardingConfig, GRPOConfig
):
    r"""
    Configuration of [`UniGRPOTrainer`]. Where a field's help says "Paper", its default is that of Table 3 (arXiv
    2603.23500); the others are ours. The batch of 32 prompts is [`UniGRPOConfig.paper`]'s.

    Only the parameters that UniGRPO adds, or gives another default, are listed. Those of [`~trl.GRPOConfig`] are there
    too, and those of sizes, [`~trl_unigrpo.trainers.sizes_config.SizesConfig`], of several rounds,
    [`~trl_unigrpo.trainers.rounds_config.RoundsConfig`], of averaged weights,
    [`~trl_unigrpo.trainers.averages_config.AveragesConfig`], of scouts,
    [`~trl_unigrpo.trainers.scouts_config.ScoutsConfig`], of what a group is made of,
    [`~trl_unigrpo.trainers.thinkings_config.ThinkingsConfig`], and of FSDP2,
    [`~trl_unigrpo.trainers.sharding_config.ShardingConfig`].
    `epsilon`, `loss_type`, `beta`, `temperature` and the other options of TRL speak of the thinking tokens.

    Parameters:
        > Parameters that control the images

        num_inference_steps (`int` or `list[int]`, *optional*, defaults to `25`):
            Denoising steps in training rollouts: evaluations of the model per image. A list has one number for each
            round, and its last one holds for all later ones; so it is with the other three that may be lists.
        eval_num_inference_steps (`int`, *optional*, defaults to `50`):
            Denoising steps in evaluation, which is a pure ODE.
        guidance_scale (`float`, *optional*, defaults to `1.0`):
            Classifier-free guidance in training, away from the image without the prompt; 1, the paper's value, is
            none. Above 1, sampler and update both follow the guided velocity, which costs a second forward.
        eval_guidance_scale (`float`, *optional*, defaults to `1.0`):
            Guidance in evaluation; BAGEL's own evaluation has 4.
        timestep_shift (`float`, *optional*, defaults to `3.0`):
            Shift s of the schedule t = s u / (1 + (s - 1) u), u evenly spaced from 1 to 0.
        image_batch_size (`int`, *optional*):
            Images denoised at once in a rollout; by default as many as fit into the GPU's free memory, on a CPU all.
            Never changes their noise; a fixed number makes a run in bfloat16 repeatable to the bit, and a smaller one
            lets a judge behind an endpoint begin while others are painted.
        compile_layers (`bool`, *optional*, defaults to `False`):
            Whether torch.compile makes kernels for the parts of each layer around attention, in rollouts and updates.
            They take a minute to make. For BAGEL.
        thinking (`bool`, *optional*, defaults to `True`):
            Whether the model thinks before it paints. Without, images follow from the prompt alone and `text_weight`
            has to be 0.
        system_prompt (`str`, *optional*, defaults to `"auto"`):
            System prompt of prompts that bring none: `"auto"` is the model's own, which asks it to think, `""` none.

        > Parameters that control the stochastic steps

        sde_type (`str`, *optional*, defaults to `"sde"`):
            `"sde"` (Flow-SDE, the paper's) or `"cps"` (coefficients-preserving sampling).
        noise_level (`float` or `list[float]`, *optional*, defaults to `0.8`):
            Strength a of the noise, sigma_t = a sqrt(t / (1 - t)).
        sde_window_range (`list[int]` or `list[list[int]]`, *optional*, defaults to `[0, 5]`):
            Steps [low, high) among which stochastic ones are chosen, counted from 0 (pure noise).
        sde_window_size (`int` or `list[int]`, *optional*, defaults to `3`):
            Number of stochastic, trained steps K. All others are ODE steps without gradient.
        sde_window_mode (`str`, *optional*, defaults to `"contiguous"`):
            `"contiguous"` with a random start, `"scatter"` (random steps) or `"fixed"` (the first of the range).
        sde_window_scope (`str`, *optional*, defaults to `"generation"`):
            One draw per `"generation"` batch, the same on all ranks, or per `"rank"`, `"group"` or `"sample"`.

        > Parameters that control the objective

        text_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the thinking's GRPO objective. 0 freezes the text expert (FlowGRPO with thinking).
        flow_weight (`float`, *optional*, defaults to `1.0`):
            Weight lambda of the image's objective. 0 freezes the image expert and samples by the ODE alone (TextGRPO).
        process_reward_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the process rewards, functions marked with `thinking_reward`: their group advantage times this
            is added to the thinking's advantage, never to the image's. 0 logs them and trains on none.
        image_objective (`str`, *optional*, defaults to `"flow_grpo"`):
            What trains the image expert: `"flow_grpo"` (the paper's), on the sampler's noisy steps; or, on lines from
            noise to the finished images, `"fpo"`, `"awm"` or `"nft"` (DiffusionNFT), which sample by the ODE.
        matching_samples (`int`, *optional*, defaults to `8`):
            Points on such lines per image.
        nft_beta (`float`, *optional*, defaults to `1.0`):
            How far DiffusionNFT's two velocities lie from the old one, as a share of what the policy has moved.
        flow_epsilon (`float`, *optional*):
            Clip range of the image's ratio, at 262,144 numbers per image (1024 pixels in BAGEL) and for the paper's
            noisy steps. By default 1e-6, the paper's, for FlowGRPO, 3e-5 for FPO and 1e-4 for AWM, for which the paper
            has none.
        ratio_norm (`bool`, *optional*, defaults to `True`):
            Centre and rescale the image's log-ratio (RatioNorm); FPO's and AWM's are only centred.
        flow_regularizer (`str`, *optional*, defaults to `"velocity_mse"`):
            Tie to the reference model: `"velocity_mse"`, `"latent_kl"` (exact, per number), `"latent_kl_flow_grpo"`
            (as in the public Flow-GRPO code) or `"none"`.
        flow_regularizer_weight (`float`, *optional*, defaults to `1.5e-5`):
            Its weight, at 262,144 numbers per image and for the paper's noisy steps.
        scale_with_latents (`bool`, *optional*, defaults to `True`):
            Multiply `flow_epsilon` and `flow_regularizer_weight` by sqrt(262144 / numbers per image), for each image
            by its own size, and for FlowGRPO by the length of its noisy steps over that of the paper's, to keep their
            meaning. False takes both as they are.
        flow_old_source (`str`, *optional*, defaults to `"recompute"`):
            Old velocities from the training forward (`"recompute"`) or from the sampler (`"rollout"`).
        flow_context_grad (`str`, *optional*, defaults to `"detach"`):
            Whether the image's loss stops at (`"detach"`) or flows through (`"full"`) the text that the image saw.

        > Parameters that control the training

        learning_rate (`float`, *optional*, defaults to `1e-6`):
            Learning rate of the text expert.
        image_learning_rate (`float`, *optional*, defaults to `3e-5`):
            Learning rate of the image expert.
        max_grad_norm (`float`, *optional*, defaults to `1.0`):
            Gradients are clipped to this norm, the text expert's and the image expert's apart.
        adam_epsilon (`float`, *optional*, defaults to `1e-15`):
            Adam's epsilon: the flow's gradients are of the order of 1e-9, which TRL's 1e-8 would drown.
        per_device_eval_batch_size (`int`, *optional*):
            Trajectories per device in evaluation: about 8, whole groups of `num_generations_eval`, by default of
            `num_generations`.
        gradient_accumulation_steps (`int`, *optional*):
            Chosen so that a generation batch holds whole groups: one prompt, if one group fills it.

        > Parameters that control trust and logging

        trust_checks (`str`, *optional*, defaults to `"raise"`):
            If a start-up check fails (rollout and training velocities differ, noise repeats in a group, ...):
            `"raise"`, `"warn"`, or `"off"`.
        alarms (`str`, *optional*, defaults to `"stop"`):
            What watches the whole run: drifting images, failing rewards, thinkings that repeat themselves, updates
            that grow. `"stop"` warns, and for the last of these saves a checkpoint and stops; `"warn"` only warns;
            `"off"` measures nothing.
        log_completions_images (`bool`, *optional*, defaults to `True`):
            With `log_completions`, also write the images to parquet files beside TRL's.
        gallery_steps (`int`, *optional*, defaults to `50`):
            Show a generation in `gallery.html` every so many optimizer steps; 0 for no gallery.
    """

    # Other defaults for TRL's parameters
    learning_rate: float = field(
        default=1e-6,
        metadata={"help": "Learning rate of the text expert. Paper: 1e-6."},
    )
    adam_epsilon: float = field(
        default=1e-15,
        metadata={"help": "Adam's epsilon; the flow's gradients are far below TRL's default of 1e-8."},
    )
    num_generations: int | None = field(default=24, metadata={"help": "Trajectories per prompt, G. Paper: 24."})
    num_iterations: int = field(default=2, metadata={"help": "PPO epochs over each generation batch. Paper: 2."})
    loss_type: str = field(
        default="grpo",
        metadata={"help": "TRL's text loss; 'grpo' is the paper's eq. (2): mean per sequence, then mean."},
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Dropout would make the first ratio differ from 1; leave it off."},
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "Compute in bfloat16. None: if the hardware has it, unless fp16 is set."}
    )
    dataloader_pin_memory: bool = field(
        default=True, metadata={"help": "Pin the data loaders' memory, where there is a GPU."}
    )
    max_completion_length: int | None = field(
        default=512, metadata={"help": "Most thinking tokens sampled per prompt."}
    )
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Trajectories per device and micro-step."})
    gradient_accumulation_steps: int | None = field(
        default=None,
        metadata={
            "help": "Micro-steps per optimizer step. None: the fewest that make whole groups of num_generations."
        },
    )
    per_device_eval_batch_size: int | None = field(
        default=None, metadata={"help": "Trajectories per device in evaluation. None: whole groups, about 8."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Every trained weight gets a gradient in each pass, so DDP need not search."},
    )
    log_multimodal: bool = field(
        default=True,
        metadata={"help": "Show the images in wandb's and trackio's tables."},
    )

    # Parameters that control the images
    num_inference_steps: IntOfRounds = field(
        default=25,
        metadata={"help": "Denoising steps in training rollouts, or those of each round. Paper: 25.", "nargs": "+"},
    )
    eval_num_inference_steps: int = field(default=50, metadata={"help": "Denoising steps in evaluation. Paper: 50."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Guidance scale in training; 1: none. Paper: 1."})
    eval_guidance_scale: float = field(
        default=1.0, metadata={"help": "Guidance scale in evaluation; 1: none. Paper: 1, BAGEL's own evaluation: 4."}
    )
    timestep_shift: float = field(default=3.0, metadata={"help": "Shift of the timestep schedule. Paper: 3."})
    image_batch_size: int | None = field(
        default=None,
        metadata={"help": "Images denoised at once, and judged while the next are; None: all that fit."},
    )
    compile_layers: bool = field(
        default=False, metadata={"help": "Compile the parts of each layer around attention with torch.compile."}
    )
    thinking: bool = field(default=True, metadata={"help": "Think before painting; without, text_weight has to be 0."})
    system_prompt: str = field(
        default="auto",
        metadata={"help": "System prompt of prompts without one; 'auto': the model's own; '': none."},
    )

    # Parameters that control the stochastic steps
    sde_type: str = field(default="sde", metadata={"help": "'sde' (Flow-SDE, the paper's) or 'cps'."})
    noise_level: FloatOfRounds = field(
        default=0.8,
        metadata={"help": "Strength of the SDE's noise, or that of each round. Paper: 0.8.", "nargs": "+"},
    )
    sde_window_range: RangeOfRounds = field(
        default_factory=lambda: [0, 5],
        metadata={"help": "Steps [low, high) that may be stochastic, or two numbers a round. Paper: 0 5."},
    )
    sde_window_size: IntOfRounds = field(
        default=3,
        metadata={"help": "Stochastic, trained steps per image, or those of each round. Paper: 3.", "nargs": "+"},
    )
    sde_window_mode: str = field(default="contiguous", metadata={"help": "'contiguous', 'scatter' or 'fixed'."})
    sde_window_scope: str = field(
        default="generation",
        metadata={"help": "One window per 'generation' batch, 'rank', 'group' or 'sample'."},
    )

    # Parameters that control the objective
    text_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the text objective; 0 freezes the text expert."},
    )
    flow_weight: float = field(
        default=1.0,
        metadata={"help": "Weight (lambda) of the image objective; 0 freezes the image expert. Paper: 1."},
    )
    process_reward_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of rewards of the thinking alone in the text's advantage; 0: only logged."},
    )
    image_objective: str = field(
        default="flow_grpo",
        metadata={"help": "What trains the image expert: 'flow_grpo' (the paper's), 'fpo', 'awm' or 'nft'."},
    )
    matching_samples: int = field(
        default=8, metadata={"help": "Points per image on lines from noise to it, for 'fpo', 'awm' and 'nft'."}
    )
    nft_beta: float = field(
        default=1.0, metadata={"help": "How far DiffusionNFT's two velocities lie from the old one."}
    )
    flow_epsilon: float | None = field(
        default=None,
        metadata={
            "help": "Clip range of the image's ratio, at 262144 numbers per image and the paper's steps. None: 1e-6 "
            "(the paper's), for 'fpo' 3e-5, for 'awm' 1e-4."
        },
    )
    ratio_norm: bool = field(
        default=True,
        metadata={"help": "Centre and rescale the image's log-ratio (RatioNorm)."},
    )
    flow_regularizer: str = field(
        default="velocity_mse",
        metadata={"help": "'velocity_mse', 'latent_kl', 'latent_kl_flow_grpo' or 'none'."},
    )
    flow_regularizer_weight: float = field(
        default=1.5e-5,
        metadata={
            "help": "Weight of the regulariser, at 262144 numbers per image and the paper's steps. Paper: 1.5e-5."
        },
    )
    scale_with_latents: bool = field(
        default=True,
        metadata={"help": "Rescale flow_epsilon and flow_regularizer_weight to the size of image and steps."},
    )
    flow_old_source: str = field(
        default="recompute",
        metadata={"help": "Old velocities: 'recompute' (training forward) or 'rollout' (sampler)."},
    )
    flow_context_grad: str = field(
        default="detach",
        metadata={"help": "'detach' or 'full': whether the image's loss flows through the text it saw."},
    )

    # Parameters that control the training
    image_learning_rate: float = field(
        default=3e-5,
        metadata={"help": "Learning rate of the image expert. Paper: 3e-5."},
    )

    # Parameters that control trust and logging
    trust_checks: str = field(
        default="raise",
        metadata={"help": "If a start-up check fails: 'raise', 'warn' or 'off'."},
    )
    alarms: str = field(
        default="stop",
        metadata={"help": "While training: 'stop' (updates that grow end the run), 'warn' or 'off'."},
    )
    log_completions_images: bool = field(
        default=True,
        metadata={"help": "With log_completions, write the images to parquet files beside TRL's."},
    )
    gallery_steps: int = field(
        default=50,
        metadata={"help": "Show a generation in gallery.html every so many optimizer steps; 0: no gallery."},
    )

    def __post_init__(self) -> None:
        check_options()
        read_numbers(self, PER_ROUND)
        check_sizes(self)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        if self.gradient_accumulation_steps is None:
            self.gradient_accumulation_steps = _whole_groups(self.num_generations, self._micro_batch())
        group = self.num_generations_eval or self.num_generations or 1
        self.per_device_eval_batch_size = whole_groups(self.per_device_eval_batch_size, group, _world_size())
        if getattr(self, "activation_checkpointing", False) is None:
            self.activation_checkpointing = self.gradient_checkpointing  # the newer name of the same thing
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        check_choices(self)
        if self.flow_epsilon is None:
            self.flow_epsilon = _EPSILON[self.image_objective]
        check_values(self)
        check_groups(self, _world_size())
        super().__post_init__()
        check_sampling(self)
        check_window(self)
        check_epochs(self)
        check_micro_batches(self)
        check_rounds(self)
        check_averages(self)
        check_scouts(self, _world_size())
        check_thinkings(self)
        check_sharding(self)

    @classmethod
    def paper(cls, output_dir: str, **kwargs: Any) -> "UniGRPOConfig":
        """The paper's run, a cluster's work: 32 prompts of 24 trajectories per generation, 1024 pixels."""
        config = {"per_device_train_batch_size": 4, **kwargs}
        trajectories = 32 * config.get("num_generations", 24)
        micro_batch = config["per_device_train_batch_size"] * _world_size()
        config.setdefault("gradient_accumulation_steps", math.ceil(trajectories / micro_batch))
        return cls(output_dir=output_dir, **config)

    @classmethod
    def single_gpu(cls, output_dir: str, **kwargs: Any) -> "UniGRPOConfig":
        """One large GPU with LoRA: one prompt of 24 trajectories per generation, 512 pixels, rates for adapters."""
        return cls(output_dir=output_dir, **{**SINGLE_GPU, **kwargs})

    @classmethod
    def fast(cls, output_dir: str, **kwargs: Any) -> "UniGRPOConfig":
        """
        Less time for a point of reward, on one large GPU with LoRA: as [`single_gpu`], but the image is trained by
        DiffusionNFT, painted in 10 steps, and of the 16 trajectories of a prompt the 8 best and worst are trained on.
        Chosen by the demo: docs/performance.md has what each of these saved there. It is not the paper's method.
        """
        return cls(output_dir=output_dir, **{**FAST, **kwargs})

    @classmethod
    def editing(cls, output_dir: str, **kwargs: Any) -> "UniGRPOConfig":
        """
        Edits of source images on one large GPU with LoRA: as [`single_gpu`], with shorter thinkings, and half as many
        trajectories, as each takes about twice the memory and time beside its source.
        """
        return cls(output_dir=output_dir, **{**EDITING, **kwargs})

    @classmethod
    def self_refinement(cls, output_dir: str, **kwargs: Any) -> "UniGRPOConfig":
        """
        A second attempt at the worst image of each group, as in AlphaGRPO, on one large GPU with LoRA: as
        [`single_gpu`], with half as many trajectories. The second round always paints, and an image that is no better
        than the first one is paid as if it were the first one: right where a judge then picks the better of the two.
        """
        return cls(output_dir=output_dir, **{**SELF_REFINEMENT, **kwargs})

    @classmethod
    def reflect_until_good(cls, output_dir: str, **kwargs: Any) -> "UniGRPOConfig":
        """
        A second attempt unless the image is good, as in R3, on one large GPU with LoRA: as [`single_gpu`], with half
        as many trajectories. The model learns to stop: by perfect images among those that groups go on from, and by a
        cost of each further image. Evaluation goes on for four rounds at most.
        """
        return cls(output_dir=output_dir, **{**REFLECT_UNTIL_GOOD, **kwargs})

    @classmethod
    def self_rewarded(cls, output_dir: str, **kwargs: Any) -> "UniGRPOConfig":
        """
        The model's own reading as the reward, [`~trl_unigrpo.rewards.ReadBackReward`], on one large GPU with LoRA: no
        other model, no server. As [`single_gpu`], with DiffusionNFT for the images, the best of three objectives in
        docs/readback.md. The reward itself goes to the trainer.
        """
        return cls(output_dir=output_dir, **{**SELF_REWARDED, **kwargs})

    def _micro_batch(self) -> int:
        return self.per_device_train_batch_size * _world_size()


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _whole_groups(num_generations: int | None, micro_batch: int) -> int:
    """Fewest micro-steps whose trajectories make whole groups."""
    return math.lcm(num_generations or 1, micro_batch) // micro_batch
