"""A model's tokenizer: found, made ready, and which of its tokens are never sampled."""

import copy
from collections.abc import Collection, Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..messages import all_texts
from .contract import UnifiedModelMixin


THINK_TOKENS = ("<think>", "</think>")
"""Around the thoughts that system prompts ask for; some tokenizers have them as special tokens."""

FOLD_SYSTEM = """\
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] -%}
{%- if messages | length > 1 and messages[1]['role'] == 'user' -%}
{%- set turn = {'role': 'user', 'content': system + '\\n\\n' + messages[1]['content']} -%}
{%- set messages = [turn] + messages[2:] -%}
{%- else -%}
{%- set messages = [{'role': 'user', 'content': system}] + messages[1:] -%}
{%- endif -%}
{%- endif -%}
"""
"""Put before a chat template without a system role: the system message opens the user's turn."""


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

    Where the template knows no system role, the system message opens the user's turn.
    Parsers of reasoning are taken off: they would move the thinking out of the completion, where rewards look for it.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if isinstance(tokenizer.chat_template, str) and not _keeps_system(tokenizer, tokenizer.chat_template):
        folded = FOLD_SYSTEM + tokenizer.chat_template
        if _keeps_system(tokenizer, folded):
            tokenizer.chat_template = folded
    for parser in ("response_template", "response_schema"):
        if getattr(tokenizer, parser, None) is not None:
            setattr(tokenizer, parser, None)
    return tokenizer


def _keeps_system(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Say whether a chat template shows a system message; some refuse it, others leave it out."""
    messages = [{"role": "system", "content": "SYSTEM"}, {"role": "user", "content": "USER"}]
    try:
        shown = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    except TemplateError:
        return False
    return "SYSTEM" in shown


def never_sampled(
    model: UnifiedModelMixin, tokenizer: PreTrainedTokenizerBase, end: Collection[int]
) -> list[int] | None:
    """
    List the tokens that no thinking may hold, for `suppress_tokens`: the model's own markers, padding, the tokenizer's
    special tokens, and the rows of the vocabulary that have no token.

    Args:
        end: tokens that end a thinking, which are allowed.
    """
    vocabulary = model.get_output_embeddings().weight.shape[0]
    unused = range(len(tokenizer), vocabulary)
    special = special_tokens(tokenizer).keys() - _written_in_answers(tokenizer)
    markers = [i for i in model.suppressed_token_ids if i < vocabulary]
    return sorted({*markers, tokenizer.pad_token_id, *special, *unused} - set(end)) or None


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Give the tokens that are no text, by their ids, as texts: they open and close turns, images and the like."""
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return {i: token for i, token in {**added, **named}.items() if i != tokenizer.unk_token_id}


def check_text(texts: Collection[str], special: Collection[str], where: str) -> None:
    """
    Raise ValueError for texts of a user that hold a special token: it would be read as one.

    Args:
        special: the tokens, as [`special_tokens`] gives them.
        where: to begin the message with.
    """
    for token in special:
        for text in texts:
            if token and token in text:
                raise ValueError(
                    f"{where} holds {token!r}, which is no text to the model, but a special token: {text[:200]!r}. "
                    "Take it out, or write it in another way."
                )


def check_messages(
    messages: Sequence[str | list[dict[str, Any]]], tokenizer: PreTrainedTokenizerBase
) -> Sequence[Any]:
    """Return conversations as they are; raises ValueError where one holds a special token, see [`check_text`]."""
    texts = [text for conversation in messages for text in all_texts(conversation)]
    check_text(texts, special_tokens(tokenizer).values(), "A prompt")
    return messages


def _written_in_answers(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Find the special tokens that an answer is made of: around thoughts, and those of the chat template."""
    thoughts = set(tokenizer.convert_tokens_to_ids(list(THINK_TOKENS)))
    question, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    try:
        asked = tokenizer.apply_chat_template([question], add_generation_prompt=True, tokenize=False)
        told = tokenizer.apply_chat_template([question, answer], tokenize=False)
    except (TemplateError, TypeError, ValueError):  # templates of one turn
        return thoughts
    written = told[len(asked) :] if told.startswith(asked) else ""
    return thoughts | set(tokenizer(written, add_special_tokens=False)["input_ids"])
