"""The making of the shipped base model: an autoencoder of random scenes, then supervised fine-tuning on the corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import set_seed

from ...models.bagel import BagelConfig, BagelForUnifiedGeneration, LatentCodec
from ...shapeworld.corpus import pretraining_corpus
from ...shapeworld.tokenizer import shapeworld_tokenizer
from ...shapeworld.world import GRID_SIDE
from ...trainers.sft_trainer import UnifiedSFTConfig, UnifiedSFTTrainer
from .train_autoencoder import train_autoencoder


def untrained_model(codec: LatentCodec, seed: int = 0) -> BagelForUnifiedGeneration:
    """Make a BAGEL of 0.46 M parameters around an autoencoder: the 7B model's class, four layers of width 64."""
    tokenizer = shapeworld_tokenizer()
    token = tokenizer.convert_tokens_to_ids
    config = BagelConfig(
        llm_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            "initializer_range": 0.08,
            "bos_token_id": token("<|im_start|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": tokenizer.pad_token_id,
        },
        vae_config=codec.config,
        latent_patch_size=codec.patch_size,
        max_latent_size=GRID_SIDE,
        think_system_prompt=None,
        im_start_token_id=token("<|im_start|>"),
        im_end_token_id=token("<|im_end|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    set_seed(seed)
    model = BagelForUnifiedGeneration(config, codec)
    model.generation_config.eos_token_id = token("<|im_end|>")
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def build_base(
    output_dir: str | Path,
    seed: int = 0,
    autoencoder_steps: int = 2400,
    sft_steps: int = 2700,
    **overrides: Any,
) -> BagelForUnifiedGeneration:
    """
    Make the base model from nothing and save it, with its tokenizer, in `output_dir`.

    Args:
        seed: of the autoencoder, the corpus and its mistakes, the weights and the order.
        autoencoder_steps, sft_steps: optimizer steps of each stage.
        overrides: other values for [`UnifiedSFTConfig`].
    """
    vae = train_autoencoder(steps=autoencoder_steps, seed=seed)
    sizes = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    codec = LatentCodec(vae, {"_class_name": type(vae).__name__, **sizes})
    model, tokenizer = untrained_model(codec, seed), shapeworld_tokenizer()
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": sft_steps,
        "per_device_train_batch_size": 96,
        "noise_draws": 3,
        "timestep_sampling": "uniform",
        "timestep_shift": 4.0,
        "learning_rate": 2e-3,
        "adam_beta2": 0.98,
        "weight_decay": 0.01,
        "warmup_steps": 100,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": round(0.6 * sft_steps), "min_lr_ratio": 0.05},
        "logging_steps": 100,
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
        **overrides,
    }
    args = UnifiedSFTConfig(**settings)
    corpus = pretraining_corpus(args.max_steps * args.per_device_train_batch_size, seed=seed)
    trainer = UnifiedSFTTrainer(model=model, args=args, train_dataset=corpus, processing_class=tokenizer)
    trainer.train()
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return model
