"""Images inside of pages."""

import base64
import io

from markupsafe import Markup
from PIL import Image


SMALL = 96  # pixels of a side up to which JPEG saves little and blurs much


def shrunk(image: Image.Image, max_side: int = 256) -> Image.Image:
    """
    Give the image in RGB, scaled down to `max_side` pixels where it is larger. Transparency is shown on white.

    Args:
        max_side: pixels of the longer side at most, at least 1.
    """
    if max_side < 1:
        raise ValueError(f"max_side={max_side}: expected at least 1 pixel.")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    scale = max_side / max(image.size)
    if scale < 1:
        size = [max(1, round(side * scale)) for side in image.size]
        image = image.resize((size[0], size[1]), Image.Resampling.BOX)
    return image


def jpeg(image: Image.Image, max_side: int = 256, quality: int = 80) -> bytes:
    """
    Encode the image as a JPEG file, [`shrunk`]. Small images keep their colours at full resolution.

    Args:
        max_side: pixels of the longer side at most, at least 1.
        quality: of JPEG, 1 to 95.
    """
    image = shrunk(image, max_side)
    small = max(image.size) <= SMALL
    out = io.BytesIO()
    image.save(out, "JPEG", quality=max(quality, 90) if small else quality, subsampling=0 if small else 2)
    return out.getvalue()


def data_uri(image: bytes, kind: str = "jpeg") -> str:
    """Write an image file as a URL that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def png_uri(image: Image.Image) -> Markup:
    """Put the image, exact, inside of a URL."""
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    return Markup(data_uri(out.getvalue(), "png"))
