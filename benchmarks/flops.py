"""Counted FLOPs of one whole generation of UniGRPO against the floor in closed form.

    python benchmarks/flops.py

A tiny BAGEL with random weights, 2 prompts x 8 trajectories, 10 denoising steps, K = 3, two passes, full fine-tuning,
no activation checkpointing: a backward pass costs two forwards. The floor computes each prompt once, each decoded
token once, each trajectory's context once, N velocities, one reference pass and two updates, attention over visible
pairs alone, and the VAE's decoder as counted. One multiply-add is two FLOPs.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import PrinterCallback

from trl_unigrpo import UniGRPOConfig, UniGRPOTrainer
from trl_unigrpo.models.bagel import BagelConfig, BagelForUnifiedGeneration, LatentCodec
from trl_unigrpo.models.patch_autoencoder import PatchAutoencoderKL
from trl_unigrpo.shapeworld.build import untrained_model
from trl_unigrpo.shapeworld.demo import quiet
from trl_unigrpo.shapeworld.tokenizer import shapeworld_tokenizer


PROMPTS = ("a red circle and a blue square", "a green cross and a pink ring")
GROUP, STEPS, WINDOW, EPOCHS, COMPLETION, IMAGE_SIZE = 8, 10, 3, 2, 20, 48
RESULTS = Path(__file__).parent / "results" / "flops.json"


def attention_flops(query: tuple[int, ...], key: tuple[int, ...]) -> int:
    """Scores and weighted sum of (B, A, S, D) queries over (B, A, S', D) keys: 4 B A S S' D."""
    batch, heads, length, size = query
    return 4 * batch * heads * length * key[2] * size


def forward_formula(query: Any, key: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return attention_flops(query, key)


def backward_formula(grad: Any, query: Any, key: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Five products of the forward's two: the scores again, and the gradients of scores, values, queries, keys."""
    return attention_flops(query, key) * 5 // 2


ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward_formula,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward_formula,
}


@contextmanager
def count() -> Iterator[FlopCounterMode]:
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        yield counter


def floor(config: BagelConfig, prompt: int, completion: int, vae: int) -> dict[str, int]:
    """FLOPs of each part of a generation that no implementation avoids."""
    llm = config.llm_config
    width, heads, layers = llm.hidden_size, llm.num_attention_heads, llm.num_hidden_layers
    head_dim = width // heads
    matrices = width * head_dim * (2 * heads + 2 * llm.num_key_value_heads) + 3 * width * llm.intermediate_size
    token, pair, word = 2 * matrices * layers, 4 * heads * head_dim * layers, 2 * width * llm.vocab_size
    latents = (IMAGE_SIZE // config.pixels_per_token) ** 2
    context, tokens = prompt + completion, latents + 2

    def text(length: int, start: int = 0) -> int:
        """Tokens start .. start + length - 1, each over all before it and itself."""
        return length * token + pair * sum(start + i + 1 for i in range(length))

    time = 2 * (256 * width + width * width)
    image = tokens * token + pair * tokens * (context + tokens) + 4 * latents * config.latent_channels * width + time
    trajectories = GROUP * len(PROMPTS)
    return {
        "prefill, once per prompt": len(PROMPTS) * (text(prompt) + word),
        "decode": trajectories * (text(completion - 1, prompt) + (completion - 1) * word),
        "context, once per trajectory": trajectories * text(context),
        "denoising": trajectories * STEPS * image,
        "VAE": vae,
        "reference pass": trajectories * (text(context) + WINDOW * image),
        "updates": EPOCHS * 3 * trajectories * (text(context) + WINDOW * image + completion * word),
    }


def model_and_tokenizer() -> tuple[BagelForUnifiedGeneration, Any]:
    vae = PatchAutoencoderKL()
    config = {"_class_name": "PatchAutoencoderKL", **{k: v for k, v in vae.config.items() if not k.startswith("_")}}
    model = untrained_model(LatentCodec(vae, config))
    torch.nn.init.normal_(model.llm2vae.weight, std=0.1)
    return model, shapeworld_tokenizer()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    quiet()
    model, tokenizer = model_and_tokenizer()
    lengths: list[int] = []

    def reward(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], **kwargs: Any
    ) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [float(i) for i in range(len(prompts))]

    with tempfile.TemporaryDirectory() as folder:
        args = UniGRPOConfig(
            output_dir=folder,
            max_steps=EPOCHS,
            num_generations=GROUP,
            per_device_train_batch_size=GROUP * len(PROMPTS),
            max_completion_length=COMPLETION,
            generation_kwargs={"min_new_tokens": COMPLETION},
            image_size=IMAGE_SIZE,
            num_inference_steps=STEPS,
            learning_rate=1e-4,
            image_learning_rate=1e-4,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        dataset = Dataset.from_dict({"prompt": list(PROMPTS)})
        trainer = UniGRPOTrainer(model, reward, args, train_dataset=dataset, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        with count() as counter:
            trainer.train()
    trajectories = GROUP * len(PROMPTS)
    if lengths != [COMPLETION] * trajectories:
        raise RuntimeError(f"thinkings have lengths {lengths}, the floor is for {COMPLETION}")
    messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
    with count() as vae:
        model.decode_latents(
            torch.zeros(trajectories, *model.latent_shape((IMAGE_SIZE, IMAGE_SIZE))), (IMAGE_SIZE,) * 2
        )
    parts = floor(model.config, len(ids[0]), COMPLETION, vae.get_total_flops())
    lowest, counted = sum(parts.values()), counter.get_total_flops()
    table = Table("part", "MFLOP")
    for name, value in parts.items():
        table.add_row(name, f"{value / 1e6:.1f}")
    table.add_row("floor", f"{lowest / 1e6:.1f}", style="bold")
    table.add_row("counted", f"{counted / 1e6:.1f}", style="bold")
    table.add_row("counted / floor", f"{counted / lowest:.3f}", style="bold")
    Console().print(table)
    result = {"date": str(date.today()), "floor": parts, "counted": counted, "ratio": counted / lowest}
    arguments.results.write_text(json.dumps({**result, "torch": torch.__version__}, indent=2) + "\n")


if __name__ == "__main__":
    main()
