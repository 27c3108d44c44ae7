"""Numbers of parameters of a BAGEL, from its configuration alone."""

import math
from typing import Any

from ..models.bagel.configuration import BagelConfig
from ..models.bagel.layers import BagelTimeEmbedder, head_size


NF4_TABLE = 4 * 16  # the sixteen values, in float32, kept with every layer
# `llm_config.json` and `vit_config.json` of BAGEL-7B-MoT; the tower is stored without its last layer.
RELEASED_LLM = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
RELEASED_VIT = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 980,
    "patch_size": 14,
    "num_channels": 3,
}


def released_config() -> BagelConfig:
    """Give the sizes of BAGEL-7B-MoT."""
    return BagelConfig(llm_config=dict(RELEASED_LLM), vit_config=dict(RELEASED_VIT))


def key_value_heads(llm: Any) -> int:
    return llm.num_key_value_heads or llm.num_attention_heads


def linears(llm: Any) -> list[tuple[int, int]]:
    """List (in, out) of the seven linear layers of one expert in one layer: q, k, v, o, gate, up, down."""
    width, inner = llm.hidden_size, llm.intermediate_size
    query, key = (heads * head_size(llm) for heads in (llm.num_attention_heads, key_value_heads(llm)))
    return [(width, query), (width, key), (width, key), (query, width), (width, inner), (width, inner), (inner, width)]


def linear_parameters(llm: Any) -> int:
    """Count the weights of the linear layers of one expert, all layers."""
    return llm.num_hidden_layers * sum(rows * columns for rows, columns in linears(llm))


def lora_parameters(llm: Any, rank: int) -> int:
    """Count the weights of the adapters of one expert: r (in + out) for each of its linear layers."""
    return llm.num_hidden_layers * sum(rank * (rows + columns) for rows, columns in linears(llm))


def parameter_counts(config: BagelConfig) -> dict[str, int]:
    """
    Count the parameters by group, as many as the released checkpoint stores.

    Groups: `text expert`, `image expert`, `embeddings` (input and output), `image ends` (time embedder, projections
    and table around the image expert), `understanding tower` (0 without a `vit_config`).
    """
    llm, width = config.llm_config, config.llm_config.hidden_size
    biases = sum(columns for _, columns in linears(llm)[:3])
    norms = 2 * width + 2 * head_size(llm)
    expert = linear_parameters(llm) + llm.num_hidden_layers * (biases + norms) + width
    time = BagelTimeEmbedder.frequencies * width + width + width * width + width
    latent = config.latent_channels
    projections = latent * width + width + width * latent + latent
    return {
        "text expert": expert,
        "image expert": expert,
        "embeddings": 2 * width * llm.vocab_size,
        "image ends": time + projections + config.max_latent_size**2 * width,
        "understanding tower": _tower_parameters(config.vit_config, width),
    }


def _tower_parameters(vit: Any, width: int) -> int:
    """Count the tower without the last layer that its file names, its connector, and its table of positions."""
    if not vit:
        return 0
    hidden, inner, patch = vit.hidden_size, vit.intermediate_size, vit.patch_size
    positions = (vit.image_size // patch) ** 2
    layer = 4 * hidden * (hidden + 1) + 2 * hidden * inner + inner + hidden + 4 * hidden
    tower = (vit.num_channels * patch**2 + 1) * hidden + positions * hidden
    tower += (vit.num_hidden_layers - 1) * layer + 2 * hidden
    connector = (hidden + 1) * width + (width + 1) * width
    return tower + connector + positions * width


def linear_bytes(config: BagelConfig, quantization: str | None, weight_bytes: int) -> int:
    """
    Count the bytes of one expert's linear layers: 4 bits a weight and a scale per 64 under "nf4", where the scale
    takes 4 bytes or, quantised itself ("nf4-double"), one and 4 more per 256 scales; biases stay as they are.
    """
    llm = config.llm_config
    biases = llm.num_hidden_layers * sum(columns for _, columns in linears(llm)[:3]) * weight_bytes
    if quantization is None:
        return linear_parameters(llm) * weight_bytes + biases
    layer = 0
    for rows, columns in linears(llm):
        scales = math.ceil(rows * columns / 64)
        layer += math.ceil(rows * columns / 2) + NF4_TABLE
        # Double quantisation also keeps a table of 256 values and the mean of the scales.
        double = scales + 4 * math.ceil(scales / 256) + 4 * 256 + 4
        layer += double if quantization == "nf4-double" else 4 * scales
    return llm.num_hidden_layers * layer + biases
