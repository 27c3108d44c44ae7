"""Tokens and sizes of the tiny BAGEL checkpoint, and how its outputs are compared."""

import torch
from torch import Tensor


START, END, PAD = 375, 376, 374
SIZE = (32, 48)  # 2 x 3 image tokens
TOLERANCE = 1e-5


def assert_equal(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        atol = tolerance * gradient.abs().max().item()
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")
