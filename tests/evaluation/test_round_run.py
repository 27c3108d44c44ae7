"""`trl-unigrpo eval --rounds`: rounds beside images painted alone, scored alike."""

import json
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from trl_unigrpo.cli import app
from trl_unigrpo.monitoring.image_statistics import image_distance
from trl_unigrpo.shapeworld import REFLECTION_TEMPLATE, SEEING_BASE, shapeworld_dataset, shapeworld_reward


ROUNDS = 3


def invoke(folder, *arguments):
    prompts = folder.with_suffix(".txt")
    prompts.write_text("\n".join(shapeworld_dataset("test", 6)["prompt"]))
    common = ["--prompts", prompts, "--model", SEEING_BASE, "--output-dir", folder, "--samples", 1]
    common += ["--rewards", "trl_unigrpo.shapeworld:shapeworld_reward", "--device", "cpu", "--system-prompt", ""]
    common += ["--num-inference-steps", 10, "--image-size", 48, "--max-completion-length", 40, "--batch-size", 6]
    common += ["--rounds", ROUNDS, "--reflection-template", REFLECTION_TEMPLATE, "--max-reflection-length", 40]
    return CliRunner().invoke(app, ["eval", *map(str, [*common, *arguments])])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval") / "out"
    result = invoke(folder)
    assert result.exit_code == 0, result.output
    assert "best_of_alone" not in result.output and "difference" in result.output and "rounds.html" in result.output
    return folder


def lines_of(folder, name):
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").split("\n")[:-1]]


def read(file):
    with Image.open(file) as image:
        return image.convert("RGB")


def test_each_new_image_has_the_score_of_the_image_itself(folder):
    rows, changed = lines_of(folder, "rounds.jsonl"), []
    assert len(rows) == 6
    for row in rows:
        images = [read(folder / name) for name in row["images"]]
        scores = shapeworld_reward([row["prompt"]] * len(images), [""] * len(images), images)
        kept = [scores[-1]] if row["kept"] else []
        assert row["rewards"] == pytest.approx([*scores, *kept])
        assert len(row["texts"]) == len(row["rewards"]) <= ROUNDS
        changed += [image_distance(*pair) for pair in pairwise(images)]
    report = json.loads((folder / "rounds.json").read_text())
    assert report["images"] == sum(len(row["images"]) for row in rows) / 6
    stands = np.array([row["rewards"] + row["rewards"][-1:] * (ROUNDS - len(row["rewards"])) for row in rows])
    assert [row["reward"]["mean"] for row in report["rounds"][1:]] == pytest.approx(stands.mean(0).tolist())
    assert report["last"]["mean"] == pytest.approx(stands[:, -1].mean())
    assert report["best_of_rounds"]["mean"] == pytest.approx(stands.max(1).mean())
    unchanged = [row["unchanged"] for row in report["rounds"][2:]]
    assert sum(np.array(changed) < 5 / 255) == pytest.approx(
        sum(
            share * sum(len(row["images"]) > number for row in rows)
            for number, share in enumerate(unchanged, start=1)
            if share is not None
        )
    )


def test_as_many_images_are_painted_alone_from_the_same_first_one(folder):
    alone = lines_of(folder, "results.jsonl")
    assert len(alone) == 6 * ROUNDS
    by_prompt = np.array([[line["reward"] for line in alone if line["index"] == place] for place in range(6)])
    report = json.loads((folder / "rounds.json").read_text())
    assert report["alone"] == ROUNDS and min(report["seconds"].values()) > 0
    assert report["single"]["mean"] == pytest.approx(by_prompt.mean())
    assert report["best_of_alone"]["mean"] == pytest.approx(by_prompt.max(1).mean())
    for row in lines_of(folder, "rounds.jsonl"):
        first = read(folder / f"images/{row['index']:05}/samples/0000.png")
        assert np.array_equal(np.asarray(first), np.asarray(read(folder / row["images"][0])))


def test_the_page_shows_each_round(folder):
    page = (folder / "rounds.html").read_text(encoding="utf-8")
    rows = lines_of(folder, "rounds.jsonl")
    assert page.count("data:image/jpeg") == sum(len(row["texts"]) for row in rows)
    assert page.count("<b>kept</b>") == sum(row["kept"] for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-score"], "rounds=3: nothing scores the images"),
        (["--no-thinking"], "rounds=3 without thinking"),
        (["--reflection-template", "{image}"], "reflection_template='{image}' has {image}"),
        (["--model", "shapeworld"], "beyond the vocabulary"),
    ],
)
def test_rounds_that_can_t_be_are_refused_before_anything_is_painted(tmp_path, arguments, message):
    result = invoke(tmp_path / "out", *arguments)
    assert result.exit_code == 1 and message in result.output and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()
