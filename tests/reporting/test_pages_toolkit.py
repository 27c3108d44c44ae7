"""Parts of every page: texts that do no harm, small images, charts that say what the numbers do."""

import base64
import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from trl_unigrpo.reporting.pages import (
    Curve,
    Panel,
    chart,
    data_uri,
    jpeg,
    page_environment,
    prompt_text,
    readable,
    shown_text,
    write_page,
)


class Texts(HTMLParser):
    """The text that a browser would show of a page, and the tags in it."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.text, self.tags = "", []
        self.feed(html)

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)


HOSTILE = "<script>alert('1')</script> & \"quotes\" {{ 7 * 7 }} </span>"


@pytest.mark.parametrize(
    "text",
    [
        HOSTILE,
        "",
        "قطة حمراء على سجادة",
        "紅い猫 🐈‍⬛ und 한국어",
        "a\ttab\nand a line",
        "ﬁ\u0301 \U0001f469‍\U0001f469‍\U0001f467",
    ],
)
def test_texts_are_shown_as_they_are(text):
    shown = Texts(str(shown_text(text)))
    assert shown.text == text
    assert shown.tags == ["span"]


def test_control_characters_become_signs():
    assert readable("a\x00b\x1b[31mc\x7f\r\nd\r\x85") == "a␀b␛[31mc␡\nd␍�"
    half = readable("\ud83d and \u202eturned")
    assert half == "� and ⟨U+202E⟩turned"
    half.encode("utf-8")


def test_long_texts_are_folded_and_cut():
    text = "".join(chr(ord("a") + i % 26) for i in range(10_000))
    shown = Texts(str(shown_text(text, fold=100, limit=3000)))
    assert shown.tags[:2] == ["details", "summary"]
    assert shown.text == text[:100] + "…" + text[:3000] + " … 7,000 more characters"
    assert Texts(str(shown_text(text[:100], fold=100))).tags == ["span"]


def test_the_text_filter_and_plain_values_are_escaped():
    environment = page_environment()
    html = environment.from_string("<p title='{{ value }}'>{{ value }}{{ value | text }}</p>").render(value=HOSTILE)
    shown = Texts(html)
    assert shown.tags == ["p", "span"] and shown.text == 2 * HOSTILE
    with pytest.raises(UndefinedError):
        environment.from_string("{{ missing }}").render()


def test_prompts_are_the_text_or_the_last_turn_of_the_user():
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "make it red"}]},
    ]
    assert prompt_text("a cat") == "a cat"
    assert prompt_text(turns[:3]) == "first"
    assert prompt_text(turns) == "make it red"
    assert prompt_text({"odd": 1}) == '{"odd": 1}'


def noise(size, mode="RGB"):
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], bands), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode)


@pytest.mark.parametrize("size, expected", [((512, 512), (256, 256)), ((1024, 256), (256, 64)), ((24, 40), (24, 40))])
def test_images_are_scaled_down_never_up(size, expected):
    decoded = Image.open(io.BytesIO(jpeg(noise(size))))
    assert decoded.format == "JPEG" and decoded.size == expected


def test_images_keep_their_colours():
    colours = np.array([[[220, 30, 30], [30, 200, 60]], [[40, 60, 220], [240, 230, 40]]], dtype=np.uint8)
    for side in (12, 200):
        image = Image.fromarray(colours.repeat(side, 0).repeat(side, 1))
        decoded = np.asarray(Image.open(io.BytesIO(jpeg(image)))).astype(int)
        quarters = decoded.reshape(2, decoded.shape[0] // 2, 2, -1, 3).mean((1, 3))
        assert np.abs(quarters - colours).max() < 6


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1"])
def test_images_of_every_mode(mode):
    image = noise((20, 20), "RGBA").convert(mode) if mode != "RGBA" else Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    decoded = np.asarray(Image.open(io.BytesIO(jpeg(image))).convert("RGB"))
    if mode == "RGBA":
        assert decoded.min() > 250  # wholly transparent: white


def test_a_data_uri_is_the_image():
    some_image = jpeg(noise((8, 8)))
    head, data = data_uri(some_image).split(",")
    assert head == "data:image/jpeg;base64" and base64.b64decode(data) == some_image


def lines(svg):
    """The curves of a chart, each a list of stretches of points."""
    paths = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--c\d\)', svg)
    stretches = [path.split("M")[1:] for path in paths]
    return [[np.array(s.replace("L", " ").split(), dtype=float).reshape(-1, 2) for s in of] for of in stretches]


def test_a_chart_puts_its_points_where_they_belong():
    svg = chart(Panel("t", [Curve("", [0, 10, 40], [1.0, 3.0, 2.0])]))
    (((a, b, c),),) = lines(svg)
    assert b[0] - a[0] == pytest.approx((c[0] - a[0]) / 4) and a[1] - b[1] == pytest.approx(2 * (a[1] - c[1]))
    assert a[1] > c[1] > b[1]
    places = re.findall(r'<text style="[^"]*text-anchor: end[^"]*" x="[\d.]+" y="([\d.]+)"[^>]*>([\d.]+)<', svg)
    assert len(places) > 2
    below = [float(y) - (a[1] - (float(value) - 1) / 2 * (a[1] - b[1])) for y, value in places]
    assert below == pytest.approx([below[0]] * len(below), abs=0.1)  # labels stand at their values, half a line lower


def test_a_chart_leaves_out_what_is_not_finite():
    svg = chart(Panel("t", [Curve("", range(6), [1.0, 2.0, math.nan, 3.0, 4.0, math.inf])]))
    assert [[len(stretch) for stretch in of] for of in lines(svg)] == [[2, 2]]
    assert chart(Panel("t", [Curve("", [0.0], [math.nan])])) == ""


def test_a_flat_curve_and_a_single_point_are_drawn():
    assert len(lines(chart(Panel("t", [Curve("", [0, 1], [0.0, 0.0])])))) == 1
    assert "<use " in chart(Panel("t", [Curve("", [3], [5.0])]))


def test_the_smooth_line_is_the_moving_mean():
    y = [0.0, 4.0, 2.0, 6.0, 4.0]
    (faint,), (smooth,) = lines(chart(Panel("t", [Curve("", range(5), y, smooth=2)])))
    assert smooth[:, 1] == pytest.approx((faint[1:, 1] + faint[:-1, 1]) / 2)
    assert smooth[:, 0] == pytest.approx(faint[1:, 0])


def test_charts_of_a_page_share_no_names_and_have_its_colours():
    first, second = (chart(Panel("t", [Curve("", [0, 1], [0.0, y])])) for y in (1.0, 2.0))
    used = [set(re.findall(r'(?:url\(|href=")#(\w+)', svg)) for svg in (first, second)]
    assert used[0] and not used[0] & used[1]
    assert "#0000" not in first and "var(--line)" in first and "font-family" not in first


def test_titles_of_charts_are_escaped():
    assert "<script" not in chart(Panel("<script>", [Curve("", [0, 1], [0.0, 1.0])]))


def test_a_page_is_replaced_whole(tmp_path):
    file = tmp_path / "new" / "page.html"
    write_page(file, "one")
    write_page(file, "two")
    assert file.read_text() == "two" and [f.name for f in file.parent.iterdir()] == ["page.html"]
