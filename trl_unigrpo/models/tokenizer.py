"""A model's tokenizer: found, made ready, and which of its tokens are never sampled."""

import copy
from collections.abc import Collection
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .contract import UnifiedModelMixin


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
    List the tokens that no thinking may hold, for `suppress_tokens`: the model's own markers, padding, and the rows of
    the vocabulary that have no token.

    Args:
        end: tokens that end a thinking, which are allowed.
    """
    vocabulary = model.get_output_embeddings().weight.shape[0]
    unused = range(len(tokenizer), vocabulary)
    return sorted({*model.suppressed_token_ids, tokenizer.pad_token_id, *unused} - set(end)) or None
