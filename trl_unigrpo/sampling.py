"""Think and paint with a unified model, outside of training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .flow import flow_timesteps
from .flow.guidance import Guidance
from .flow.sampler import RolloutPlan
from .models.contract import Conditioning
from .models.prompts import as_messages, system_ids
from .models.registry import unified_model
from .models.tokenizer import never_sampled, prepare_tokenizer
from .seeding import EVAL, row_generator


@dataclass
class Sample:
    """One prompt, what the model thought about it, and the image that it painted."""

    prompt: Any
    thinking: str
    image: Image.Image
    latents: torch.Tensor


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    thinking: bool = True,
    do_sample: bool = True,
    temperature: float = 1.0,
    max_completion_length: int = 512,
    num_inference_steps: int = 50,
    timestep_shift: float = 3.0,
    image_size: int = 1024,
    guidance: Guidance | None = None,
    system_prompt: str = "auto",
    batch_size: int = 8,
    seed: int = 0,
    first_row: int = 0,
) -> list[Sample]:
    """
    Sample one thinking and one image per prompt; the images by the ODE.

    Args:
        model: a unified model, adapted or not.
        prompts: strings or conversations.
        tokenizer: loaded from the model's folder if not given.
        thinking: False paints from the prompt alone.
        do_sample, temperature, max_completion_length: how the thinking is sampled; do_sample=False is greedy.
        num_inference_steps, timestep_shift, image_size: how the image is sampled; image_size in pixels.
        guidance: classifier-free guidance, as in `Guidance(guidance_scale=4.0)`; None for none, as in training.
        system_prompt: "auto" for the model's own, "" for none.
        batch_size: prompts at once.
        seed: of the thinkings and of each image's noise. Image noise depends on the prompt's place in the list alone.
        first_row: place of the first prompt in a longer list. A list cut into whole batches gives the same samples
            as the list at once.

    Raises:
        ValueError: for guidance by a thinking that there is not.
    """
    if guidance is not None and "image" in guidance.branches and not thinking:
        raise ValueError(
            f"image_guidance_scale={guidance.image_guidance_scale} pushes the image towards its thinking, but "
            "thinking=False leaves none. Set it to 1 and raise guidance_scale, or think."
        )
    base = unified_model(model)
    tokenizer = tokenizer or base.tokenizer or AutoTokenizer.from_pretrained(model.config.name_or_path)
    tokenizer = prepare_tokenizer(tokenizer, base.chat_template)
    system = base.default_system_prompt if system_prompt == "auto" else system_prompt
    size = (image_size, image_size)
    plan = RolloutPlan(flow_timesteps(num_inference_steps, timestep_shift), size, guidance=guidance)
    was_training = model.training
    model.eval()
    samples = []
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        messages = [as_messages(prompt, system if thinking else None) for prompt in chunk]
        conditioning = think(
            model,
            tokenizer,
            messages,
            thinking=thinking,
            do_sample=do_sample,
            temperature=temperature,
            max_completion_length=max_completion_length,
            seed=seed + first_row + start,
        )
        generators = [
            row_generator(seed, EVAL, 0, row) for row in range(first_row + start, first_row + start + len(chunk))
        ]
        conditioning.system_ids = system_ids(tokenizer, messages) if guidance is not None else None
        records = base.rollout(conditioning, plan, generators)
        latents = torch.stack([record.final_latents for record in records])
        images = base.decode_latents(latents, size)
        texts = tokenizer.batch_decode(conditioning.completion_ids, skip_special_tokens=True)
        samples += [Sample(*row) for row in zip(chunk, texts, images, latents.cpu(), strict=True)]
    model.train(was_training)
    return samples


@torch.no_grad()
def think(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[list[dict[str, Any]]],
    *,
    thinking: bool = True,
    do_sample: bool = True,
    temperature: float = 1.0,
    max_completion_length: int = 512,
    seed: int = 0,
) -> Conditioning:
    """
    Sample one thinking for each of B conversations: what their images are to be painted from.

    Args:
        model: a unified model, adapted or not, in the mode that it is to be sampled in.
        tokenizer: as [`prepare_tokenizer`] returns it.
        messages: conversations, with their system prompts.
        thinking: False leaves the thinkings empty.
        do_sample, temperature, max_completion_length: how they are sampled; do_sample=False is greedy.
        seed: of the B thinkings together. The global random state stays as it is.
    """
    base = unified_model(model)
    encoded = tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    ).to(base.device)
    prompt_ids = [
        ids[mask.bool()].tolist() for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
    ]
    if not thinking:
        return Conditioning(prompt_ids, [[] for _ in prompt_ids], prompts=messages)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            do_sample=do_sample,
            temperature=temperature if do_sample else None,
            top_k=0 if do_sample else None,
            top_p=1.0 if do_sample else None,
            max_new_tokens=max_completion_length,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=never_sampled(base, tokenizer, [tokenizer.eos_token_id]),
            use_cache=True,
        )
    new = out[:, encoded["input_ids"].shape[1] :].tolist()
    return Conditioning(prompt_ids, [trim(ids, tokenizer.eos_token_id) for ids in new], prompts=messages)


def trim(ids: list[int], end: int) -> list[int]:
    """Tokens up to the first `end`, which stays."""
    return ids[: ids.index(end) + 1] if end in ids else ids
