"""Tokens decoded in rooms that are recorded anew when they are full: the same as those of a cache that grows."""

import pytest
import torch

from tests.helpers.tiny_unified import tiny_bagel
from trl_unigrpo.models.bagel import decoding
from trl_unigrpo.models.bagel.decoding import DecodingCache, samples_token_by_token
from trl_unigrpo.models.bagel.modeling import CACHE


@pytest.fixture
def model():
    return tiny_bagel().eval()


@pytest.fixture
def prompts():
    """Three rows, two of them padded on the left."""
    ids = torch.randint(5, 25, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, :1] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


ARGUMENTS = {"do_sample": False, "eos_token_id": 2, "pad_token_id": 0}


def test_tokens_are_those_of_a_growing_cache_through_several_rooms(model, prompts, monkeypatch):
    monkeypatch.setattr(decoding, "ROOM", 3)  # rounded up to 64 tokens
    expected = model.generate(**prompts, max_new_tokens=150, **ARGUMENTS)
    sizes, make_room = [], DecodingCache._make_room

    def spied(self, states):
        make_room(self, states)
        sizes.append(self._room.size)

    monkeypatch.setattr(DecodingCache, "_make_room", spied)
    cache = DecodingCache(model.config.llm_config, model.next_logits)
    tokens = model.generate(**prompts, max_new_tokens=150, **ARGUMENTS, **{CACHE: cache})
    assert torch.equal(tokens, expected)
    assert cache.get_seq_length() == expected.shape[1] - 1
    assert sizes == [64, 128, 192]


@torch.no_grad()
def test_logits_do_not_see_what_is_not_written(model, prompts):
    """Numbers in the room's empty places, even infinite ones, change nothing."""
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    found = []
    for filled in (0.0, 1e9):
        cache = DecodingCache(model.config.llm_config, model.next_logits)
        model(ids[:, :-2], attention_mask=mask[:, :-2], use_cache=True, **{CACHE: cache})
        model(ids[:, -2:-1], attention_mask=mask[:, :-1], **{CACHE: cache})
        for keys in cache._room.keys:
            keys[:, :, cache.get_seq_length() :] = filled
        found.append(model(ids[:, -1:], attention_mask=mask, **{CACHE: cache}).logits)
    torch.testing.assert_close(found[0], model(ids, attention_mask=mask).logits[:, -1:])
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "arguments",
    [{"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}],
    ids=lambda a: next(iter(a)),
)
def test_other_ways_to_generate_keep_their_own_cache(model, arguments):
    assert samples_token_by_token(model.generation_config, {"max_new_tokens": 3})
    assert not samples_token_by_token(model.generation_config, arguments)
