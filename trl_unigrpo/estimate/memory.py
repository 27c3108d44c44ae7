"""Bytes that a generation and its passes hold on one device: by part, and at the peak of each phase.

What a forward pass saves for its backward pass follows the layers as they are written; kernels are those of a GPU
(flash attention, grouped heads not repeated). Left out: the CUDA context and what the allocator can't reuse.
"""

from dataclasses import dataclass

from ..models.bagel.layers import head_size
from .sizes import (
    key_value_heads,
    linear_bytes,
    linear_parameters,
    lora_parameters,
    parameter_counts,
)
from .vae import vae_decode, vae_parameters
from .workload import Workload


# TRL's language head works on tiles of at most so many tokens and words.
TILE_TOKENS, TILE_WORDS = 4096, 32768
IN_HALF = "trained weights in bfloat16"  # autocast keeps them until its context ends
GATHERED, ROLLOUT = "gathered weights", "weights gathered for the rollout"
RESIDENT = ("weights", "VAE", "reference copy", "averaged weights", "adapters", "optimizer state", "DDP's buckets")
# Of these each process of FSDP2 holds its share.
SHARDED = ("weights", "reference copy", "averaged weights", "adapters", "optimizer state")
PHASES = {
    "thinking": (IN_HALF, ROLLOUT, "thinking's cache", "sampling's logits"),
    "denoising": (IN_HALF, ROLLOUT, "contexts' cache", "denoising's workspace", "rollout records"),
    "VAE decode": (ROLLOUT, "VAE decode", "rollout records"),
    "reference pass": (IN_HALF, GATHERED, "reference's workspace", "records of a micro-batch"),
    "update": (
        *(IN_HALF, GATHERED, "gradients", "gradients being reduced", "saved activations", "update's workspace"),
        *("logits' tile", "records of a micro-batch"),
    ),
}
"""Parts that each phase holds beside those that are held all the time."""


@dataclass(frozen=True)
class Memory:
    """
    Attributes:
        parts: bytes by part.
        peaks: bytes at the peak of each phase.
    """

    parts: dict[str, int]
    peaks: dict[str, int]

    @property
    def peak(self) -> int:
        return max(self.peaks.values())


def weight_memory(load: Workload) -> int:
    """Count the bytes of the model without adapters and VAE."""
    counts = parameter_counts(load.config)
    linear = linear_parameters(load.config.llm_config)
    experts = 2 * linear_bytes(load.config, load.quantization, load.weight_bytes)
    biases = 2 * (linear_bytes(load.config, None, 1) - linear)
    plain = sum(counts.values()) - 2 * linear - biases
    if not load.with_tower:
        plain -= counts["understanding tower"]
    return experts + plain * load.weight_bytes


def trained_parameter_counts(load: Workload) -> tuple[int, int]:
    """Count the trained weights of the text and of the image expert."""
    if load.lora_ranks is not None:
        text, image = (lora_parameters(load.config.llm_config, rank) for rank in load.lora_ranks)
        return text, image
    counts = parameter_counts(load.config)
    table = load.config.max_latent_size**2 * load.config.llm_config.hidden_size
    return counts["text expert"] + counts["embeddings"], counts["image expert"] + counts["image ends"] - table


def saved_per_token(load: Workload, rank: int) -> int:
    """Count the bytes that one layer saves per token: for norms, q/k norms, MLP, linear layers and attention."""
    llm, a = load.config.llm_config, load.activation_bytes
    width, inner, heads, groups = llm.hidden_size, llm.intermediate_size, llm.num_attention_heads, key_value_heads(llm)
    query, key = heads * head_size(llm), groups * head_size(llm)
    norms = 4 * (2 * width + query + key) + 4 * (2 + heads + groups)  # in float32, with their scales
    gates = 3 * inner * a
    attention = 2 * (query + key) * a + 4 * heads
    full = load.lora_ranks is None
    if not full and rank == 0:
        return norms + gates + attention
    # Autocast casts float32 for each linear layer by itself; else q, k and v share one input, as gate and up do.
    copies = (5 if load.half and full else 2) * width + query + inner
    learned = 2 * width + query + key if full else 7 * rank
    return norms + gates + attention + (copies + learned) * a


def saved_by_layer(load: Workload) -> int:
    """Count the bytes that one layer saves in the packed forward of one micro-batch."""
    llm, copies = load.config.llm_config, load.sde_window_size
    images, (texts, shown) = load.num_rounds * copies, load.clean
    text_rank, image_rank = load.lora_ranks or (0, 0)
    # Each image keeps the context's keys and values beside its own.
    seen = sum(load.seen(number) for number in range(load.num_rounds))
    contexts = 2 * copies * seen * key_value_heads(llm) * head_size(llm) * load.activation_bytes
    text = (texts + 2 * images) * saved_per_token(load, text_rank)
    latents = (shown + images * load.latents) * saved_per_token(load, image_rank)
    return load.scored_at_once * (text + latents + contexts)


def workspace(load: Workload, tokens: int) -> int:
    """
    Count the bytes that one layer works in, at its widest point (the MLP), for so many tokens: the activated gate,
    the other half, their product, with adapters one more, and the states that the layer still holds.
    """
    llm, a = load.config.llm_config, load.activation_bytes
    inner = 3 if load.lora_ranks is None else 4
    layer = a * tokens * (inner * llm.intermediate_size + 7 * llm.hidden_size)
    dequantised = a * llm.intermediate_size * llm.hidden_size if load.quantization else 0
    return layer + dequantised


