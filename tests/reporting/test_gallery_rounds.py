"""Rounds and edits in the gallery: each image beside what was said of it, what it was worth and what it is made of."""

import re
from itertools import product

import numpy as np
import pytest
from PIL import Image

from tests.helpers.editing import edits, source, tiny_editor
from tests.helpers.rounds import FixedRounds, in_order_of_rows, rounds_trainer
from tests.helpers.stories import TURNS, story_trainer
from tests.helpers.tiny_unified import prompts_dataset
from trl_unigrpo.monitoring.events import Watcher
from trl_unigrpo.monitoring.image_statistics import image_distance
from trl_unigrpo.reporting.pages import page_environment, thinking_and_answer
from trl_unigrpo.reporting.run_files import Records, read_run


class Notes(Watcher):
    def on_generation(self, args, state, control, generation, **kwargs):
        if generation.mode == "train":
            self.rounds = generation.rounds


def colours(row, number):
    """Four random colours, which survive JPEG, for the image of a round."""
    small = np.random.default_rng((row, number)).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((8, 8), Image.Resampling.NEAREST)


class Coloured(FixedRounds):
    """The policy paints, but what is seen of it are images that can be told apart."""

    def _painted(self, trajectories):
        super()._painted(trajectories)
        return [colours(t.row, len(t.rounds) - 1) for t in trajectories]


def nearest(file, images):
    """Number of the image that a JPEG file shows."""
    kept = np.asarray(Image.open(file)).astype(float)
    return int(np.argmin([np.abs(kept - np.asarray(image.resize(kept.shape[1::-1]))).mean() for image in images]))


