"""One real step of a workload with random weights: what the closed forms leave out shows here."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerFast, PrinterCallback

from ..estimate.hardware import synchronize
from ..estimate.random_model import random_bagel
from ..estimate.sizes import parameter_counts
from ..estimate.workload import Workload
from ..image_sizes import plain_size
from ..models.bagel.configuration import BagelConfig
from .unigrpo_config import UniGRPOConfig
from .unigrpo_trainer import UniGRPOTrainer


SPECIAL = {"<|im_start|>": 0, "<|im_end|>": 1, "<|vision_start|>": 2, "<|vision_end|>": 3, "<|pad|>": 4, "<|unk|>": 5}
MARKERS = 3  # around a prompt: its chunk's two, and the one that opens the thinking
CPU_PARAMETERS = 50_000_000


@dataclass(frozen=True)
class DryRun:
    """Seconds of one generation with its passes, its thinkings' lengths, and the most memory (None on a CPU)."""

    seconds: float
    lengths: list[int]
    peak_bytes: int | None


def ragged_lengths(load: Workload) -> list[int]:
    """
    Give each thinking a length: evenly spaced from half of `completion_length` to all of it, so that
    their mean is known, in a random order that is always the same.
    """
    longest = load.completion_length
    lengths = torch.linspace((longest + 1) // 2, longest, load.thinkings).round().int()
    return lengths[torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))].tolist()


class FixedLengths(LogitsProcessor):
    """
    Gives the rows of one `generate` lengths: the end is forced at a row's length, and can't be sampled before.

    Args:
        lengths: (B,) new tokens of each row, the end included.
        prompt_length: tokens that stand before them.
        end: id of the token that ends a row.
    """

    def __init__(self, lengths: Sequence[int], prompt_length: int, end: int):
        self.lengths, self.prompt_length, self.end = torch.tensor(lengths), prompt_length, end

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.lengths = self.lengths.to(scores.device)
        is_end = torch.arange(scores.shape[1], device=scores.device) == self.end
        ends_now = self.lengths == input_ids.shape[1] - self.prompt_length + 1
        return scores.masked_fill(is_end != ends_now[:, None], float("-inf"))


def word_tokenizer(config: BagelConfig) -> PreTrainedTokenizerFast:
    """A tokenizer with a word for every row of the vocabulary; its special tokens become the configuration's."""
    words = {f"word{i}": i for i in range(len(SPECIAL), config.llm_config.vocab_size)}
    tokenizer = Tokenizer(WordLevel({**SPECIAL, **words}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    for field in ("im_start", "im_end", "vision_start", "vision_end"):
        setattr(config, f"{field}_token_id", SPECIAL[f"<|{field}|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|im_start|>", "<|vision_start|>", "<|vision_end|>"],
    )


def alternating_reward(prompts: list[Any], completions: list[Any], images: list[Any], **columns: Any) -> list[float]:
    return [float(i % 2) for i in range(len(prompts))]


def dry_config(load: Workload, device: torch.device, folder: str) -> UniGRPOConfig:
    """The settings of a workload's one generation."""
    return UniGRPOConfig(
        output_dir=folder,
        max_steps=load.num_iterations,
        bf16=load.half,
        use_cpu=device.type == "cpu",
        image_size=plain_size(load.size),
        num_inference_steps=load.num_inference_steps,
        sde_window_size=load.sde_window_size,
        sde_window_range=[0, min(max(5, load.sde_window_size), load.num_inference_steps - 1)],
        image_batch_size=load.image_batch_size,
        num_generations=load.num_generations,
        num_iterations=load.num_iterations,
        per_device_train_batch_size=load.scored_at_once,
        max_completion_length=load.completion_length,
        system_prompt="",
        flow_regularizer="velocity_mse" if load.reference else "none",
        ema_decay=0.9 if load.ema else None,
        image_old_policy_decay=0.5 if load.image_old_policy else None,
        image_objective="nft" if load.lines or load.image_old_policy else "flow_grpo",
        matching_samples=load.sde_window_size,
        images_per_thinking=load.images_per_thinking,
        scout_generations=load.scout_generations,
        scout_num_inference_steps=min(load.scout_num_inference_steps, load.num_inference_steps),
        gradient_checkpointing=load.gradient_checkpointing,
        trust_checks="off",  # random weights prove nothing
        alarms="off",
        gallery_steps=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def random_trainer(
    load: Workload, device: torch.device, folder: str, lengths: Sequence[int] | None = None
) -> UniGRPOTrainer:
    """
    The trainer of a workload of one prompt, over random weights made on the device; `train()` runs one generation
    and its passes.

    Args:
        lengths: of the thinkings, at most `completion_length` each; None for all of it.

    Raises:
        ValueError: for more than one prompt or round, or a prompt too short for its markers.
    """
    if load.num_prompts != 1 or load.prompt_length <= MARKERS or load.num_rounds != 1:
        raise ValueError(
            f"num_prompts={load.num_prompts}, prompt_length={load.prompt_length}, num_rounds={load.num_rounds}: a dry "
            f"run takes one prompt of more than {MARKERS} tokens, and one round."
        )
    tokenizer = word_tokenizer(load.config)
    torch.manual_seed(0)
    frozen = torch.bfloat16 if load.weight_bytes == 2 else torch.float32
    model = random_bagel(load.config, device, frozen, load.quantization)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    args = dry_config(load, device, folder)
    prompt = " ".join([f"word{len(SPECIAL)}"] * (load.prompt_length - MARKERS))
    text, image = load.lora_ranks or (0, 0)
    adapters = None
    if load.lora_ranks is not None:
        adapters = LoraConfig(r=max(text, image), rank_pattern={r".*_moe_gen.*": image, r".*_proj$": text})
    trainer = UniGRPOTrainer(
        model=model,
        reward_funcs=alternating_reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [prompt]}),
        processing_class=tokenizer,
        peft_config=adapters,
    )
    trainer.remove_callback(PrinterCallback)
    lengths = [load.completion_length] * load.thinkings if lengths is None else lengths
    fixed = FixedLengths(lengths, load.prompt_length, tokenizer.eos_token_id)
    trainer.unified.generate = partial(trainer.unified.generate, logits_processor=[fixed])
    return trainer


def dry_run(load: Workload, device: torch.device) -> DryRun:
    """
    Run one generation and its passes, with thinkings of different lengths.

    Raises:
        ValueError: on a CPU, for a model that is not tiny.
    """
    parameters = sum(parameter_counts(load.config).values())
    if device.type == "cpu" and parameters > CPU_PARAMETERS:
        raise ValueError(
            f"A dry run of {parameters / 1e9:.1f} G parameters needs a GPU; without one, models of at most "
            f"{CPU_PARAMETERS / 1e6:.0f} M parameters run. Leave out --dry-run, or pass a smaller --model."
        )
    with tempfile.TemporaryDirectory() as folder:
        lengths = ragged_lengths(load)
        trainer = random_trainer(load, device, folder, lengths)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        synchronize(device)
        started = time.perf_counter()
        trainer.train()
        synchronize(device)
        seconds = time.perf_counter() - started
    return DryRun(seconds, lengths, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None)
