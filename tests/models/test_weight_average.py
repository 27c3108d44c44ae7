"""The average itself: of trained weights alone, in float32, and in their place only while it is asked to be."""

import re

import pytest
import torch
from torch import nn

from tests.helpers.tiny_unified import moved, weights
from trl_unigrpo.models.averages import WeightAverage, copy_weights


def small(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    model[1].bias.requires_grad_(False)
    return model


def test_only_trained_weights_that_belong_are_copied():
    model = small()
    assert {*WeightAverage(model).weights} == {"0.weight", "0.bias", "1.weight"}
    average = WeightAverage(model, lambda name: name.startswith("1."))
    assert {*average.weights} == {"1.weight"}
    assert average.weights["1.weight"].data_ptr() != model[1].weight.data_ptr()


def test_an_average_in_place_changes_its_weights_and_leaves_no_trace():
    model = small()
    average, before = WeightAverage(model, lambda name: "weight" in name), weights(model)
    average.weights["0.weight"].add_(1.0)
    with average.in_place():
        assert moved(before, weights(model)) == {"0.weight"}
    assert not moved(before, weights(model))
    average.update(0.25)
    assert torch.allclose(average.weights["0.weight"], before["0.weight"] + 0.25)


def test_small_steps_of_half_precision_add_up():
    """In bfloat16 itself a thousandth of a step would round to nothing."""
    model = small(torch.bfloat16)
    start, average = weights(model)["0.weight"].float(), WeightAverage(model)
    with torch.no_grad():
        model[0].weight.add_(0.5)
    end = model[0].weight.float()
    for _ in range(1000):
        average.update(0.999)
    expected = end + 0.999**1000 * (start - end)
    torch.testing.assert_close(average.weights["0.weight"], expected.detach(), rtol=1e-4, atol=1e-4)
    with average.in_place():
        assert model[0].weight.dtype == torch.bfloat16
        torch.testing.assert_close(model[0].weight.float(), expected, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("other", [{"0.weight": torch.ones(3, 4)}, {"other": torch.ones(4, 3)}])
def test_weights_of_another_model_are_refused_before_anything_is_copied(other):
    model = small()
    average = WeightAverage(model, lambda name: name == "0.weight")
    before = average.weights["0.weight"].clone()
    with pytest.raises(ValueError, match=re.escape("are not those of this model")):
        copy_weights(average.weights, other)
    assert torch.equal(average.weights["0.weight"], before)
