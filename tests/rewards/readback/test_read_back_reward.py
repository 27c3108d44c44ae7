"""The score of a text that was read back, and the reward that asks a reader for it."""

import json
import math

import pytest
from PIL import Image

from trl_unigrpo.rewards import ReadBackReward
from trl_unigrpo.rewards.readback.reading import Reading, pieces
from trl_unigrpo.shapeworld.tokenizer import shapeworld_tokenizer


RED, BLUE = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))


class Lookup:
    """A reader that finds a word likelier on an image of its colour, and can't read long texts."""

    last_error = ""

    def read(self, images, texts):
        readings = []
        for image, text in zip(images, texts, strict=True):
            words = text.split()
            shown = "red" if image.getpixel((0, 0))[0] > 128 else "blue"
            self.last_error = f"{len(words)} words are too many" if len(words) > 4 else self.last_error
            log_probs = [math.log(0.5 if word == shown else 0.125) for word in words]
            readings.append(None if len(words) > 4 else Reading(words, log_probs))
        return readings


def test_score_is_the_mean_over_all_tokens_but_the_first():
    reward = ReadBackReward(Lookup())
    scores = reward(["red a red", "a blue", "red", [{"role": "user", "content": "a red"}]], images=[RED] * 4)
    assert scores == pytest.approx([math.log(0.25), math.log(0.125), math.log(0.5), math.log(0.5)])


def test_what_can_not_be_read_has_no_score_and_a_reason():
    reward, metrics, columns = ReadBackReward(Lookup()), {}, {}
    prompts = ["a red", "a b c d e", "a blue"]
    images, log = [RED, RED, BLUE], {"log_metric": metrics.__setitem__, "log_extra": columns.__setitem__}
    scores = reward(prompts, images=images, **log)
    assert scores == [math.log(0.5), None, math.log(0.5)]
    assert reward.last_error == "5 words are too many"
    assert metrics == {"ReadBackReward/failed": pytest.approx(1 / 3)}
    shown = [None if cell is None else json.loads(cell) for cell in columns["read_back"]]
    assert shown == [[["a", -2.0794], ["red", -0.6931]], None, [["a", -2.0794], ["blue", -0.6931]]]
    assert reward(["a red", " "], images=[RED, RED]) == [math.log(0.5), None]
    assert reward.last_error == "The prompt of row 1 is empty."


def test_tokens_are_shown_as_the_text_they_stand_for():
    tokenizer = shapeworld_tokenizer(seeing=True)
    text = "two  red circles"
    assert pieces(tokenizer, text, tokenizer(text)["input_ids"]) == ["two", "  red", " circles"]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="judge='mine': expected 'reference' or 'policy'"):
        ReadBackReward(judge="mine")
    with pytest.raises(ValueError, match="judge='policy' is for reader='self'"):
        ReadBackReward(Lookup(), judge="policy")
    with pytest.raises(ValueError, match=r"only a trainer and `trl-unigrpo eval` know.*name a reader"):
        ReadBackReward()(["a red"], images=[RED])
