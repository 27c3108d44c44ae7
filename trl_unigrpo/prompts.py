"""Prompts in the form that the model was trained with."""

import copy
from collections.abc import Collection, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .models.unified import UnifiedModelMixin


def as_messages(prompt: str | list[dict[str, Any]], system_prompt: str | None) -> list[dict[str, Any]]:
    """A prompt as a conversation that starts with a system prompt, unless it brings one or there is none."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def system_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | list[dict[str, Any]]], **template: Any
) -> list[list[int]]:
    """
    Tokens of the system message that each prompt starts with; none for a plain string, or a conversation without one.

    Args:
        template: further arguments of `apply_chat_template`.
    """
    heads = [prompt[:1] if not isinstance(prompt, str) and prompt[0]["role"] == "system" else [] for prompt in prompts]
    return [
        tokenizer.apply_chat_template(head, tokenize=True, return_dict=False, **template) if head else []
        for head in heads
    ]


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> PreTrainedTokenizerBase:
    """
    A copy of the tokenizer with the model's own chat template, if it names one.

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
    Tokens that no thinking may hold, for `suppress_tokens`: the model's own markers, padding, and the rows of the
    vocabulary that have no token.

    Args:
        end: tokens that end a thinking, which are allowed.
    """
    vocabulary = model.get_output_embeddings().weight.shape[0]
    unused = range(len(tokenizer), vocabulary)
    return sorted({*model.suppressed_token_ids, tokenizer.pad_token_id, *unused} - set(end)) or None
