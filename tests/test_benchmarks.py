"""The counters that the benchmarks rely on."""

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent.parent / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_attention_is_counted_forward_and_backward():
    flops = load("flops")
    q, k, v = (torch.randn(2, 3, length, 8, requires_grad=True) for length in (5, 7, 7))
    with flops.count() as forward:
        out = F.scaled_dot_product_attention(q, k, v)
    with flops.count() as backward:
        out.sum().backward()
    product = 2 * 2 * 3 * 5 * 7 * 8  # one matrix product: 2 FLOPs, B = 2, A = 3, S = 5, S' = 7, D = 8
    assert forward.get_total_flops() == 2 * product
    assert backward.get_total_flops() == 5 * product
    with flops.count() as plain:
        torch.randn(4, 6) @ torch.randn(6, 10)
    assert plain.get_total_flops() == 2 * 4 * 6 * 10


def test_floor_of_one_token_models_by_hand():
    flops = load("flops")
    model, _ = flops.model_and_tokenizer()
    parts = flops.floor(model.config, prompt=1, completion=1, vae=0)
    token = 2 * 4 * (64 * 16 * 16 + 3 * 64 * 192)  # 4 layers: q, k, v, o of 64 x 64, and three matrices of 64 x 192
    word = 2 * 64 * 74
    assert parts["prefill, once per prompt"] == 2 * (token + 4 * 64 * 4 + word)
    assert parts["decode"] == 0
