"""GenEval's prompts by rule: the official list to the letter, and training prompts that share nothing with it."""

import hashlib
import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from trl_unigrpo.evaluation.benchmarks import geneval_prompts, load_benchmark
from trl_unigrpo.evaluation.benchmarks.geneval_prompts import (
    CLASSES,
    benchmark_rows,
    geneval_dataset,
    meaning,
    training_rows,
)
from trl_unigrpo.rewards import GenEvalReward
from trl_unigrpo.rewards.geneval.rules import Detection, read_row


def article(words):
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def test_the_list_is_the_official_one():
    rows = benchmark_rows()
    text = "\n".join(row["prompt"] for row in rows)
    assert hashlib.sha256(text.encode()).hexdigest().startswith("4de60dfc3c29f9d3")
    counts = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
    assert list(Counter(row["tag"] for row in rows).items()) == list(counts.items())


def test_rows_ask_for_what_their_prompts_say():
    numbers = {"two": 2, "three": 3, "four": 4}
    for row in benchmark_rows():
        read_row(row, CLASSES)
        include, text = row["include"], row["prompt"].removeprefix("a photo of ")
        if row["tag"] == "counting":
            word, _, name = text.partition(" ")
            assert name in (f"{include[0]['class']}s", f"{include[0]['class']}es")
            assert include[0]["count"] == numbers[word]
            assert row["exclude"] == [{"class": include[0]["class"], "count": numbers[word] + 1}]
        elif row["tag"] == "position":
            target, other = include
            relation, index = other["position"]
            assert text == f"{article(other['class'])} {relation} {article(target['class'])}" and index == 0
        else:
            names = [" ".join(filter(None, (item.get("color"), item["class"]))) for item in include]
            assert text == " and ".join(map(article, names))
            assert all(item["count"] == 1 for item in include)
        assert ("exclude" in row) == (row["tag"] == "counting")
        assert list(row)[:2] == ["tag", "include"] and list(row)[-1] == "prompt"


def test_other_random_numbers_are_noticed(monkeypatch):
    monkeypatch.setattr(geneval_prompts, "BENCHMARK_SEED", 44)
    with pytest.raises(RuntimeError, match="4de60dfc3c29f9d3.*numpy"):
        benchmark_rows()


def halves(prompt):
    """A prompt's two objects, and what stands between them."""
    return re.match(r"a photo of (.*?) (and|left of|right of|above|below) (.*)", prompt)


@pytest.mark.parametrize(("seed", "per_task"), [(0, 100), (7, 4000)])
def test_training_prompts_ask_for_nothing_of_the_benchmark(seed, per_task):
    opposite = {"and": "and", "left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    official = {row["prompt"] for row in benchmark_rows()}
    rows = training_rows(seed, per_task)
    prompts = [row["prompt"] for row in rows]
    assert len(prompts) == len(set(prompts)) > 0.6 * min(5 * per_task, 5000)
    assert not official & set(prompts)
    turned = {
        f"a photo of {found[3]} {opposite[found[2]]} {found[1]}"
        for found in map(halves, official)
        if found is not None
    }
    assert len(turned) == 99 + 100 + 100
    assert not turned & set(prompts)
    assert {row["tag"] for row in rows} == {"two_object", "counting", "colors", "position", "color_attr"}


def test_the_meaning_of_a_prompt_is_its_own():
    by_meaning = Counter(meaning(row) for row in benchmark_rows())
    again = [row["prompt"] for row in benchmark_rows() if by_meaning[meaning(row)] > 1]
    assert len(again) <= 6 and all(halves(prompt) for prompt in again)  # a few pairs that the list has both ways


@pytest.mark.parametrize(
    ("arguments", "message"), [((43, 100), "seed=43"), ((-1, 1), "seed=-1"), ((0, 0), "per_task")]
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        training_rows(*arguments)


def test_dataset_feeds_the_reward():
    dataset = geneval_dataset(seed=3, per_task=4)
    assert dataset.column_names == ["prompt", "tag", "geneval"]
    rows = [json.loads(row) for row in dataset["geneval"]]
    assert [row["prompt"] for row in rows] == dataset["prompt"]

    def sees_all(images):
        """Objects that each row asks for, beside each other: right wherever no place is asked for."""
        return [
            [
                Detection(item["class"], 0.95, (30.0 * i, 0, 30.0 * i + 9, 9))
                for item in row["include"]
                for i in range(item["count"])
            ]
            for row in rows
        ]

    reward = GenEvalReward(detector=sees_all, colors=lambda image, found: ["none"] * len(found))
    images = [Image.new("RGB", (8, 8))] * len(rows)
    scores = reward(list(dataset["prompt"]), images=images, geneval=list(dataset["geneval"]))
    by_tag = {
        tag: np.mean([s for s, t in zip(scores, dataset["tag"], strict=True) if t == tag])
        for tag in set(dataset["tag"])
    }
    assert by_tag["two_object"] == by_tag["counting"] == 1
    assert by_tag["colors"] == by_tag["color_attr"] == 0


def test_benchmark_has_questions_and_official_metadata():
    benchmark = load_benchmark("geneval")
    assert len(benchmark.items) == 553 and benchmark.painting.samples == 4
    assert all(item.questions and dict(item.columns)["prompt"] == item.prompt for item in benchmark.items)
