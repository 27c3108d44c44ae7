"""The word-level tokenizer and BAGEL's chunks."""

import pytest
from transformers import AutoTokenizer

from trl_unigrpo.shapeworld.corpus import corpus_columns
from trl_unigrpo.shapeworld.tokenizer import NON_WORD_TOKENS, shapeworld_tokenizer
from trl_unigrpo.shapeworld.world import WORDS


@pytest.fixture(scope="module")
def tokenizer():
    return shapeworld_tokenizer()


def test_roles_of_the_special_tokens(tokenizer):
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side) == (
        "<|endoftext|>",
        "<|im_end|>",
        "left",
    )
    assert len(tokenizer) == len(NON_WORD_TOKENS) + len(WORDS)
    assert set(tokenizer.all_special_tokens) == set(NON_WORD_TOKENS)
    assert tokenizer.unk_token_id not in tokenizer(list(WORDS), is_split_into_words=True)["input_ids"]


def test_chat_template_makes_chunks(tokenizer):
    messages = [{"role": "user", "content": "two red circles"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>two red circles<|im_end|><|im_start|>"
    expected = ["<|im_start|>", "two", "red", "circles", "<|im_end|>", "<|im_start|>"]
    assert tokenizer.convert_ids_to_tokens(tokenizer(prompt)["input_ids"]) == expected
    messages.append({"role": "assistant", "content": "<think> red circle top </think>"})
    whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]
    tokens = ["<think>", "red", "circle", "top", "</think>", "<|im_end|>"]
    assert tokenizer.convert_ids_to_tokens(whole) == expected + tokens


def test_every_text_of_the_corpus_comes_back(tokenizer):
    columns = corpus_columns(2000, no_thinking_share=0.0)
    for text in columns["prompt"] + columns["completion"]:
        ids = tokenizer(f"{text}<|im_end|>")["input_ids"]
        assert len(ids) == len(text.split()) + 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_unknown_words_become_the_unknown_token(tokenizer):
    assert tokenizer("a hexagon")["input_ids"][1] == tokenizer.unk_token_id


def test_padding_is_on_the_left(tokenizer):
    batch = tokenizer(["red", "a red circle"], padding=True)
    assert batch["input_ids"][0][:2] == [tokenizer.pad_token_id] * 2
    assert batch["attention_mask"][0] == [0, 0, 1]


def test_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>a red circle<|im_end|><|im_start|><think> red circle top </think><|im_end|>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.padding_side == "left"
