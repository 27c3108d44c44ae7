"""Shared by the two ends of a served reward: images as PNG, tokens, and texts that are safe to show."""

import io
import os
import re

from PIL import Image

from ..common import to_rgb


# Modes that a PNG keeps pixel for pixel.
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")

MIN_TOKEN_LENGTH = 16
"""Shorter ones can be guessed."""

_SECRET_NAME = re.compile("KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
_DATA = re.compile(r"\S{200,}")


class TooManyPixelsError(ValueError):
    """An image whose header promises more pixels than allowed."""


def to_png(image: Image.Image) -> bytes:
    """Encode the image as PNG, its pixels unchanged; modes that PNG does not have become RGB."""
    buffer = io.BytesIO()
    # The fastest compression: the bytes travel once, mostly within a machine or a rack.
    (image if image.mode in PNG_MODES else to_rgb(image)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def from_png(data: bytes, max_pixels: int) -> Image.Image:
    """
    Decode the image of a PNG from elsewhere.

    Args:
        max_pixels: width x height, read from the header before anything is decoded.

    Raises:
        TooManyPixelsError: if it is larger.
        ValueError: if it is no PNG, or a broken one.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        width, height = image.size
        if width * height <= max_pixels:
            image.load()
            return image
    except Image.DecompressionBombError:
        raise TooManyPixelsError(f"has far more pixels than the {max_pixels} allowed.") from None
    except Exception:
        # Broken files raise errors of many types, some of which quote the file.
        raise ValueError("is no readable PNG.") from None
    raise TooManyPixelsError(f"is {width} x {height} pixels, expected at most {max_pixels} of them.")


def read_token(name: str) -> str:
    """Read the token in the environment variable `name`; ValueError, without its value, if it can't be one."""
    token = os.environ.get(name, "")
    if len(token) < MIN_TOKEN_LENGTH or not (token.isascii() and token.isprintable()) or " " in token:
        found = f"{len(token)} characters" if token else "not set"
        raise ValueError(
            f"The environment variable {name} should hold a token of at least {MIN_TOKEN_LENGTH} printable ASCII "
            f"characters without spaces or line breaks, but it is {found}. Make one: "
            f'export {name}="$(openssl rand -hex 16)"'
        )
    return token


def safe_text(text: str, token: str | None = None, limit: int = 300) -> str:
    """
    Clean a text that may be logged and sent: without the token, values of environment variables that are named like
    keys, and long runs without a space, which are data such as images; at most `limit` characters.
    """
    secrets = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= 8}
    for secret in sorted(secrets | ({token} if token else set()), key=len, reverse=True):
        text = text.replace(secret, "***")
    text = _DATA.sub("[data]", text)
    return text if len(text) <= limit else text[:limit] + " ..."


def describe_error(error: BaseException, token: str | None = None) -> str:
    """Write type and message of an error, safe to show."""
    return safe_text(f"{type(error).__name__}: {error}", token)
