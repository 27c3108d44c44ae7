"""A model's tokenizer: found, made ready, and which of its tokens are never sampled."""

import copy
from collections.abc import Collection
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .contract import UnifiedModelMixin


def read_tokenizer(source: Any, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a folder or a hub id; raises OSError if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **kwargs)
        if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 2:
            raise ValueError("its vocabulary is empty")  # as transformers makes one where there are no files
        return tokenizer
    except (OSError, ValueError) as error:
        raise OSError(
            f"No tokenizer can be read from {str(source)!r}. Put the checkpoint's `tokenizer.json` and "
            "`tokenizer_config.json` there, or pass a tokenizer."
        ) from error


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> PreTrainedTokenizerBase:
    """
    Copy the tokenizer, with the model's own chat template, if it names one.

    Parsers of reasoning are taken off: they would move the thinking out of the completion, where rewards look for it.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    for parser in ("response_template", "response_schema"):
        if getattr(tokenizer, parser, None) is not None:
            setattr(tokenizer, parser, None)
    return tokenizer


def never_sampled(
    model: UnifiedModelMixin, tokenizer: PreTrainedTokenizerBase, end: Collection[int]
) -> list[int] | None:
    """
    List the tokens that no thinking may hold, for `suppress_tokens`: the model's own markers, padding, and the rows of
    the vocabulary that have no token.

    Args:
        end: tokens that end a thinking, which are allowed.
    """
    vocabulary = model.get_output_embeddings().weight.shape[0]
    unused = range(len(tokenizer), vocabulary)
    return sorted({*model.suppressed_token_ids, tokenizer.pad_token_id, *unused} - set(end)) or None
