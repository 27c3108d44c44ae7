"""The tiny BAGEL checkpoint, and what the official implementation computes from it (tests/fixtures/bagel)."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging

from tests.helpers.paths import FIXTURES
from trl_unigrpo.models.bagel import BagelForUnifiedGeneration


RECORDED = FIXTURES / "bagel"
logging.disable_progress_bar()


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """Folder of a random fp32 checkpoint in the released layout."""
    return RECORDED / "tiny_bagel"


@pytest.fixture(scope="session")
def recorded() -> dict[str, Tensor]:
    """Inputs and outputs of the official implementation, "case/name"."""
    return load_file(RECORDED / "reference.safetensors")


@pytest.fixture(scope="session")
def recorded_gradients() -> dict[str, Tensor]:
    """Gradients of the official implementation, "text/<parameter>" and "image/<parameter>"."""
    return load_file(RECORDED / "reference_grads.safetensors")


@pytest.fixture(scope="session")
def recorded_meta() -> dict:
    return json.loads((RECORDED / "reference_meta.json").read_text(encoding="utf-8"))


@pytest.fixture
def model(checkpoint) -> BagelForUnifiedGeneration:
    """A fresh model: tests may change it."""
    return BagelForUnifiedGeneration.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="session")
def gradients() -> Callable[[torch.nn.Module, Tensor], dict[str, Tensor]]:
    """Function (model, loss) -> the loss's gradient of every parameter, zeros where there is none."""

    def compute(module: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
        module.zero_grad()
        loss.backward()
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in module.named_parameters()
        }

    return compute
