"""Prompts in the form that the model was trained with."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


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
