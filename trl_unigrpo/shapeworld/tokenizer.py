"""The tokenizer of ShapeWorld: one token per word, and BAGEL's special tokens."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from .world import SEEING_WORDS, WORDS


PAD_TOKEN = "<|endoftext|>"
UNKNOWN_TOKEN = "<|unknown|>"
NON_WORD_TOKENS = (PAD_TOKEN, "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", UNKNOWN_TOKEN)

CHUNK_TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>'+m['content']+'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>'}}{% endif %}"
)
"""BAGEL's chunks: no roles, every message between its marks."""


IMAGE_TOKEN = "<|image_pad|>"
"""Stands for an image in a context; for models that see."""


def shapeworld_tokenizer(seeing: bool = False) -> PreTrainedTokenizerFast:
    """
    Build the tokenizer. `<think>` and `</think>` are ordinary words, so that decoding keeps them.

    Args:
        seeing: with the tokens of a model that sees, behind all others.
    """
    more = [IMAGE_TOKEN, *SEEING_WORDS] if seeing else []
    vocabulary = {word: index for index, word in enumerate([*NON_WORD_TOKENS, *WORDS, *more])}
    words = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN_TOKEN))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD_TOKEN,
        eos_token="<|im_end|>",
        unk_token=UNKNOWN_TOKEN,
        additional_special_tokens=["<|im_start|>", "<|vision_start|>", "<|vision_end|>", *more[:1]],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHUNK_TEMPLATE
    return tokenizer