def backward_workspace(load: Workload, tokens: int) -> int:
    """Count the bytes beside those saved: the gradients of the MLP's widest states and of the layer's own."""
    llm, a = load.config.llm_config, load.activation_bytes
    dequantised = a * llm.intermediate_size * llm.hidden_size if load.quantization else 0
    return a * tokens * (3 * llm.intermediate_size + 4 * llm.hidden_size) + dequantised


def estimate_memory(load: Workload) -> Memory:
    """Add up the memory by part, and the peak of each phase."""
    llm, a, count = load.config.llm_config, load.activation_bytes, load.trajectories
    width, layers = llm.hidden_size, llm.num_hidden_layers
    trained_of_image, weights = trained_parameter_counts(load)[1], weight_memory(load)
    trained = sum(trained_parameter_counts(load))
    cached = 2 * layers * key_value_heads(llm) * head_size(llm) * a  # per token
    copies, clean = load.num_rounds * load.sde_window_size, sum(load.clean)
    packed = clean + copies * (load.latents + 2)
    longest = max(load.context, load.seen(load.num_rounds - 1))
    numbers = 4 * load.latents * load.config.latent_channels  # one latent state in float32
    noisy = not load.lines  # a noisy step has the next state and the sampler's velocity, a point its line's
    rollout_states, update_states = load.num_rounds + (2 + noisy) * copies, (3 + noisy + load.reference) * copies
    tile = min(load.scored_at_once * load.texts, TILE_TOKENS) * min(llm.vocab_size, TILE_WORDS) * a
    layer = saved_by_layer(load)
    inputs = load.scored_at_once * packed * width * a * layers
    full = load.lora_ranks is None
    parts = {
        "weights": weights,
        "VAE": 4 * vae_parameters(load.config),
        "reference copy": 4 * trained if full and load.reference else 0,
        "averaged weights": 4 * (load.ema * trained + load.image_old_policy * trained_of_image),
        "adapters": 0 if full else 4 * trained,
        "optimizer state": 8 * trained,
        "gradients": 4 * trained,
        IN_HALF: 2 * trained if load.half else 0,
        "saved activations": inputs + layer if load.gradient_checkpointing else layers * layer,
        "update's workspace": backward_workspace(load, load.scored_at_once * packed),
        "logits' tile": tile + 4 * load.scored_at_once * load.texts * width,
        "sampling's logits": load.thinkings * 4 * 4 * llm.vocab_size,
        "thinking's cache": load.thinkings * longest * cached,
        "contexts' cache": -(-load.denoised_at_once // load.images_per_thinking) * longest * cached,
        "reference's workspace": workspace(load, load.scored_at_once * packed),
        "denoising's workspace": workspace(load, load.denoised_at_once * (load.latents + 2)),
        "rollout records": count * rollout_states * numbers,
        "records of a micro-batch": load.scored_at_once * update_states * numbers,
        "VAE decode": 3 * 4 * load.denoised_at_once * vae_decode(load.config, load.size)[1],
    }
    parts |= spread_parts(load, parts)
    resident = sum(parts.get(name, 0) for name in RESIDENT)
    return Memory(parts, {name: resident + sum(parts.get(part, 0) for part in held) for name, held in PHASES.items()})


def layer_parameters(load: Workload) -> int:
    """Count the weights of one layer, both experts and their adapters: what FSDP2 gathers at once."""
    counts, llm = parameter_counts(load.config), load.config.llm_config
    adapters = 0 if load.lora_ranks is None else sum(trained_parameter_counts(load))
    return (counts["text expert"] + counts["image expert"] - 2 * llm.hidden_size + adapters) // llm.num_hidden_layers


def end_parameters(load: Workload) -> int:
    """Count the weights that are in no layer of the experts."""
    counts = parameter_counts(load.config)
    tower = counts["understanding tower"] * load.with_tower
    return counts["embeddings"] + counts["image ends"] + 2 * load.config.llm_config.hidden_size + tower


def spread_parts(load: Workload, whole: dict[str, int]) -> dict[str, int]:
    """
    Give the parts of memory that are others on several devices than on one; nothing for one.

    Under FSDP2 weights are gathered in the precision of products: a layer that is used, the next one in the buffer
    that it arrives in and cut out of it, and what is in no layer; or all, for the rollout. A gradient is held as it
    was computed, and in float32.
    """
    llm, a, trained = load.config.llm_config, load.activation_bytes, sum(trained_parameter_counts(load))
    if load.processes == 1:
        return {}
    if not load.fsdp:
        return {"DDP's buckets": 4 * trained}
    layer, ends = layer_parameters(load), end_parameters(load)
    layers, table = llm.num_hidden_layers, llm.hidden_size * llm.vocab_size
    at_once = max(layer, table) if load.lora_ranks is None else trained // layers
    return {
        **{name: -(-whole[name] // load.processes) for name in SHARDED},
        "gradients": -(-whole["gradients"] // (load.processes if load.sync_each_batch else 1)),
        "gradients being reduced": (4 + a) * at_once,
        IN_HALF: 0,
        GATHERED: a * (3 * layer + ends),
        ROLLOUT: a * ((layers if load.gather_for_rollout else 3) * layer + ends),
    }
