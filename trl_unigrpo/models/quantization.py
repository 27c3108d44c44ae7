"""Weights quantised by bitsandbytes: which stay as they are, and what training asks of the rest."""

import copy
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AutoQuantizationConfig


_HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def ready_to_quantize(config: Any, unquantized: Sequence[str], dtype: Any = None) -> Any:
    """
    Complete what a user passes to `from_pretrained` as `quantization_config`.

    Args:
        config: a `BitsAndBytesConfig`, or one as a dictionary; other methods' configurations are returned unchanged.
        unquantized: names of the modules that are never quantised, beside those that the user excludes.
        dtype: what the rest is loaded in, a dtype or its name. In half precision it is also what 4-bit layers compute
            in; their own default is float32, several times slower on a GPU.

    Returns:
        A copy of the configuration.

    Raises:
        ImportError: if bitsandbytes is not installed.
    """
    if isinstance(config, dict):
        config = AutoQuantizationConfig.from_dict(config)
    if not isinstance(config, BitsAndBytesConfig):
        return config
    if find_spec("bitsandbytes") is None:
        raise ImportError(
            "quantization_config needs bitsandbytes, which is not installed: pip install 'trl-unigrpo[quant]'. Or "
            "leave the option out; bfloat16 weights take about three times the memory."
        )
    config = copy.deepcopy(config)
    config.llm_int8_skip_modules = sorted({*(config.llm_int8_skip_modules or []), *unquantized})
    dtype = _HALF.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype in _HALF.values() and config.bnb_4bit_compute_dtype == torch.float32:
        config.bnb_4bit_compute_dtype = dtype
    return config


def keep_trainable_layout(model: nn.Module) -> None:
    """
    Keep 4-bit weights in the layout that gradients can be computed from.

    On processors with AVX512-BF16 bitsandbytes repacks them in place, for speed, in the first forward in evaluation
    mode; every training step after it would raise.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
