"""Figures show the results' numbers, read on white, and come out the same each time."""

import json
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex, to_rgb
from PIL import Image

from tests.helpers.synthetic import CATEGORIES, COLORS, World, write_world
from trl_unigrpo.experiments.paper import figures
from trl_unigrpo.experiments.paper.order import GROUP_SYSTEMS, WITHOUT_THINKING
from trl_unigrpo.experiments.paper.results import collect


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    output = tmp_path_factory.mktemp("figures")
    write_world(output, World(num_prompts=28))
    return output


@pytest.fixture(scope="module")
def results(output):
    return collect(output)


def lines_of(axes, system):
    return [line for line in axes.lines if to_hex(line.get_color()) == figures.color(system)]


def test_table_figure_draws_each_interval(results):
    [axes] = figures.table_figure(results).axes
    found = results["systems"]["unigrpo"]["modes"]["sampled"]["rule"]
    interval, point = lines_of(axes, "unigrpo")
    assert list(interval.get_xdata()) == [found["low"], found["high"]]
    assert list(point.get_xdata()) == [found["mean"]]
    heights = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert heights["unigrpo"] == point.get_ydata()[0] == len(GROUP_SYSTEMS["table1"]) + 3 - 1, "the best on top"
    assert "base, no thinking" in heights and "flow grpo" in heights


def test_curves_are_those_of_the_results(results):
    over_rollouts, over_seconds = figures.curves_figure(results).axes
    for axes, key in ((over_rollouts, "rollouts"), (over_seconds, "cpu_seconds")):
        [line] = lines_of(axes, "unigrpo")
        assert list(line.get_xdata()) == results["curves"]["unigrpo"][key]
        assert list(line.get_ydata()) == results["curves"]["unigrpo"]["reward"]
        dashed = {to_hex(line.get_color()) for line in axes.lines if line.get_linestyle() == "--"}
        assert dashed == {figures.color(name) for name in WITHOUT_THINKING}
        assert len(axes.texts) == len(axes.lines) == len(GROUP_SYSTEMS["table1"]) - 3, (
            "not the base, not the fine-tuned"
        )


def test_guidance_and_regularizer_figures_draw_the_results(results):
    [axes] = figures.guidance_figure(results).axes
    cells = results["figure4"]["cells"]["guidance_on"]
    assert [cells["sampled"]["mean"], cells["guided"]["mean"]] in [list(line.get_ydata()) for line in axes.lines]
    found = results["validation"]["long_none"]
    for axes, name in zip(figures.regularizer_figure(results).axes, ("learned", "rule", "image_error"), strict=True):
        [line] = lines_of(axes, "long_none")
        assert list(line.get_xdata()) == found["rollouts"]
        assert list(line.get_ydata()) == pytest.approx(np.mean(found[name], axis=0))


def test_the_hacking_figure_draws_the_rule_over_the_learned_reward(results):
    [axes] = figures.hacking_figure(results).axes
    found = results["validation"]["long_none"]
    *seeds, mean, end = lines_of(axes, "long_none")
    assert [list(line.get_xdata()) for line in seeds] == found["learned"]
    assert [list(line.get_ydata()) for line in seeds] == found["rule"] and len(seeds) == 5
    expected = [np.mean(found[name], axis=0) for name in ("learned", "rule")]
    assert np.allclose(mean.get_data(), expected) and np.allclose(end.get_data(), [[of[-1]] for of in expected])
    [start] = lines_of(axes, "base")
    assert np.allclose(start.get_data(), [[of[0]] for of in expected])
    assert {text.get_text() for text in axes.texts} == {name.replace("_", " ") for name in GROUP_SYSTEMS["figure5"]}


def test_systems_that_share_a_figure_differ_in_colour():
    methods = {name.removesuffix("_thinking") for name in GROUP_SYSTEMS["table1"]}
    for shown in (methods, {*GROUP_SYSTEMS["figure5"], "base"}, set(GROUP_SYSTEMS["figure4"])):
        colors = np.array([to_rgb(figures.color(name)) for name in shown])
        distances = np.linalg.norm(colors[:, None] - colors[None], axis=-1) + 9 * np.eye(len(colors))
        assert distances.min() > 0.12


def test_svg_is_white_and_the_same_each_time(results):
    with matplotlib.rc_context(figures.STYLE):
        first, second = (figures.svg(figures.table_figure(results)) for _ in range(2))
    assert first == second
    root = ElementTree.fromstring(first)
    background = root.find(".//*[@id='patch_1']/{http://www.w3.org/2000/svg}path")
    assert "fill: #ffffff" in background.get("style")
    assert float(root.get("width").removesuffix("pt")) == pytest.approx(72 * figures.WIDTH)
    assert "Matplotlib" not in first.split("<defs>")[0] and "<dc:date>" not in first


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.01, 0.2))
def test_labels_keep_their_order_and_their_distance(heights, gap):
    placed = figures.spaced(heights, gap)
    order = np.argsort(heights, kind="stable")
    assert (np.diff(np.array(placed)[order]) >= gap - 1e-9).all()
    assert np.mean(placed) == pytest.approx(np.mean(heights), abs=1e-9)
    if len(heights) == 1 or np.diff(np.sort(heights)).min() >= gap:
        assert placed == pytest.approx(heights)


def test_labels_that_fit_stay_and_those_that_collide_move_apart_evenly():
    assert figures.spaced([0.5, 0.5, 0.9], 0.1) == pytest.approx([0.45, 0.55, 0.9])
    assert figures.spaced([0.9, 0.2, 0.2, 0.2], 0.1) == pytest.approx([0.9, 0.1, 0.2, 0.3])


def test_trace_image_is_cut_from_the_strips(output, results):
    trace = results["traces"][2]
    assert trace["prompt"] == "prompt 2" and list(trace["samples"]) == list(COLORS)
    image = np.asarray(figures.trace_image(output, trace, list(COLORS)))
    side, gap = 48 * figures.SCALE, figures.TILE_GAP
    assert image.shape == (side, 4 * side + 3 * gap, 3)
    for i, system in enumerate(COLORS):
        left = i * (side + gap)
        assert (image[:, left : left + side] == np.array(COLORS[system]) + 2).all()
    assert (image[:, side : side + gap] == 255).all()


def test_images_are_enlarged_pixel_by_pixel(output, results, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "strip.png")
    trace = {"samples": {"base": {"strip": "strip.png", "index": 1}}}
    image = np.asarray(figures.trace_image(tmp_path, trace, ["base"]))
    assert (image == pixels[:, 48:].repeat(figures.SCALE, axis=0).repeat(figures.SCALE, axis=1)).all()


def test_a_strip_without_the_image_is_an_error(tmp_path):
    Image.new("RGB", (96, 48)).save(tmp_path / "strip.png")
    with pytest.raises(ValueError, match=r"strip.png is 96 x 48 pixels: it has no image 3"):
        figures.trace_image(tmp_path, {"samples": {"base": {"strip": "strip.png", "index": 2}}}, ["base"])


def test_figures_that_have_nothing_to_show_are_not_drawn(tmp_path):
    write_world(tmp_path, World(num_prompts=14), systems=("base",))
    results = collect(tmp_path)
    drawn = figures.write_figures(results, tmp_path, tmp_path / "figures")
    assert drawn == {"table": "table.svg", "traces": [f"trace-{i + 1:02d}.png" for i in range(len(CATEGORIES))]}
    assert json.loads((tmp_path / "results.json").read_text())["figure4"] is None
