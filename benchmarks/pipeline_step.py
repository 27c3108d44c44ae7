"""The cost of running a pipeline's own loop: one rollout and one update of Stable Diffusion 3 with random weights.

    python benchmarks/pipeline_step.py                                      a tiny one, on the CPU
    python benchmarks/pipeline_step.py --size medium --device cuda          the sizes of SD 3.5 medium, 512 pixels

Three numbers. The overhead of the replay is the time of K velocities and their gradients outside of the transformer's
forward and the backward pass. The rollout's seconds for an image-step stand beside those of the pipeline's own call,
adapters on, without guidance. And, on a CPU, the FLOPs counted in a rollout of N steps, its decoding, and an update at
K of them, against the floor: each prompt encoded once, N + K forwards and K backward passes of the transformer, one
decoding.
"""

import argparse
import json
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trl_unigrpo.estimate.counting import count_flops
from trl_unigrpo.flow.sampler import RolloutPlan
from trl_unigrpo.models.pipeline import PipelineForUnifiedGeneration, PipelineUnifiedConfig
from trl_unigrpo.sampling import decode, paint
from trl_unigrpo.trajectory import Image, Round, Steps, Trajectory


RESULTS = Path(__file__).parent / "results" / "pipeline_step.json"
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "transformer": {
            "num_layers": 4,
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "joint_attention_dim": 64,
            "caption_projection_dim": 64,
            "pooled_projection_dim": 64,
            "in_channels": 4,
            "sample_size": 32,
            "pos_embed_max_size": 32,
        },
        "vae": {"latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4},
        "clip": 32,
        "image_size": 256,
    },
    # The released configuration of stable-diffusion-3.5-medium; its text encoders are left tiny.
    "medium": {
        "transformer": {
            "num_layers": 24,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "in_channels": 16,
            "sample_size": 128,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        "vae": {"latent_channels": 16, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
        "clip": 1024,
        "image_size": 512,
    },
}


def byte_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    alphabet = ["<pad>", "<end>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    words = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", model_max_length=max_length
    )
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


def build(size: str, dtype: torch.dtype, device: str) -> PipelineForUnifiedGeneration:
    """Make a tiny thinker and a painter of the size, with adapters on both."""
    torch.manual_seed(0)
    sizes = SIZES[size]
    with torch.device(device):
        transformer = SD3Transformer2DModel(patch_size=2, out_channels=None, **sizes["transformer"])
        blocks = len(sizes["vae"]["block_out_channels"])
        vae = AutoencoderKL(
            **sizes["vae"],
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            shift_factor=0.06,
            scaling_factor=1.5,
        )
        clip = CLIPTextConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=2,
            num_hidden_layers=2,
            projection_dim=sizes["clip"],
            max_position_embeddings=77,
            eos_token_id=1,
        )
        encoders = [CLIPTextModelWithProjection(clip) for _ in range(2)]
        thinker = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=300,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=16,
            )
        )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.to(dtype).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.to(dtype).eval(),
        text_encoder=encoders[0].to(dtype).eval(),
        tokenizer=byte_tokenizer(77),
        text_encoder_2=encoders[1].to(dtype).eval(),
        tokenizer_2=byte_tokenizer(77),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    config = PipelineUnifiedConfig(painter_arguments={"max_sequence_length": 77})
    model = PipelineForUnifiedGeneration(thinker.to(dtype), byte_tokenizer(512), pipeline, config)
    get_peft_model(model, LoraConfig(r=8, target_modules=model.default_lora_targets("image")))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


class Timed:
    """Seconds inside of a function, and how often it was called."""

    def __init__(self, function: Callable[..., Any], wait: Callable[[], None]):
        self.function, self.wait, self.seconds, self.calls = function, wait, 0.0, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.wait()
        start = time.perf_counter()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.wait()
            self.seconds += time.perf_counter() - start
            self.calls += 1


