"""`trl-unigrpo doctor`."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from .options import told_in_a_line


@dataclass(frozen=True)
class DoctorOptions:
    """The model to look at, and the machine that is to run it."""

    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of a BAGEL; without it, the released 7B's sizes.")
    ] = None
    memory: Annotated[float | None, typer.Option(help="GiB to fit into; without it, the GPU's.")] = None
    tflops: Annotated[float | None, typer.Option(help="TFLOP/s; without it, measured on the GPU.")] = None
    bandwidth: Annotated[float | None, typer.Option(help="TB/s of memory; without it, measured on the GPU.")] = None
    interconnect: Annotated[
        float | None, typer.Option(help="GB/s that reach a GPU from the others; without it an H100's NVLink, 450.")
    ] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Also run one step with random weights.")] = False


@dataclass(frozen=True)
class WorkloadOptions:
    """Settings of the run: those of a [`Workload`], with one rank for both experts."""

    image_size: Annotated[str, typer.Option(help="Side of the images, or height and width as in 384x640.")] = "512"
    num_generations: Annotated[int, typer.Option(help="Trajectories per prompt.")] = 24
    num_prompts: Annotated[int, typer.Option(help="Prompts per generation batch.")] = 1
    prompt_length: Annotated[int, typer.Option(help="Tokens of a prompt, system prompt included.")] = 128
    completion_length: Annotated[int, typer.Option(help="Thinking tokens.")] = 512
    num_inference_steps: Annotated[int, typer.Option(help="Denoising steps.")] = 25
    sde_window_size: Annotated[int, typer.Option(help="Stochastic, trained steps per image.")] = 3
    num_iterations: Annotated[int, typer.Option(help="Passes over each generation batch.")] = 2
    micro_batch_size: Annotated[int, typer.Option(help="Trajectories per forward of the update.")] = 4
    image_batch_size: Annotated[int, typer.Option(help="Images denoised at once.")] = 8
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapters; 0: full fine-tuning.")] = 32
    ema: Annotated[bool, typer.Option(help="Hold an average of all trained weights: ema_decay.")] = False
    image_old_policy: Annotated[
        bool, typer.Option(help="Hold one of the image expert's as the old policy: image_old_policy_decay.")
    ] = False
    quantization: Annotated[str, typer.Option(help="Of the frozen experts: none, nf4 or nf4-double.")] = "none"
    num_rounds: Annotated[int, typer.Option(help="Rounds of a trajectory, each with an image.")] = 1
    look_length: Annotated[int, typer.Option(help="Tokens said to the model's own image, system prompt included.")] = (
        128
    )
    reflection_length: Annotated[int, typer.Option(help="Tokens of its answer.")] = 256
    round_context: Annotated[str, typer.Option(help="What a later round sees: markov or full.")] = "markov"
    lines: Annotated[bool, typer.Option(help="Train at points on lines (fpo, awm, nft), as many as noisy steps.")] = (
        False
    )
    images_per_thinking: Annotated[int, typer.Option(help="Images painted of each thinking.")] = 1
    scout_generations: Annotated[
        int | None, typer.Option(help="Trajectories of each prompt's pool of scouts; without it, none.")
    ] = None
    scout_num_inference_steps: Annotated[int, typer.Option(help="Denoising steps of a scout.")] = 4
    dead_share: Annotated[float, typer.Option(help="Share of images left out of the update: flow/frac_dead.")] = 0.0
    gradient_checkpointing: Annotated[bool, typer.Option(help="Compute activations again in the update.")] = True
    processes: Annotated[int, typer.Option(help="GPUs; all other numbers are those of one of them.")] = 1
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Spread weights over them (FSDP2) instead of DDP.")] = False
    gather_for_rollout: Annotated[bool, typer.Option(help="Under FSDP2, hold all weights while sampling.")] = True
    sync_each_batch: Annotated[bool, typer.Option(help="Under FSDP2, reduce gradients after each micro-batch.")] = True

    def settings(self) -> dict[str, Any]:
        """Arguments of [`Workload`]."""
        settings = asdict(self)
        rank = settings.pop("lora_rank")
        settings["lora_ranks"] = (rank, rank) if rank else None
        return settings | {"quantization": None if self.quantization == "none" else self.quantization}


def doctor_command(options: DoctorOptions, workload: WorkloadOptions) -> None:
    """Estimate memory and time of a run, and say whether it fits on this machine."""
    from .doctor_tables import run_doctor

    with told_in_a_line("doctor", ValueError, OSError):
        run_doctor(
            options.model,
            options.memory,
            options.tflops,
            options.bandwidth,
            options.interconnect,
            options.dry_run,
            **workload.settings(),
        )
