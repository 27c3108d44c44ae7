"""Attention of grouped heads: nothing is repeated where a token decodes, and a fused kernel is found elsewhere."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers.tiny_unified import tiny_bagel
from trl_unigrpo.models.bagel import attention
from trl_unigrpo.models.bagel.attention import attend, causal_mask, computed_dtype, repeats_heads


HEADS = [(28, 4), (12, 2), (32, 8), (16, 2)]
"""Query and key heads of Qwen2.5 7B, which is BAGEL's, and of other models."""


class LargestOutput(TorchDispatchMode):
    """The most numbers that the memory of one operation's output holds."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.itemsize)
        return made


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("padded", [False, True])
def test_one_token_attends_to_a_cache_without_repeating_it(heads, padded):
    generator = torch.Generator().manual_seed(0)
    batch, length, size = 3, 96, 16
    q = torch.randn(batch, 1, heads[0], size, generator=generator).transpose(1, 2)  # as a projection gives it
    k, v = torch.randn(2, batch, heads[1], length, size, generator=generator)
    mask = (torch.arange(length) >= torch.tensor([[0], [5], [60]]))[:, None, None] if padded else None
    repeated = (x.repeat_interleave(heads[0] // heads[1], dim=1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q, *repeated, mask)
    with LargestOutput() as largest:
        out = attend(q, k, v, mask)
    torch.testing.assert_close(out, expected, rtol=0, atol=5e-7)
    assert 0 < largest.numbers < k.numel()


def test_a_decoding_model_repeats_no_cache():
    """A token behind a cache of left-padded rows."""
    model = tiny_bagel(num_attention_heads=28, num_key_value_heads=4, head_dim=8).eval()
    batch, length = 3, 200
    ids = torch.randint(6, 20, (batch, length), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(length + 1) >= torch.tensor([[0], [50], [120]])).long()
    with torch.no_grad():
        cache = model(ids, attention_mask=mask[:, :-1], use_cache=True).past_key_values
        with LargestOutput() as largest:
            model(ids[:, -1:], attention_mask=mask, past_key_values=cache, use_cache=True)
    once = batch * 4 * (length + 1) * 8
    assert once <= largest.numbers < 2 * once  # the cache itself grows by a copy


@pytest.mark.parametrize(
    ("device", "dtype", "masked", "repeats"),
    [
        ("cuda", torch.bfloat16, False, False),
        ("cuda", torch.float16, False, False),
        ("cuda", torch.float32, False, True),
        ("cuda", torch.bfloat16, True, True),
        ("cpu", torch.bfloat16, False, True),
    ],
)
def test_heads_are_repeated_where_no_fused_kernel_takes_groups(device, dtype, masked, repeats):
    assert repeats_heads(device, dtype, masked) is repeats


@pytest.mark.parametrize("repeats", [False, True])
def test_attention_follows_that_choice(monkeypatch, repeats):
    asked = []
    monkeypatch.setattr(attention, "repeats_heads", lambda *of: bool(asked.append(of)) or repeats)
    q, k, v = (torch.randn(2, heads, 5, 8, generator=torch.Generator().manual_seed(heads)) for heads in (8, 2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, k, v, is_causal=True)
    assert asked == [("cpu", torch.bfloat16, False)]  # autocast casts within the call
    assert out.dtype == torch.bfloat16
    expected = F.scaled_dot_product_attention(q, k.repeat_interleave(4, 1), v.repeat_interleave(4, 1), is_causal=True)
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.05)


def test_dtype_of_attention_where_nothing_casts():
    assert computed_dtype(torch.zeros(1, device="meta")) == torch.float32
    assert computed_dtype(torch.zeros(1, dtype=torch.bfloat16)) == torch.bfloat16


def test_mask_of_rows_of_which_padding_is_known():
    """Nothing that the caller knows is looked up: a mask on a device that has no values would not allow it."""
    mask = torch.ones(2, 4, dtype=torch.bool, device="meta")
    assert causal_mask(mask, 1, padded=False) is None
    assert causal_mask(mask, 4, padded=False) is None
    assert causal_mask(mask, 1, padded=True).shape == (2, 1, 1, 4)
    assert causal_mask(mask, 2, padded=False).shape == (2, 1, 2, 4)  # neither a token nor a whole row
    seen = causal_mask(torch.tensor([[False, True, True]]), 3)
    assert seen.int().tolist() == [[[[1, 0, 0], [0, 1, 0], [0, 1, 1]]]]
