"""Rewards that log readings as a read-back reward does, and images with letters."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trl_unigrpo.messages import user_text
from trl_unigrpo.rewards.readback.reading import READ_BACK, Reading
from trl_unigrpo.rewards.readback.words import logged_reading


def reading(text: str, log_prob: float = -1.0) -> str:
    """Write the log of a text whose words all have this log-prob."""
    words = text.split(" ")
    tokens = [word if place == 0 else f" {word}" for place, word in enumerate(words)]
    return Reading(tokens, [log_prob] * len(words)).to_json()


def reads(prompts, images, log_extra, **_):
    """A reward as a read-back one: below 0, and the higher the later a sample stands in its batch."""
    logged = [reading(user_text(prompt), place - len(prompts)) for place, prompt in enumerate(prompts)]
    log_extra(READ_BACK, logged)
    return [logged_reading(value).score for value in logged]


def lettered(text: str, side: int = 128, seed: int = 0) -> Image.Image:
    """Soft colours, and a text painted over them."""
    colors = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(colors).resize((side, side), Image.Resampling.BICUBIC)
    if text:
        font = ImageFont.load_default(side // 8)
        lines = "\n".join(textwrap.wrap(text, 14))
        place = (side // 32, side // 32)
        ImageDraw.Draw(image).multiline_text(
            place, lines, font=font, fill="white", stroke_width=1, stroke_fill="black"
        )
    return image
