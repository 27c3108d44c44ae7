"""Packed copies attend as they do one by one."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.painting import steps_at
from tests.helpers.tiny_unified import IMAGE_SIZE, tiny_bagel
from trl_unigrpo.models.bagel import attention, modeling, ragged
from trl_unigrpo.models.contract import ContextRow


def kernel(q, k, v, starts, longest, queries):
    """What the GPU's kernel computes: attention of each row's own queries, keys and values."""
    out, (of_queries, of_keys) = [], starts.tolist()
    for i in range(len(of_queries) - 1):
        parts = (
            x[start[i] : start[i + 1]].transpose(0, 1) for x, start in ((q, of_queries), (k, of_keys), (v, of_keys))
        )
        out.append(F.scaled_dot_product_attention(*parts, enable_gqa=True).transpose(0, 1))
        assert of_keys[i + 1] - of_keys[i] <= longest
        assert of_queries[i + 1] - of_queries[i] == queries
    return torch.cat(out)


@pytest.fixture
def packed(monkeypatch):
    """Function that has ragged copies packed on the CPU, too; returns the list of the kernel's calls."""

    def switch_on():
        calls = []
        spied = lambda *inputs: calls.append(inputs) or kernel(*inputs)  # noqa: E731
        monkeypatch.setattr(ragged, "varlen_kernel", lambda: spied)
        for module in (attention, modeling):
            monkeypatch.setattr(module, "packs", lambda weight, visible: len({n for row in visible for n in row}) > 1)
        return calls

    return switch_on


def outputs(model, gradients, context_grad, lengths=(6, 9, 7)):
    generator = torch.Generator().manual_seed(0)
    rows = [ContextRow(torch.randint(5, 25, (length,), generator=generator)) for length in lengths]
    x, t = torch.randn(3, 2, 4, 4, generator=generator), torch.rand(3, 2, generator=generator)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    velocity = model.predict_velocities(steps_at(rows, x, t, size), context_grad=context_grad)
    found = {"velocity": velocity, **gradients(model, velocity.square().mean())}
    with torch.no_grad():
        found["alone"] = model.predict_velocity(model.encode_context(rows), x[:, 0], t[:, 0], size)
    return found


@pytest.mark.parametrize("context_grad", [False, True])
def test_packed_copies_are_those_of_the_masked_attention(gradients, packed, context_grad):
    model = tiny_bagel()
    expected = outputs(model, gradients, context_grad)
    calls = packed()
    found = outputs(model, gradients, context_grad)
    assert len(calls) == 2 * 2  # layers, and calls of the model
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_equal_lengths_are_not_packed(gradients, packed):
    calls = packed()
    outputs(tiny_bagel(), gradients, False, lengths=(6, 6, 6))
    assert not calls


def test_packing_by_hand():
    packing = ragged.Packing.of([[2, 1], [3, 3]], context=4, queries=2)
    assert packing.starts.tolist() == [[0, 2, 4, 6, 8], [0, 4, 7, 12, 17]]
    own = 8  # after two contexts of 4
    first, second = [0, 1, own, own + 1], [0, own + 2, own + 3]
    third, fourth = [4, 5, 6, own + 4, own + 5], [4, 5, 6, own + 6, own + 7]
    assert packing.index.tolist() == [*first, *second, *third, *fourth]
    assert packing.longest == 5
