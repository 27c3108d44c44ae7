"""Weights that an output depends on without a gradient are told from those that it doesn't depend on."""

import pytest
import torch

from trl_unigrpo.models.pipeline.gradients import check_gradients


def test_weights_that_matter_and_get_no_gradient_are_named():
    kinds = ("used", "cut", "dead")
    weights = {f"painter.blocks.{i}.{kind}.weight": torch.rand(3, requires_grad=True) for i in "01" for kind in kinds}
    before = {name: weight.detach().clone() for name, weight in weights.items()}

    def compute():
        with torch.no_grad():
            cut = sum(weight for name, weight in weights.items() if "cut" in name)
        return cut + sum(weight for name, weight in weights.items() if "used" in name)

    with pytest.raises(ValueError, match=r"No gradient reaches painter\.blocks\.\*\.cut, although"):
        check_gradients(weights, compute)
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())
    check_gradients({name: weight for name, weight in weights.items() if "cut" not in name}, compute)