def measure(model: PipelineForUnifiedGeneration, arguments: argparse.Namespace) -> dict[str, float]:
    side, batch, window = SIZES[arguments.size]["image_size"], arguments.batch, arguments.window
    size, on_gpu = (side, side), arguments.device != "cpu"

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    prompts = [f"an image of {row} things" for row in range(batch)]
    plan = RolloutPlan(model.own_timesteps(arguments.steps, size), size, torch.arange(window))

    def rollout() -> list[Image]:
        generators = [torch.Generator().manual_seed(row) for row in range(batch)]
        return paint(model, [Trajectory(prompt, [3]) for prompt in prompts], plan, generators)

    def update(images: list[Image], backward: Callable[..., Any] = torch.Tensor.backward) -> None:
        model.zero_grad(set_to_none=True)
        steps = Steps.of([Trajectory("", [], row, [Round([], [image])]) for row, image in enumerate(images)])
        for _, velocity in model.velocities(steps):
            backward(velocity.square().mean())

    images = rollout()
    update(images)
    network, loop = model.painter, model._runner.loop
    forward = Timed(loop.forward, wait)
    loop.forward = forward  # type: ignore[method-assign]
    overheads, seconds = [], []
    for _ in range(arguments.repeats):
        backward = Timed(torch.Tensor.backward, wait)
        forward.seconds = 0.0
        wait()
        start = time.perf_counter()
        update(images, backward)
        wait()
        total = time.perf_counter() - start
        overheads.append(1 - (forward.seconds + backward.seconds) / total)
        seconds.append(total)
    forward.seconds = 0.0
    wait()
    start = time.perf_counter()
    rollout()
    wait()
    rollout_seconds = time.perf_counter() - start
    rollout_overhead = 1 - forward.seconds / rollout_seconds
    del loop.forward
    pipeline_seconds = own_loop_seconds(model, prompts, side, arguments.steps, wait)

    found: dict[str, float] = {
        "replay_overhead": sorted(overheads)[len(overheads) // 2],
        "rollout_overhead": rollout_overhead,
        "seconds_per_image_step_update": sorted(seconds)[len(seconds) // 2] / (batch * window),
        "seconds_per_image_step_rollout": rollout_seconds / (batch * arguments.steps),
        "seconds_per_image_step_pipeline": pipeline_seconds / (batch * arguments.steps),
    }
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        update(rollout())
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    else:
        found |= flops(model, network, prompts, rollout, update, arguments)
    return found


@torch.no_grad()
def own_loop_seconds(
    model: PipelineForUnifiedGeneration, prompts: list[str], side: int, steps: int, wait: Callable[[], None]
) -> float:
    """Time the pipeline's own call for a batch, without decoding, after one call to warm up."""
    pipeline = model.pipeline
    pipeline.set_progress_bar_config(disable=True)
    settings = {"height": side, "width": side, "guidance_scale": 1.0, "max_sequence_length": 77}
    seconds = 0.0
    for count in (1, steps):
        wait()
        start = time.perf_counter()
        pipeline(prompts, num_inference_steps=count, output_type="latent", **settings)
        wait()
        seconds = time.perf_counter() - start
    return seconds


def flops(
    model: PipelineForUnifiedGeneration,
    network: Any,
    prompts: list[str],
    rollout: Callable[..., Any],
    update: Callable[..., Any],
    arguments: argparse.Namespace,
) -> dict[str, float]:
    """Count FLOPs, and those of the floor's parts one by one."""
    with count_flops() as counted:
        images = rollout()
        decode(model, images)
        update(images)
    latents = torch.stack([image.latents for image in images])
    embeds, pooled = None, None
    with count_flops() as encoding, torch.no_grad():
        embeds, _, pooled, _ = model.pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=77
        )
    inputs = {
        "encoder_hidden_states": embeds,
        "pooled_projections": pooled,
        "timestep": torch.full((len(latents),), 500.0),
    }
    with count_flops() as forward:
        out = network(latents, **inputs).sample
    with count_flops() as backward:
        out.square().mean().backward()
    with count_flops() as decoding, torch.no_grad():
        model.pipeline.vae.decode(latents)
    one, back = forward.get_total_flops(), backward.get_total_flops()
    floor = encoding.get_total_flops() + decoding.get_total_flops()
    floor += (arguments.steps + arguments.window) * one + arguments.window * back
    return {"flops": counted.get_total_flops(), "floor_flops": floor, "flops_ratio": counted.get_total_flops() / floor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--num-inference-steps", dest="steps", type=int, default=10, help="denoising steps, N")
    parser.add_argument("--window", type=int, default=3, help="trained steps, K")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--checkpointing", action="store_true", help="compute blocks again in the backward pass")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    model = build(arguments.size, dtype, arguments.device)
    if arguments.checkpointing:
        model.gradient_checkpointing_enable()
    found = measure(model, arguments)
    table = Table("measure", "value")
    for name, value in found.items():
        table.add_row(name, f"{value:.4g}")
    Console().print(table)
    settings = {name: str(value) for name, value in vars(arguments).items() if name != "results"}
    arguments.results.write_text(json.dumps({"date": str(date.today()), **settings, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
