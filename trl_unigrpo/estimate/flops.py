"""FLOPs of one generation and its passes in closed form; a multiply-add is two.

Attention is counted over visible pairs alone. The floor computes each prompt once, each decoded token once, each
thinking's context once, N velocities an image, one reference pass and the updates. Beside it stands what a run
computes too: adapters, the text's old log-probs, logits again in the backward pass.
"""

from typing import Any, NamedTuple

from ..models.bagel.layers import BagelTimeEmbedder, head_size
from .sight import look_flops
from .sizes import linear_bytes, linear_parameters, lora_parameters
from .vae import vae_decode
from .workload import Workload


class Forward(NamedTuple):
    """
    FLOPs of forward passes.

    Attributes:
        linear: the experts' linear layers.
        attention: scores and weighted sums.
        entry, exit: projections before the first layer and after the last.
        adapters: the low-rank products beside the linear layers.
    """

    linear: int = 0
    attention: int = 0
    entry: int = 0
    exit: int = 0
    adapters: int = 0

    def plus(self, other: "Forward", times: int = 1) -> "Forward":
        return Forward(*(own + times * more for own, more in zip(self, other, strict=True)))

    @property
    def total(self) -> int:
        """All but the adapters."""
        return self.linear + self.attention + self.entry + self.exit


def text_forward(load: Workload, length: int, start: int = 0) -> Forward:
    """Count tokens start .. start + length - 1 of a row, each over all before it and itself; without logits."""
    llm = load.config.llm_config
    pairs = length * start + length * (length + 1) // 2
    rank = load.lora_ranks[0] if load.lora_ranks else 0
    return Forward(
        linear=2 * linear_parameters(llm) * length,
        attention=_pair(llm) * pairs,
        adapters=2 * lora_parameters(llm, rank) * length,
    )


def image_forward(load: Workload, number: int = 0) -> Forward:
    """Count one velocity of the image of a round: its two markers and N latents over the context and themselves."""
    clean = latents_forward(load, load.seen(number))
    return clean._replace(exit=2 * load.latents * load.config.latent_channels * load.config.llm_config.hidden_size)


def latents_forward(load: Workload, start: int) -> Forward:
    """Count two markers and N latents behind so many tokens, each over all before it and the whole block."""
    llm, width, latents = load.config.llm_config, load.config.llm_config.hidden_size, load.latents
    tokens, (text, image) = latents + 2, load.lora_ranks or (0, 0)
    return Forward(
        linear=2 * linear_parameters(llm) * tokens,
        attention=_pair(llm) * tokens * (start + tokens),
        entry=2 * (latents * load.config.latent_channels + BagelTimeEmbedder.frequencies + width) * width,
        adapters=2 * (2 * lora_parameters(llm, text) + latents * lora_parameters(llm, image)),
    )


def seen_forward(load: Workload, start: int) -> Forward:
    """Count a finished image that is shown behind so many tokens, in all its forms."""
    found, *others = load.shown
    seen = latents_forward(load, start)
    for tokens in others:  # of the understanding tower, for the text expert
        block = text_forward(load, tokens)
        seen = seen.plus(block._replace(attention=_pair(load.config.llm_config) * tokens * (start + found + tokens)))
        found += tokens
    return seen


def look_forward(load: Workload, number: int) -> Forward:
    """Count what a later round begins with: the image that it is shown, and what is said to it."""
    start = load.seen_before(number)
    return seen_forward(load, start).plus(text_forward(load, load.look_length, start + sum(load.shown)))


def read_back_flops(load: Workload) -> int:
    """
    Count reading the prompts of a generation, their start marker included, back from its images
    ([`~trl_unigrpo.rewards.ReadBackReward`]). Beside the floor, as is any reward.
    """
    read = seen_forward(load, 0).plus(text_forward(load, load.prompt_length, sum(load.shown)))
    look = look_flops(load.config, load.size, load.with_tower)
    return load.trajectories * (look + read.total + (load.prompt_length - 1) * logits_forward(load))


def context_forward(load: Workload, number: int) -> Forward:
    """Count all that the image of a round sees before it."""
    if not number:
        return text_forward(load, load.context)
    before = context_forward(load, number - 1) if load.seen_before(number) else Forward()
    return before.plus(look_forward(load, number)).plus(reflection_forward(load, number, load.reflection_length))


def reflection_forward(load: Workload, number: int, length: int) -> Forward:
    """Count so many tokens of what a later round answers."""
    return text_forward(load, length, load.seen(number) - load.reflection_length)


def logits_forward(load: Workload) -> int:
    """Count the logits of one token."""
    return 2 * load.config.llm_config.hidden_size * load.config.llm_config.vocab_size


def _pair(llm: Any) -> int:
    """Count one query and one key, in every head of every layer: a score and a weighted sum."""
    return 4 * llm.num_attention_heads * head_size(llm) * llm.num_hidden_layers


def packed_forward(load: Workload) -> Forward:
    """Count a trajectory's rounds, each with K noisy copies of its image, in one pass, without logits."""
    found = texts_read(load)
    for number in range(load.num_rounds):
        found = found.plus(image_forward(load, number), load.sde_window_size)
    return found


def texts_read(load: Workload) -> Forward:
    """Count the contexts of all rounds of a trajectory, without logits: in one row, or one for each."""
    if load.round_context == "full":
        return context_forward(load, load.num_rounds - 1)
    found = Forward()
    for number in range(load.num_rounds):
        found = found.plus(context_forward(load, number))
    return found


