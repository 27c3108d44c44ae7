"""A random tiny BAGEL in memory, its tokenizer, and trainers over it: what the trainer's tests are built from."""

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, SiglipVisionConfig, TrainerCallback
from transformers.utils import logging

from trl_unigrpo.models.bagel import BagelConfig, BagelForUnifiedGeneration
from trl_unigrpo.models.bagel.autoencoder import LatentCodec, build_vae
from trl_unigrpo.sampling import generation
from trl_unigrpo.trainers.unigrpo_config import UniGRPOConfig
from trl_unigrpo.trainers.unigrpo_trainer import UniGRPOTrainer
from trl_unigrpo.trajectory import Steps, has_steps


logging.disable_progress_bar()

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|unknown|>")
WORDS = ("<think>", "</think>", "think", "first", "a", "red", "green", "blue", "cat", "dog", "sits", "runs")
WORDS += ("on", "the", "mat", "and", "under", "big", "small", "tree")
IMAGE_SIZE = 8  # 2 x 2 image tokens of 4 numbers
PROMPTS = ["a red cat", "a big green dog runs", "the blue cat sits on the mat", "a small tree"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<|unknown|>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<|unknown|>",
        additional_special_tokens=["<|im_start|>", "<|vision_start|>", "<|vision_end|>"],
        clean_up_tokenization_spaces=False,
    )


def tiny_bagel(seed: int = 0, **llm_config) -> BagelForUnifiedGeneration:
    """Weights large enough for every output to depend on every input; `llm_config` changes sizes of the decoder."""
    vae = {
        "_class_name": "PatchAutoencoderKL",
        "latent_channels": 4,
        "block_out_channels": (8,),
        "strides": (4,),
    }
    config = BagelConfig(
        llm_config={
            "vocab_size": len(SPECIAL) + len(WORDS) + 3,  # a few rows without a word
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            **llm_config,
        },
        vae_config=vae,
        latent_patch_size=1,
        max_latent_size=4,
        think_system_prompt="think first",
        im_start_token_id=1,
        im_end_token_id=2,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    torch.manual_seed(seed)
    model = BagelForUnifiedGeneration(config, LatentCodec(build_vae(vae), vae, patch_size=1))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.6 / parameter.shape[1] ** 0.5 if "embed" not in name else 0.6)
        elif "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def bagel_with_tower() -> BagelForUnifiedGeneration:
    """The tiny model with an understanding tower."""
    blind = tiny_bagel()
    blind.config.vit_config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    blind.config.vit_max_num_patch_per_side = 4
    model = BagelForUnifiedGeneration(blind.config, blind.codec)
    model.load_state_dict(blind.state_dict(), strict=False)
    return model


def redness(prompts, completions, images, **columns):
    return [float(np.asarray(image, dtype=np.float32)[..., 0].mean() / 255) for image in images]


def prompts_dataset(prompts=PROMPTS, copies: int = 2, **columns) -> Dataset:
    return Dataset.from_dict({"prompt": list(prompts) * copies, **{k: v * copies for k, v in columns.items()}})


def tiny_config(output_dir, **changes) -> UniGRPOConfig:
    """Groups of 4, two of them per generation batch; no gallery, which would take half of the time."""
    defaults = {
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": 2,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-3,
        "image_learning_rate": 3e-3,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 5,
        "image_size": IMAGE_SIZE,
        "num_inference_steps": 6,
        "eval_num_inference_steps": 4,
        "gradient_checkpointing": False,
        "gallery_steps": 0,
    }
    return UniGRPOConfig(output_dir=str(output_dir), **{**defaults, **changes})


def build_trainer(
    output_dir,
    model=None,
    reward_funcs=redness,
    train_dataset=None,
    trainer_class=UniGRPOTrainer,
    processing_class=None,
    **arguments,
):
    """A trainer; arguments of `UniGRPOTrainer` are passed on, all others go to the configuration."""
    own = ("eval_dataset", "peft_config", "callbacks", "optimizers", "tools", "rollout_func", "environment_factory")
    own += ("image_features",)
    passed = {name: arguments.pop(name) for name in own if name in arguments}
    return trainer_class(
        model=tiny_bagel() if model is None else model,
        reward_funcs=reward_funcs,
        args=tiny_config(output_dir, **arguments),
        train_dataset=prompts_dataset() if train_dataset is None else train_dataset,
        processing_class=tiny_tokenizer() if processing_class is None else processing_class,
        **passed,
    )


class FixedTexts(UniGRPOTrainer):
    """Thinkings that depend on a sample's place in the generation batch alone, however that is cut and spread."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        texts = []
        for row in self.rows(len(prompt_ids)):
            random = np.random.default_rng((self.generation, row))
            words = random.integers(len(SPECIAL), len(SPECIAL) + len(WORDS), random.integers(1, 6)).tolist()
            texts.append([*words, 2] if len(words) < 5 else words)
        return texts, None


def weights(model) -> dict[str, torch.Tensor]:
    """A copy of a model's parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the parameters that changed by as much as a bit."""
    return {name for name in before if not torch.equal(before[name], after[name])}


def spy_paint(monkeypatch, change=lambda images: images) -> list:
    """The calls of `paint_chunks`: trajectories, plan, and the images, changed, all in one chunk."""
    calls, paint_chunks = [], generation.paint_chunks

    def spied(model, trajectories, plan, generators):
        painted = {}
        for places, images in paint_chunks(model, trajectories, plan, generators):
            painted.update(zip(places, images, strict=True))
        images = change([painted[place] for place in range(len(trajectories))])
        calls.append((trajectories, plan, images))
        yield list(range(len(trajectories))), images

    monkeypatch.setattr(generation, "paint_chunks", spied)
    return calls


def images_of(batches) -> list:
    """The images of all trajectories of some micro-batches."""
    return [image for batch in batches for t in batch["trajectories"] for _, image in t.painted()]


def beside(trainer, trajectories) -> dict:
    """The table of a micro-batch's steps, and the old and the reference policy's velocities where they are kept."""
    steps = Steps.of(trajectories)
    kept = {policy: trainer._kept.at(policy, steps) for policy in ("old", "reference")}
    return {"steps": steps, **{policy: velocity for policy, velocity in kept.items() if velocity is not None}}


class Recorder(TrainerCallback):
    """The optimizer's view: weights and gradients before each step, and the batches that they came from."""

    def __init__(self):
        self.weights, self.gradients, self.batches, self.rates = [], [], [], []

    def attach(self, trainer):
        trainer.add_callback(self)
        compute_loss = trainer._compute_loss

        def recorded(model, inputs):
            if "advantages" in inputs and model.training:
                self.batches.append(dict(inputs))
                if has_steps(inputs.get("trajectories", [])):
                    self.batches[-1].update(beside(trainer, inputs["trajectories"]))
            return compute_loss(model, inputs)

        trainer._compute_loss = recorded
        return self

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.weights.append(weights(model))
        self.gradients.append(
            {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        )
        self.rates.append({group.get("name"): group["lr"] for group in optimizer.param_groups})


class OneByOne(BagelForUnifiedGeneration):
    packs_velocities = False


def broken(cls):
    model = tiny_bagel()
    model.__class__ = cls
    return model
