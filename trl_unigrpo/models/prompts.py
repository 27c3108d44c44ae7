"""Prompts in the form that the model was trained with."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..messages import content_text
from .contract import UnifiedModelMixin


def choose_system_prompt(model: UnifiedModelMixin, system_prompt: str, thinking: bool = True) -> str | None:
    """
    Choose the system prompt of prompts that bring none. It asks for a thinking: without one there is none.

    Args:
        system_prompt: "auto" for the model's own, "" for none.
    """
    if not thinking:
        return None
    return model.default_system_prompt if system_prompt == "auto" else system_prompt


def as_messages(prompt: str | list[dict[str, Any]], system_prompt: str | None) -> list[dict[str, Any]]:
    """
    Make a prompt a conversation that starts with a system prompt, unless it brings one or there is none.

    Chat templates of language models take texts: a content in parts becomes the text of its parts.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = [{**message, "content": content_text(message["content"])} for message in messages]
    if system_prompt and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def system_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | list[dict[str, Any]]], **template: Any
) -> list[list[int]]:
    """
    Give the tokens of the system message that each prompt starts with; none for a plain string, or a conversation
    without one.

    Args:
        template: further arguments of `apply_chat_template`.
    """
    heads = [
        prompt[:1] if prompt and not isinstance(prompt, str) and prompt[0]["role"] == "system" else []
        for prompt in prompts
    ]
    return [
        tokenizer.apply_chat_template(head, tokenize=True, return_dict=False, **template) if head else []
        for head in heads
    ]
