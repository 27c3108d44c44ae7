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
from datetime import date
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback

from trl_unigrpo import UniGRPOConfig, UniGRPOTrainer
from trl_unigrpo.estimate import Workload, floor_flops
from trl_unigrpo.estimate.counting import count_flops
from trl_unigrpo.experiments.base.build import untrained_model
from trl_unigrpo.experiments.demo.demo import quiet
from trl_unigrpo.models.bagel import BagelConfig, BagelForUnifiedGeneration, LatentCodec
from trl_unigrpo.models.patch_autoencoder import PatchAutoencoderKL
from trl_unigrpo.shapeworld.tokenizer import shapeworld_tokenizer


PROMPTS = ("a red circle and a blue square", "a green cross and a pink ring")
GROUP, STEPS, WINDOW, EPOCHS, COMPLETION, IMAGE_SIZE = 8, 10, 3, 2, 20, 48
RESULTS = Path(__file__).parent / "results" / "flops.json"


def model_and_tokenizer() -> tuple[BagelForUnifiedGeneration, Any]:
    vae = PatchAutoencoderKL()
    config = {"_class_name": "PatchAutoencoderKL", **{k: v for k, v in vae.config.items() if not k.startswith("_")}}
    model = untrained_model(LatentCodec(vae, config))
    torch.nn.init.normal_(model.llm2vae.weight, std=0.1)
    return model, shapeworld_tokenizer()


def workload(config: BagelConfig, prompt_length: int) -> Workload:
    return Workload(
        config,
        image_size=IMAGE_SIZE,
        prompt_length=prompt_length,
        completion_length=COMPLETION,
        num_generations=GROUP,
        num_prompts=len(PROMPTS),
        num_inference_steps=STEPS,
        sde_window_size=WINDOW,
        num_iterations=EPOCHS,
        lora_ranks=None,
        half=False,
        gradient_checkpointing=False,
    )


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
        with count_flops() as counter:
            trainer.train()
    trajectories = GROUP * len(PROMPTS)
    if lengths != [COMPLETION] * trajectories:
        raise RuntimeError(f"thinkings have lengths {lengths}, the floor is for {COMPLETION}")
    messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
    parts = floor_flops(workload(model.config, len(ids[0])))
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