def update_flops(load: Workload, with_images: bool = True) -> tuple[int, int]:
    """
    Count the FLOPs of one trajectory's forward and backward pass, and of the adapters in it; of its texts alone where
    its images are left out.

    A matrix product costs itself again for the gradient of its input, and again for that of its weight if it is
    trained; attention's backward pass costs 2.5 of its forward. Checkpointing computes the layers' forward again.
    """
    once = packed_forward(load) if with_images else texts_read(load)
    trained, again = load.lora_ranks is None, int(load.gradient_checkpointing)
    base = (
        once.linear * (2 + trained + again)
        + once.attention * 7 // 2
        + once.attention * again
        + once.entry * (1 + trained)
        + once.exit * (2 + trained)
        + load.texts * logits_forward(load) * (2 + trained)
    )
    return base, once.adapters * (3 + again)


def mean_update_flops(load: Workload) -> tuple[int, int]:
    """Count the same on average over trajectories, of which a share has no images in the update."""
    both = zip(update_flops(load), update_flops(load, with_images=False), strict=True)
    base, adapters = (round(whole - load.dead_share * (whole - text)) for whole, text in both)
    return base, adapters


def floor_flops(load: Workload) -> dict[str, int]:
    """Count the FLOPs of each part of a generation that no implementation with these settings avoids."""
    count, steps, rounds = load.trajectories, load.completion_length - 1, range(load.num_rounds)
    pass_of_live = round(count * (1 - load.dead_share) * packed_forward(load).total)
    decoded = vae_decode(load.config, load.size)[0]
    thinking = text_forward(load, steps, load.prompt_length).total + steps * logits_forward(load)
    parts = {
        "prefill": load.num_prompts * (text_forward(load, load.prompt_length).total + logits_forward(load)),
        "decode": load.thinkings * thinking,
        "contexts": load.thinkings * sum(context_forward(load, number).total for number in rounds),
        "denoising": count * load.num_inference_steps * sum(image_forward(load, number).total for number in rounds),
        "VAE decode": count * load.num_rounds * decoded,
        "reference pass": pass_of_live * load.reference,
        "old policy's pass": pass_of_live * load.image_old_policy,
        "update": load.num_iterations * count * mean_update_flops(load)[0],
    }
    if load.scout_generations is not None:
        parts["scouts"] = load.pool * (load.scout_num_inference_steps * image_forward(load).total + decoded)
        if not load.repaints:
            parts["denoising"] = parts["VAE decode"] = 0
    if later := rounds[1:]:
        steps = load.reflection_length - 1
        look = look_flops(load.config, load.size, load.with_tower)
        parts["looks"] = count * sum(look + look_forward(load, n).total + logits_forward(load) for n in later)
        decoded = sum(reflection_forward(load, number, steps).total for number in later)
        parts["decode"] += count * (decoded + len(later) * steps * logits_forward(load))
    return parts


def overhead_flops(load: Workload) -> dict[str, int]:
    """Count the FLOPs beyond the floor that a run of these settings computes."""
    count, rounds, live = load.trajectories, range(load.num_rounds), 1 - load.dead_share
    text = texts_read(load)
    thinking = load.num_prompts * text_forward(load, load.prompt_length).adapters
    thinking += load.thinkings * text_forward(load, load.completion_length - 1, load.prompt_length).adapters
    for number in rounds[1:]:
        later = look_forward(load, number).plus(reflection_forward(load, number, load.reflection_length - 1))
        thinking += count * later.adapters
    old = round(count * live * packed_forward(load).adapters) * load.image_old_policy
    again = load.num_iterations > 1  # the first pass spans all micro-batches of a step
    exact = load.scout_generations is None or load.repaints
    denoising = load.num_inference_steps * count * exact * sum(image_forward(load, n).adapters for n in rounds)
    if load.scout_generations is not None:
        denoising += load.scout_num_inference_steps * load.pool * image_forward(load).adapters
    contexts = sum(context_forward(load, number).adapters for number in rounds)
    chosen = count // load.images_per_thinking * load.repaints  # contexts of scouts that are painted again
    return {
        "adapters": thinking
        + (load.thinkings + chosen) * contexts
        + load.pool * text.adapters * again
        + denoising
        + old
        + load.num_iterations * count * mean_update_flops(load)[1],
        "old log-probs": again * load.pool * (text.total + load.texts * logits_forward(load)),
        "contexts of scouts again": chosen * context_forward(load, 0).total,
        "logits again": load.num_iterations * count * load.texts * logits_forward(load),
        "earlier rounds again": count * sum(context_forward(load, n - 1).total for n in rounds if load.seen_before(n)),
    }


def decode_read_bytes(load: Workload) -> int:
    """Count the bytes of weights that sampling the thinkings reads at least: text expert and head, once per token."""
    head = load.weight_bytes * load.config.llm_config.hidden_size * load.config.llm_config.vocab_size
    tokens = load.texts - load.num_rounds
    return tokens * (linear_bytes(load.config, load.quantization, load.weight_bytes) + head)


def floor_seconds(load: Workload, flops_per_second: float, bytes_per_second: float) -> dict[str, float]:
    """
    Give the least seconds of each part of the floor.

    Args:
        flops_per_second: matrix products at the activations' precision.
        bytes_per_second: memory bandwidth, which bounds the decoding.
    """
    seconds = {name: flops / flops_per_second for name, flops in floor_flops(load).items()}
    seconds["decode"] = max(seconds["decode"], decode_read_bytes(load) / bytes_per_second)
    return seconds
