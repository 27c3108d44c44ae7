"""UniGRPO on ShapeWorld with two separate networks: a tiny language model, and a tiny Stable Diffusion 3.

    python benchmarks/pipeline_shapeworld.py

Both are trained from scratch by the package's own SFT on ShapeWorld's corpus, around the autoencoder of the built-in
model and text encoders with random, frozen weights; then by UniGRPO. The reward is measured on held-out prompts before
and after, with the same prompts and noise.
"""

import argparse
import json
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from rich.console import Console
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PrinterCallback, Qwen3Config, Qwen3ForCausalLM

from trl_unigrpo import (
    UnifiedSFTConfig,
    UnifiedSFTTrainer,
    UniGRPOConfig,
    UniGRPOTrainer,
)
from trl_unigrpo.experiments.demo.demo import quiet
from trl_unigrpo.models.pipeline import PipelineForUnifiedGeneration, PipelineUnifiedConfig
from trl_unigrpo.shapeworld import (
    demo_settings,
    load_base,
    shapeworld_dataset,
    shapeworld_reward,
)
from trl_unigrpo.shapeworld.corpus import pretraining_corpus
from trl_unigrpo.shapeworld.evaluate import evaluate_model
from trl_unigrpo.shapeworld.tokenizer import shapeworld_tokenizer
from trl_unigrpo.statistics import mean_interval


RESULTS = Path(__file__).parent / "results" / "pipeline_shapeworld.json"
LENGTH = 22
"""Tokens of the painter's prompt; the longest plan has 17."""


def encoder(vocabulary: int, seed: int) -> nn.Module:
    """Make a text encoder of random features: embeddings of unit size tell words and places apart."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=2,
        projection_dim=32,
        max_position_embeddings=LENGTH,
        eos_token_id=2,
    )
    made = CLIPTextModelWithProjection(config).eval()
    for embedding in (m for m in made.modules() if isinstance(m, nn.Embedding)):
        nn.init.normal_(embedding.weight)
    return made


def untrained_model(seed: int = 0) -> PipelineForUnifiedGeneration:
    """Make half a million weights that think and paint: four layers of width 64 in each network."""
    words = shapeworld_tokenizer()
    vae = load_base()[0].codec.vae
    told = [shapeworld_tokenizer() for _ in range(2)]
    for each in told:
        each.model_max_length, each.padding_side = LENGTH, "right"
    encoders = [encoder(len(words), seed + k) for k in range(2)]
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=3,
        patch_size=1,
        in_channels=8,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        out_channels=8,
        pos_embed_max_size=32,
    )
    thinker = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(words),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            max_position_embeddings=1024,
            initializer_range=0.08,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=told[0],
        text_encoder_2=encoders[1],
        tokenizer_2=told[1],
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.vae_scale_factor = vae.spatial_compression_ratio  # not two to the number of blocks
    config = PipelineUnifiedConfig(
        painter_prompt="completion", system_prompt=None, painter_arguments={"max_sequence_length": 1}
    )
    return PipelineForUnifiedGeneration(thinker, words, pipeline, config)


def fine_tune(model: PipelineForUnifiedGeneration, steps: int, folder: str, seed: int = 0) -> None:
    settings: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": 96,
        "noise_draws": 2,
        "timestep_sampling": "uniform",
        "timestep_shift": 4.0,
        "learning_rate": 2e-3,
        "adam_beta2": 0.98,
        "weight_decay": 0.01,
        "warmup_steps": 50,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": round(0.6 * steps), "min_lr_ratio": 0.05},
        "logging_steps": 50,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "seed": seed,
    }
    args = UnifiedSFTConfig(output_dir=folder, **settings)
    corpus = pretraining_corpus(steps * args.per_device_train_batch_size, seed=seed)
    UnifiedSFTTrainer(model=model, args=args, train_dataset=corpus, processing_class=model.tokenizer).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="file of the fine-tuned weights: read if it is there, else written")
    parser.add_argument("--sft_steps", type=int, default=620)
    parser.add_argument("--rollouts", type=int, default=45)
    parser.add_argument("--num-prompts", type=int, default=525)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        model = untrained_model(arguments.seed)
        if arguments.base is not None and arguments.base.is_file():
            load_model(model, arguments.base)
        else:
            fine_tune(model, arguments.sft_steps, folder, arguments.seed)
            if arguments.base is not None:
                save_model(model, str(arguments.base))
        sft_seconds = time.perf_counter() - start
        before = evaluate_model(model, model.tokenizer, arguments.num_prompts)
        settings = demo_settings(arguments.rollouts)
        trainer = UniGRPOTrainer(
            model=model,
            reward_funcs=shapeworld_reward,
            args=UniGRPOConfig(output_dir=folder, disable_tqdm=True, use_cpu=True, seed=arguments.seed, **settings),
            train_dataset=shapeworld_dataset("train"),
            processing_class=model.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        begin = time.perf_counter()
        trainer.train()
        training_seconds = time.perf_counter() - begin
        after = evaluate_model(model, model.tokenizer, arguments.num_prompts)
    interval = mean_interval(after.reward - before.reward)
    found = {
        "date": str(date.today()),
        "seed": arguments.seed,
        "prompts": arguments.num_prompts,
        "generations": arguments.rollouts,
        "sft_steps": arguments.sft_steps,
        "sft_seconds": sft_seconds,
        "training_seconds": training_seconds,
        "before": before.reward.mean(),
        "before_plan": before.plan.mean(),
        "after": after.reward.mean(),
        "after_plan": after.plan.mean(),
        "gain": interval.mean,
        "gain_low": interval.low,
        "gain_high": interval.high,
    }
    Console().print_json(json.dumps(found))
    arguments.results.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
