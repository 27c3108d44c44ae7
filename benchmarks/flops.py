"""Counted FLOPs of one whole generation of UniGRPO against the floor in closed form.

    python benchmarks/flops.py

A tiny BAGEL, 2 prompts x 8 trajectories, 10 denoising steps, K = 3, two passes, full fine-tuning, no activation
checkpointing: a backward pass costs two forwards. One round with random weights; two rounds, each with an image of its
own, with those of ShapeWorld's base that sees. The floor computes each prompt once, each decoded
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
from trl_unigrpo.shapeworld import load_base
from trl_unigrpo.shapeworld.tokenizer import shapeworld_tokenizer


LOOK = "repair the image"
PROMPTS = ("a red circle and a blue square", "a green cross and a pink ring")
GROUP, STEPS, WINDOW, EPOCHS, COMPLETION, IMAGE_SIZE = 8, 10, 3, 2, 20, 48
RESULTS = Path(__file__).parent / "results" / "flops.json"


def model_and_tokenizer() -> tuple[BagelForUnifiedGeneration, Any]:
    vae = PatchAutoencoderKL()
    config = {"_class_name": "PatchAutoencoderKL", **{k: v for k, v in vae.config.items() if not k.startswith("_")}}
    model = untrained_model(LatentCodec(vae, config))
    torch.nn.init.normal_(model.llm2vae.weight, std=0.1)
    return model, shapeworld_tokenizer()


def workload(
    config: BagelConfig, prompt_length: int, num_rounds: int = 1, look_length: int = 1, round_context: str = "markov"
) -> Workload:
    return Workload(
        config,
        num_rounds=num_rounds,
        look_length=look_length,
        round_context=round_context,
        reflection_length=COMPLETION,
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


def tokens(tokenizer: Any, text: str) -> int:
    """Count those of a user's turn, and of what opens the answer."""
    messages = [{"role": "user", "content": text}]
    return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"])


def counted(
    model: BagelForUnifiedGeneration, tokenizer: Any, num_rounds: int, round_context: str = "markov"
) -> tuple[Workload, int]:
    """Run a generation and its passes; returns the workload, and the FLOPs that were counted."""
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
            num_rounds=num_rounds,
            round_context=round_context,
            max_reflection_length=COMPLETION,
            reflection_template=LOOK,
            allow_stop=False,
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
    if lengths != [COMPLETION] * GROUP * len(PROMPTS) * num_rounds:
        raise RuntimeError(f"texts have lengths {lengths}, the floor is for {COMPLETION}")
    lengths = [tokens(tokenizer, text) for text in (PROMPTS[0], LOOK)]
    return workload(model.config, lengths[0], num_rounds, lengths[1], round_context), counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    quiet()
    runs = {"one round": counted(*model_and_tokenizer(), 1), "two rounds": counted(*load_base(seeing=True), 2)}
    results = {name: (floor_flops(load), total) for name, (load, total) in runs.items()}
    table = Table("part", *(f"{name}, MFLOP" for name in results))
    columns = [{**parts, "floor": sum(parts.values()), "counted": found} for parts, found in results.values()]
    for name in columns[-1]:
        table.add_row(name, *(f"{column[name] / 1e6:.1f}" if name in column else "" for column in columns))
    ratios = [column["counted"] / column["floor"] for column in columns]
    table.add_row("counted / floor", *(f"{ratio:.3f}" for ratio in ratios), style="bold")
    Console().print(table)
    found = {
        name: {"floor": parts, "counted": total, "ratio": ratio}
        for (name, (parts, total)), ratio in zip(results.items(), ratios, strict=True)
    }
    written = {"date": str(date.today()), "torch": torch.__version__, **found}
    arguments.results.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
