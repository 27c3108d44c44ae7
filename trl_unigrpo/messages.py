"""Prompts as datasets have them: texts, or conversations."""

from collections.abc import Sequence
from typing import Any


def user_text(prompt: str | Sequence[dict[str, Any]]) -> str:
    """The text of a plain prompt, or of the last user message of a conversation; ValueError if it has none."""
    if isinstance(prompt, str):
        return prompt
    for message in reversed(prompt):
        if message.get("role") == "user":
            return content_text(message["content"])
    raise ValueError(f"{prompt!r} has no message of the user: expected a string, or a conversation with one.")


def content_text(content: str | Sequence[dict[str, Any]]) -> str:
    """Give the text of a message, whose content is a text or a list of parts: those of text are joined."""
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", "") for part in content if part.get("type") == "text")


def all_texts(prompt: str | Sequence[dict[str, Any]]) -> list[str]:
    """List all texts of a plain prompt or a conversation."""
    return [prompt] if isinstance(prompt, str) else [content_text(message.get("content") or "") for message in prompt]