@pytest.mark.parametrize("group", ["independent", "tree"])
def test_a_trajectory_is_shown_round_by_round(tmp_path, train, group):
    notes, settings = Notes(), {"round_group": group, "num_rounds": 3, "max_steps": 1, "gallery_steps": 1}
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
    evaluation |= {"num_generations_eval": 1, "eval_num_rounds": 2}
    datasets = {"eval_dataset": prompts_dataset(copies=1)}
    trainer = rounds_trainer(tmp_path, Coloured, callbacks=[notes], **settings, **evaluation, **datasets)
    rows = in_order_of_rows(train(trainer).batches)
    painted = [(i, m) for i, (t, _) in enumerate(rows) for m, _ in t.painted()]
    images, place = [colours(i, m) for i, m in painted], {known: number for number, known in enumerate(painted)}
    run = read_run(tmp_path)
    shown, evaluated = (next(s for s in run.shown if s.mode == mode) for mode in ("train", "eval"))
    folder = tmp_path / "gallery"
    for (t, columns), sample in zip(rows, shown.samples, strict=True):
        told = sample.rounds
        assert [part.text for part in told] == trainer._decoded([part.text_ids for part in t.rounds])
        assert [part.reward for part in told] == pytest.approx([part.reward for part in t.rounds])
        paid = columns["round_advantages"].tolist()
        assert [part.advantage for part in told] == pytest.approx(paid[: len(told)])
        assert [part.kept for part in told] == [part.stopped for part in t.rounds]
        assert [part.image is None for part in told] == [part.stopped for part in t.rounds]
        assert [nearest(folder / p.image, images) for p in told if p.image] == [
            place[t.row, m] for m, _ in t.painted()
        ]
        assert sample.image == [p.image for p in told if p.image][-1] and sample.sources == ()
    stands = {}  # the image after each round, by its number
    for m, (i, sample) in product(range(3), enumerate(shown.samples)):
        if m == len(sample.rounds):
            continue
        part, change = sample.rounds[m], notes.rounds[i][m].change
        begun = stands.get((i if part.origin is None else part.origin, m - 1))
        assert (part.begun is None) == (part.origin is None)
        if part.begun is not None:
            assert part.origin != i and part.origin // 4 == i // 4
            assert nearest(folder / part.begun, images) == begun
        stands[i, m] = place.get((i, m), begun)
        if m == 0 or part.kept:
            assert change is None
        else:
            assert change == pytest.approx(image_distance(images[stands[i, m]], images[begun]))
    origins = {(i // 4, m, part.origin) for i, s in enumerate(shown.samples) for m, part in enumerate(s.rounds)}
    assert len([origin for *_, origin in origins if origin is not None]) == (4 if group == "tree" else 0)
    assert all(len(sample.rounds) == 2 and sample.rounds[0].image for sample in evaluated.samples)
    html = (tmp_path / "gallery.html").read_text()
    figures = re.findall(r"<figure.*?</figure>", html, re.DOTALL)
    of_rounds = [figure for figure in figures if "round " in figure]
    told = [part for sample in [*shown.samples, *evaluated.samples] for part in sample.rounds]
    assert len(of_rounds) == len(told)
    assert sum("<b>kept</b>" in figure for figure in of_rounds) == sum(part.kept for part in told)
    assert ("goes on from #" in html) == (group == "tree")
    assert "Reward by round" in html


def test_a_story_shows_each_turn_beside_what_was_made_of_it(tmp_path):
    trainer = story_trainer(tmp_path, max_steps=1, gallery_steps=1)
    trainer.train()
    (shown,) = read_run(tmp_path).shown
    assert len(shown.samples) == 12
    for sample in shown.samples:
        assert [part.asked for part in sample.rounds] == TURNS[sample.prompt]
        assert len(sample.sources) == 1 and all(part.image for part in sample.rounds)
    html = (tmp_path / "gallery.html").read_text()
    for turns in TURNS.values():
        assert all(html.count(f'“<span class="text" dir="auto">{turn}</span>”') >= 4 for turn in turns)
    assert html.count('<figcaption class="soft">source') == 12


@pytest.mark.parametrize("column", ["source_image", "source_images"])
def test_edits_lie_beside_their_sources(make_trainer, tmp_path, column):
    notes = Notes()
    trainer = make_trainer(
        model=tiny_editor(), train_dataset=edits(column=column), max_steps=1, gallery_steps=1, callbacks=[notes]
    )
    trainer.train()
    (shown,) = read_run(tmp_path).shown
    for start in (0, 4):
        group = shown.samples[start : start + 4]
        number = edits()["prompt"].index(group[0].prompt)
        expected = [source(number), source(number + 10)][: 1 + number % 2 if column == "source_images" else 1]
        assert {tuple(sample.sources) for sample in group} == {tuple(group[0].sources)}
        files = [tmp_path / "gallery" / name for name in group[0].sources]
        assert len(files) == len(expected)
        for file, image in zip(files, expected, strict=True):
            assert Image.open(file).size == image.size
            assert nearest(file, [image, source(50)]) == 0
        for sample, (note,) in zip(group, notes.rounds[start : start + 4], strict=True):
            assert sample.rounds == [] and note.reward == pytest.approx(sample.reward)
            assert (note.change is None) == (len(expected) > 1)
            assert note.change is None or note.change > 0.01
    html = (tmp_path / "gallery.html").read_text()
    assert html.count("data:image/jpeg") == 8 + sum(len(set(s.sources)) for s in shown.samples[::4])


def test_runs_without_rounds_or_sources_are_written_as_ever(make_trainer, tmp_path):
    make_trainer(max_steps=1, gallery_steps=1).train()
    (line,) = [x for x in (tmp_path / "gallery/records.jsonl").read_text().splitlines() if '"shown"' in x]
    assert "sources" not in line and "rounds" not in line and "begun" not in line
    html = (tmp_path / "gallery.html").read_text()
    assert "Of each round" not in html and "Reward by round" not in html and "<figure>" in html


def test_a_line_with_rounds_that_are_none_is_named(tmp_path):
    records = Records(tmp_path, "a")
    sample = {"index": 0, "prompt": "p", "thinking": "", "reward": 1.0, "advantage": 0.0, "rewards": {}, "extra": {}}
    values = {"mode": "train", "dataset": "", "group_size": 1, "total": 1, "side": 8}
    records.add("shown", 0, samples=[{**sample, "rounds": [{"words": "none"}]}], **values)
    records.add("shown", 1, samples=[sample], **values)
    run = read_run(tmp_path)
    assert [shown.step for shown in run.shown] == [1] and "words" in run.problems[0]


def row_of(rounds, sources=0):
    template = page_environment().from_string(
        '{% from "rounds.html.jinja" import rounds_row %}{{ rounds_row(rounds, sources, "a <b>cat</b>", tiny=true) }}'
    )
    return re.findall(r"<figure.*?</figure>", template.render(rounds=rounds, sources=["data:0"][:sources]), re.DOTALL)


def test_a_row_can_be_made_of_plain_data():
    first = {"text": "<think> a cat </think>", "image": "data:1", "reward": 0.25, "credit": 1.5, "kept": False}
    second = {**first, "text": "<think> it is green </think> paint it red", "image": "data:2", "credit": -0.5}
    last = {**first, "text": "<think> fine </think> keep", "image": None, "reward": None, "credit": None, "kept": True}
    figures = row_of([first, second, last])
    assert [re.search('src="(.*?)"', figure)[1] for figure in figures] == ["data:1", "data:2", "data:2"]
    assert ["kept" in figure.split(">")[0] for figure in figures] == [False, False, True]
    assert "&lt;think&gt; a cat &lt;/think&gt;" in figures[0]  # the first text as it is
    assert 'class="good">+1.50' in figures[0] and 'class="bad">-0.50' in figures[1]
    assert re.findall('dir="auto">(.*?)</span>', figures[1]) == ["it is green", "paint it red"]
    assert "none" in figures[2] and "+0" not in figures[2] and "<b>kept</b>" in figures[2]
    assert all("a &lt;b&gt;cat&lt;/b&gt;" in figure for figure in figures)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think> left is red </think> left blue", ("left is red", "left blue")),
        ("left is red </think> left blue", ("left is red", "left blue")),
        ("<think> a </think> b </think> c", ("a </think> b", "c")),
        ("keep", ("", "keep")),
        ("<think> cut off", ("", "<think> cut off")),
        ("", ("", "")),
    ],
)
def test_a_text_is_its_thinking_and_its_answer(text, parts):
    assert thinking_and_answer(text) == parts
