"""The OCR reward with the real OCR model, on words that were drawn; its distance, against a table by hand."""

import logging
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from tests.helpers.tiny_perception import word_image
from trl_unigrpo.rewards import OCRReward
from trl_unigrpo.rewards.common import DeadRewardError
from trl_unigrpo.rewards.ocr import quoted_text, text_match


pytest.importorskip("rapidocr")


@pytest.fixture(scope="module")
def reward():
    return OCRReward(threads=1)


def edit_distance(a: str, b: str) -> int:
    """The textbook's recursion, as a table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, above = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
    return row[-1]


@pytest.mark.parametrize(
    ("recognized", "target", "score"),
    [
        ("HELLO", "HELLO", 1.0),
        ("HELO", "HELLO", 0.8),
        ("CAT", "DOG", 0.0),
        ("", "DOG", 0.0),
        ("hello", "HELLO", 1.0),
        ("HEL LO", "H ELLO", 1.0),
        ("OPEN24HOURS", "Open 24", 1.0),  # contained: full credit
        ("a much longer text than that", "DOG", 0.0),  # never below 0
        ("DOC", "DOG", 2 / 3),
        ("GRAND OPENING", "Grand\nOpening", 1.0),
        ("Grand\u3000Opening", "Grand\u00a0Op\u00aden\u200bing\ufeff", 1.0),
        ("Grand Opening", "Grand\u2028Opening", 1.0),
        ("Wait...", "Wait…", 1.0),
        ("Wait⋯", "Wait...", 1.0),
        ("DON'T WALK", "DON’T WALK", 1.0),
        ("DON´T", "DON`T", 1.0),
        ('"Hi"', "“Hi”", 1.0),
        ("«Hi»", "„Hi“", 1.0),
        ("9-5", "9–5", 1.0),
        ("A—B−C﹘D", "A-B‑C-D", 1.0),
        ("tel", "℡", 1.0),
        ("OPEN 24!", "ＯＰＥＮ　２４！", 1.0),
        ("ﬁne", "FINE", 1.0),
        ("STRASSE", "Straße", 1.0),
        ("ﾊﾟﾝ", "パン", 1.0),
        ("5 m²", "5 m2", 1.0),
        ("CAFE", "CAFÉ", 3 / 4),  # another letter stays another letter
        ("A.B", "A-B", 2 / 3),
    ],
)
def test_match_by_hand(recognized, target, score):
    assert text_match(recognized, target) == pytest.approx(score)


def test_match_is_one_minus_the_relative_edit_distance():
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = ("".join(rng.choice(list("abc"), rng.integers(1, 9))) for _ in range(2))
        expected = 1.0 if b in a else 1 - min(edit_distance(a, b), len(b)) / len(b)
        assert text_match(a, b) == pytest.approx(expected)


@pytest.mark.parametrize("target", ["  ", "\u200b", "\n\u00a0\ufeff"])
def test_empty_target_is_an_error(reward, target):
    with pytest.raises(ValueError, match="target text is empty"):
        text_match("HELLO", target)
    with pytest.raises(ValueError, match="column 'target' is empty"):
        reward(prompts=["a"], images=[word_image("HELLO")], target=[target])


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "OPEN"', "OPEN"),
        ("a sign that says 'OPEN'", "OPEN"),
        ("a sign that says “OPEN”", "OPEN"),
        ("a sign that says ‘OPEN’", "OPEN"),
        ('the shop\'s sign: "Joe\'s Bar" and "closed"', "Joe's Bar"),
        ("a dog's bowl that says 'Rex's food'", "Rex's food"),
        ("a dog's bowl isn't empty", None),
        ('a sign that says ""', None),
        ('a 5" nail', None),
        ("a sign", None),
        ('a sign that says "" and "OPEN"', "OPEN"),
        ("ein Schild: „GEÖFFNET“, daneben „ZU“", "GEÖFFNET"),
        ('ein Schild: „OFFEN"', "OFFEN"),
        ("szyld „OTWARTE”", "OTWARTE"),
        ("ein Schild: »OFFEN« und «ZU»", "OFFEN"),
        ("ein Schild: ‚OFFEN‘", "OFFEN"),
        ("une enseigne « OUVERT »", "OUVERT"),
        ("une enseigne «\u202fOUVERT\u00a0»", "OUVERT"),
        ("une enseigne ‹ OUVERT ›", "OUVERT"),
        ("kyltti ”AUKI”", "AUKI"),
        ("看板に「営業中」と『本』", "営業中"),
        ("縦書きの﹁営業中﹂", "営業中"),
        ("写着“开门”的牌子", "开门"),
        ("写着＂开门＂的牌子", "开门"),
        ("a sign: ＇OPEN＇", "OPEN"),
        ("看板〝営業中〟", "営業中"),
        ('“first” and "second"', "first"),
    ],
)
def test_quoted_text(prompt, text):
    assert quoted_text(prompt) == text


@pytest.mark.parametrize(
    ("word", "target", "score"), [("HELLO", "HELLO", 1.0), ("HELO", "HELLO", 0.8), ("CAT", "DOG", 0.0)]
)
def test_drawn_words(reward, word, target, score):
    assert reward(prompts=[f'the word "{target}"'], images=[word_image(word)]) == [pytest.approx(score)]


@pytest.mark.parametrize(
    ("drawn", "target"), [("HE\nLO", "HE\nLO"), ("DON'T", "DON’T"), ("HELLO", "ＨＥ\u00a0ＬＬＯ"), ("GO...", "GO…")]
)
def test_what_is_drawn_rightly_has_the_full_reward(reward, drawn, target):
    assert reward(prompts=["x"], images=[word_image(drawn, size=(256, 192))], target=[target]) == [1.0]


def test_noise_and_blank_have_no_text(reward):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 256, 3), dtype=np.uint8))
    assert reward(prompts=['"HELLO"'] * 2, images=[noise, Image.new("RGB", (256, 128), "white")]) == [0.0, 0.0]


@pytest.mark.slow
def test_image_modes_read_alike(reward):
    image = word_image("HELLO")
    transparent = Image.new("RGBA", image.size, (0, 0, 0, 0))  # black below what is not there
    transparent.paste(image.convert("RGBA"), mask=image.convert("L").point(lambda x: 255 - x))
    images = [image.convert("L"), image.convert("RGBA"), image.convert("P"), transparent]
    assert reward(prompts=['"HELLO"'] * 4, images=images) == [1.0] * 4


def test_two_lines_are_read_from_top_to_bottom(reward):
    image = word_image("GREEN\nTEA", size=(256, 192))
    assert reward.read(image).replace(" ", "").upper() == "GREENTEA"


@pytest.mark.slow
def test_uncertain_lines_do_not_count(reward):
    image = word_image("HELLO")
    assert reward.read(image) == "HELLO"
    assert OCRReward(min_confidence=1.0, threads=1).read(image) == ""


def test_each_image_has_its_own_target(reward):
    images = [word_image(word) for word in ("HELLO", "GREEN")]
    scores = reward(prompts=["a", "b"], images=images, target=["GREEN", "GREEN"])
    assert scores[1] == 1.0 and scores[0] < 0.5


@pytest.mark.slow
def test_column_before_quotation(reward):
    image = [word_image("HELLO")]
    assert reward(prompts=['"DOG"'], images=image, target=["HELLO"]) == [1.0]
    own = OCRReward(target_column="caption", threads=1)
    assert own(prompts=['"DOG"'], images=image, target=["DOG"], caption=["HELLO"]) == [1.0]
    with pytest.raises(ValueError, match="reads the column 'caption', which the dataset does not have .*target"):
        own(prompts=['"DOG"'], images=image, target=["DOG"])


def test_missing_target(reward):
    images = [word_image("HELLO")] * 2
    with pytest.raises(ValueError, match="row 1 of the batch, 'a sign', has no text .* missing='none'"):
        reward(prompts=['"HELLO"', "a sign"], images=images)
    with pytest.raises(ValueError, match="row 0 .* column 'target' is empty"):
        reward(prompts=['"HELLO"', "a sign"], images=images, target=[None, "HELLO"])
    lenient = OCRReward(missing="none", threads=1)
    assert lenient(prompts=['"HELLO"', "a sign"], images=images) == [1.0, None]


def test_conversation_and_metric(reward):
    logged = {}
    prompt = [{"role": "system", "content": '"DOG"'}, {"role": "user", "content": 'a sign: "HELLO"'}]
    images = [word_image("HELLO")]
    assert reward(prompts=[prompt], images=images, log_metric=logged.__setitem__) == [1.0]
    assert logged == {"OCRReward/failed": 0.0}


def test_broken_image_costs_its_score_and_a_dead_run_stops(caplog):
    reward = OCRReward(threads=1, max_dead_batches=2)
    file = BytesIO()
    word_image("HELLO").save(file, format="PNG")
    broken = Image.open(BytesIO(file.getvalue()[:-200]))  # it fails when its pixels are read
    with caplog.at_level(logging.WARNING):
        assert reward(prompts=['"HELLO"'] * 2, images=[broken, word_image("HELLO")]) == [None, 1.0]
    assert "OCRReward gives no score: OSError" in caplog.text
    assert reward(prompts=['"HELLO"'], images=[broken]) == [None]
    with pytest.raises(DeadRewardError, match="no image in 2 batches.*OSError"):
        reward(prompts=['"HELLO"'], images=[broken])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"missing": "skip"}, "missing='skip': expected 'error' or 'none'"),
        ({"min_confidence": 50}, r"min_confidence=50: expected a number in \[0, 1\]"),
        ({"threads": 0}, "threads=0: expected at least 1"),
    ],
)
def test_wrong_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        OCRReward(**setting)
