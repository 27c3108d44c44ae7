"""The making of the shipped base models: an autoencoder, one that thinks and paints, and one that also sees."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import set_seed

from ...models.bagel import BagelConfig, BagelForUnifiedGeneration, LatentCodec
from ...sampling import generate
from ...shapeworld.corpus import pretraining_corpus
from ...shapeworld.dataset import shapeworld_dataset
from ...shapeworld.evaluate import MAX_COMPLETION_LENGTH, NUM_INFERENCE_STEPS
from ...shapeworld.render import CELL_SIZE, IMAGE_SIZE
from ...shapeworld.second_corpus import FAULTLESS, OwnImages, SecondRates, second_corpus
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


def sft_settings(output_dir: str | Path, steps: int, seed: int, **overrides: Any) -> dict[str, Any]:
    """Give the settings of both trainings, for so many steps."""
    return {
        "output_dir": str(output_dir),
        "max_steps": steps,
        "per_device_train_batch_size": 96,
        "noise_draws": 3,
        "timestep_sampling": "uniform",
        "timestep_shift": 4.0,
        "learning_rate": 2e-3,
        "adam_beta2": 0.98,
        "weight_decay": 0.01,
        "warmup_steps": 100,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": round(0.6 * steps), "min_lr_ratio": 0.05},
        "logging_steps": 100,
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
        **overrides,
    }


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
    args = UnifiedSFTConfig(**sft_settings(output_dir, sft_steps, seed, **overrides))
    corpus = pretraining_corpus(args.max_steps * args.per_device_train_batch_size, seed=seed)
    trainer = UnifiedSFTTrainer(model=model, args=args, train_dataset=corpus, processing_class=tokenizer)
    trainer.train()
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return model


def with_eyes(base: BagelForUnifiedGeneration, seed: int = 0) -> BagelForUnifiedGeneration:
    """
    Copy a base model into one that also sees: the tower is one linear patch embedding, nine tokens an image.

    Its vocabulary grows by the words of edits and second looks.
    """
    tokenizer, config = shapeworld_tokenizer(seeing=True), base.config.to_dict()
    width = base.config.llm_config.hidden_size
    config["llm_config"]["vocab_size"] = len(tokenizer)
    config["image_token_id"] = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    config["vit_max_num_patch_per_side"] = GRID_SIDE
    config["vit_config"] = {
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": 1,  # one more than there are
        "num_attention_heads": 1,
        "image_size": IMAGE_SIZE,
        "patch_size": CELL_SIZE,
    }
    set_seed(seed)
    model = BagelForUnifiedGeneration(BagelConfig(**config), base.codec)
    own, known = model.state_dict(), base.state_dict()
    with torch.no_grad():
        for name, weight in known.items():
            own[name][: len(weight)] = weight  # the vocabulary's rows, or all
    model.generation_config = base.generation_config
    return model


def own_images(base: BagelForUnifiedGeneration, number: int, seed: int = 0) -> OwnImages:
    """Have a base model paint prompts that it trains on."""
    prompts = list(shapeworld_dataset("train", number, seed=seed)["prompt"])
    samples = generate(
        base,
        prompts,
        shapeworld_tokenizer(),
        max_completion_length=MAX_COMPLETION_LENGTH,
        num_inference_steps=NUM_INFERENCE_STEPS,
        image_size=IMAGE_SIZE,
        batch_size=210,
        seed=seed,
    )
    return OwnImages.of(prompts, [sample.image for sample in samples])


class Stage(NamedTuple):
    """Optimizer steps on a corpus with such rates, and values for [`UnifiedSFTConfig`]."""

    steps: int
    rates: SecondRates
    settings: dict[str, Any]


STAGES = (
    Stage(1000, FAULTLESS, {"noise_draws": 1}),
    Stage(120, SecondRates(), {"learning_rate": 1e-3}),
    Stage(150, SecondRates(caption=0.4), {"learning_rate": 1e-3, "noise_draws": 1}),
)
"""First a model learns to see and to compare, then mistakes, then to read prompts back."""


def build_seeing_base(
    base: BagelForUnifiedGeneration,
    output_dir: str | Path,
    seed: int = 0,
    stages: Sequence[Stage] = STAGES,
    num_own: int = 3150,
    **overrides: Any,
) -> BagelForUnifiedGeneration:
    """
    Make a base model that also sees from one that does not, and save it, with its tokenizer, in `output_dir`.

    Args:
        base: the model to go on from.
        seed: of its images, the corpus and its mistakes, the new weights and the order.
        stages: of the training.
        num_own: images of the base's own that the corpus looks at again.
        overrides: other values for [`UnifiedSFTConfig`].
    """
    own = own_images(base, num_own, seed)
    model, tokenizer = with_eyes(base, seed), shapeworld_tokenizer(seeing=True)
    model.freeze_understanding(False)
    for number, stage in enumerate(stages):
        settings = {"warmup_steps": 50, **stage.settings, **overrides}
        args = UnifiedSFTConfig(**sft_settings(output_dir, stage.steps, seed, **settings))
        rows = args.max_steps * args.per_device_train_batch_size
        corpus = second_corpus(rows, own, seed + 100 * number, stage.rates)
        UnifiedSFTTrainer(model=model, args=args, train_dataset=corpus, processing_class=tokenizer).train()
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return model
