"""Prompts as datasets have them: texts, or conversations."""

from collections.abc import Sequence
from typing import Any


def user_text(prompt: str | Sequence[dict[str, Any]]) -> str:
    """The text of a plain prompt, or of the last user message of a conversation; ValueError if it has none."""
    if isinstance(prompt, str):
        return prompt
    for message in reversed(prompt):
        if message.get("role") == "user":
            content = message["content"]
            if isinstance(content, str):
                return content
            return " ".join(part.get("text", "") for part in content if part.get("type") == "text")
    raise ValueError(f"{prompt!r} has no message of the user: expected a string, or a conversation with one.")


def all_texts(prompt: str | Sequence[dict[str, Any]]) -> list[str]:
    """All texts of a plain prompt or a conversation."""
    if isinstance(prompt, str):
        return [prompt]
    contents = [message.get("content") or "" for message in prompt]
    parts = [[content] if isinstance(content, str) else [p.get("text", "") for p in content] for content in contents]
    return [text for texts in parts for text in texts]
