"""The command: what a user types, what is written, and what it says when something is wrong."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.helpers.judge_server import ChatServer, images_of, text_of, yes
from trl_unigrpo.cli import app
from trl_unigrpo.rewards import read_questions
from trl_unigrpo.sampling.self_reader import SelfReader
from trl_unigrpo.shapeworld import SEEING_BASE, evaluate_model, load_base, shapeworld_edit_dataset


SMALL = [
    "--num-inference-steps",
    "2",
    "--image-size",
    "48",
    "--max-completion-length",
    "6",
    "--device",
    "cpu",
    "--dtype",
    "float32",
]


def invoke(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_shapeworld_from_the_command_line(base, tmp_path):
    result = invoke(
        *("--benchmark", "shapeworld", "--model", "shapeworld", "--num-prompts", 14, "--output-dir", tmp_path),
        *("--greedy", "--device", "cpu"),
    )
    assert result.exit_code == 0, result.output
    expected = evaluate_model(*base, 14, do_sample=False)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["reward"] == float(expected.reward.mean())
    assert summary["metrics"]["strict"]["mean"] == float(expected.strict.mean())
    assert summary["label"] == "ShapeWorld (rule)" and summary["settings"]["model"]["dtype"] == "torch.float32"
    assert "overall" in result.output and "index.html" in result.output
    assert "trl-unigrpo" in summary["versions"]
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") == 14


def test_own_prompts_with_a_judge(tmp_path):
    strange = "<img src=x onerror=alert(1)> \x1b[31m 猫🐈"
    rows = [
        {
            "prompt": strange,
            "questions": ["Is <b>it</b> there?", {"text": "Is it blue?", "expected": "no"}],
            "tag": "<i>",
        },
        {"prompt": "a red circle", "questions": ["Is it red?"], "tag": "b"},
        {"prompt": "no questions here", "questions": None},
    ]
    file = tmp_path / "exam.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n", encoding="utf-8")
    with ChatServer(lambda body, attempt: yes(0.2 if "blue" in text_of(body) else 0.8)) as server:
        result = invoke(
            *("--prompts", file, "--model", "shapeworld", "--samples", 2, "--output-dir", tmp_path / "out", *SMALL),
            *("--judge-model", "tiny judge", "--judge-base-url", server.url),
        )
        assert result.exit_code == 0, result.output
        assert len(server.requests) == 2 * 3
    assert "exam.jsonl, line 3: There are no questions" in result.output and "line 4: no JSON" in result.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["label"] == "exam.jsonl (judge tiny judge)" and summary["reward"] == 1.0
    assert summary["images"] == 4 and summary["prompts"] == 2 and len(summary["problems"]) == 2
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert [question["answer"] for question in lines[0]["questions"]] == pytest.approx([0.8, 0.2])
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page and "&lt;img src=x" in page and "\x1b" not in page
    assert "<b>it" not in page and "<i>" not in page


def test_a_judge_of_whole_prompts_and_a_reward(tmp_path):
    file = tmp_path / "plain.txt"
    file.write_text("a red circle\na blue square\n")
    common = ("--prompts", file, "--model", "shapeworld", "--samples", 1, *SMALL)
    with ChatServer(lambda body, attempt: yes(0.25 if "blue" in text_of(body) else 0.75)) as server:
        judged = invoke(*common, "--output-dir", tmp_path / "a", "--judge-model", "m", "--judge-base-url", server.url)
    rewarded = invoke(*common, "--output-dir", tmp_path / "b", "--rewards", "trl_unigrpo.rewards:sharpness")
    assert (judged.exit_code, rewarded.exit_code) == (0, 0), judged.output + rewarded.output
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["reward"] == pytest.approx(0.5)
    assert (
        json.loads((tmp_path / "b" / "summary.json").read_text())["label"]
        == "plain.txt (rewards trl_unigrpo.rewards:sharpness)"
    )
    both = invoke("--compare", tmp_path / "a", tmp_path / "b", "--output-dir", tmp_path / "c")
    assert both.exit_code == 0 and (tmp_path / "c" / "compare.html").is_file(), both.output


def test_the_evaluated_model_reads_for_its_own_reward(tmp_path):
    file = tmp_path / "plain.txt"
    file.write_text("a red circle\na blue square\n")
    common = ("--prompts", file, "--samples", 1, *SMALL, "--rewards", "trl_unigrpo.rewards:ReadBackReward")
    result = invoke(*common, "--model", SEEING_BASE, "--output-dir", tmp_path / "a")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (tmp_path / "a" / "results.jsonl").read_text().splitlines()]
    model, tokenizer = load_base(seeing=True)
    images = [Image.open(tmp_path / "a" / line["image"]) for line in lines]
    readings = SelfReader(model, tokenizer).read(images, [line["prompt"] for line in lines])
    assert [line["reward"] for line in lines] == pytest.approx([reading.score for reading in readings], abs=1e-5)
    blind = invoke(*common, "--model", "shapeworld", "--output-dir", tmp_path / "b")
    assert blind.exit_code != 0 and "can't read images" in blind.output
    assert not (tmp_path / "b").exists()  # nothing was painted


def test_own_edits_are_scored_by_a_reward_that_asks_the_judge(tmp_path):
    rows = []
    for number, row in enumerate(shapeworld_edit_dataset("test", 3)):
        row["source_image"].save(tmp_path / f"{number}.png")
        rows.append({"prompt": row["prompt"], "source_image": str(tmp_path / f"{number}.png")})
    file = tmp_path / "edits.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "no source"}]))
    common = ["--prompts", file, "--model", SEEING_BASE, "--system-prompt", "", "--samples", 1, *SMALL]
    reward = "trl_unigrpo.rewards:EditReward"
    with ChatServer(lambda body, attempt: yes(0.36 if "Apart from" in text_of(body) else 0.81)) as server:
        judge = ("--judge-model", "m", "--judge-base-url", server.url)
        result = invoke(*common, "--output-dir", tmp_path / "a", "--rewards", reward, *judge)
        asked = len(server.requests)
        without = invoke(*common, "--output-dir", tmp_path / "b", *judge)
    assert (result.exit_code, without.exit_code) == (0, 0), result.output + without.output
    assert "line 4: the source image is an empty list" in result.output
    rewarded, judged = (json.loads((tmp_path / name / "summary.json").read_text()) for name in "ab")
    assert rewarded["reward"] == pytest.approx(0.54) and rewarded["images"] == 3 and asked == 6
    assert rewarded["label"] == f"edits.jsonl (rewards {reward}, judge m)"
    assert rewarded["settings"]["scorer"] == {"rewards": [reward], "judge": "m", "mode": "logprobs"}
    assert judged["reward"] == pytest.approx(0.54)  # sqrt(min(.81, .36) * .81), by GEdit-Bench's questions
    assert len(server.requests) - asked == 9
    assert all(len(images_of(body)) == 2 for _, body in server.requests)
    page = (tmp_path / "a" / "index.html").read_text(encoding="utf-8")
    assert page.count(">source</div>") == 3 and page.count("data:image/jpeg") == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --benchmark or --prompts"),
        (["--benchmark", "coco"], "expected one of geneval"),
        (["--benchmark", "dpg", "--data", "missing.csv"], "missing.csv: no such file"),
        (["--benchmark", "shapeworld"], "There is no model"),
        (["--benchmark", "shapeworld", "--model", "shapeworld", "--guidance-scale", "0.5"], "guidance_scale=0.5"),
        (["--benchmark", "shapeworld", "--model", "/no/such/folder"], "/no/such/folder"),
        (["--prompts", "p.txt", "--model", "no-such-folder"], "p.txt needs a judge (--judge-model"),
        (["--prompts", "p.txt", "--rewards", "nowhere:reward"], "'nowhere:reward' can't be imported"),
        (["--prompts", "p.txt", "--rewards", "a:b", "--detector", "m"], "one of a judge, rewards and a detector"),
        (["--prompts", "p.txt", "--rewards", "trl_unigrpo.rewards:EditReward"], "asks a judge: name one beside it"),
        (
            ["--prompts", "p.txt", "--rewards", "trl_unigrpo.rewards:sharpness", "--judge-model", "m"]
            + ["--judge-base-url", "http://127.0.0.1:9"],
            "No reward among 'trl_unigrpo.rewards:sharpness' asks the judge",
        ),
        (["--prompts", "p.txt", "--judge-model", "m"], "There is no endpoint: pass base_url"),
        (["--compare", "a", "b"], "a holds no results"),
        (["--write-prompts", "x.jsonl", "--seed", "43"], "seed=43"),
    ],
)
def test_mistakes_are_told_before_anything_is_painted(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "p.txt").write_text("a red circle\n")
    result = invoke(*arguments)
    assert result.exit_code == 1 and message in result.output and "Traceback" not in result.output
    assert [file.name for file in tmp_path.iterdir()] == ["p.txt"]


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a red circle\n")
    for module in ("vlm_judge", "client"):
        monkeypatch.delitem(sys.modules, f"trl_unigrpo.rewards.judge.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "openai", None)
    judge = invoke(
        "--prompts", "p.txt", "--model", "x", "--judge-model", "m", "--judge-base-url", "http://localhost/v1"
    )
    assert judge.exit_code == 1 and "trl-unigrpo[judge]" in judge.output
    monkeypatch.setattr("trl_unigrpo.rewards.geneval.geneval_reward.find_spec", lambda name: None)
    detector = invoke("--benchmark", "geneval", "--model", "x")
    assert detector.exit_code == 1 and "trl-unigrpo[eval]" in detector.output


@pytest.mark.slow
def test_ctrl_c_leaves_a_folder_that_goes_on(tmp_path):
    command = [
        sys.executable,
        "-m",
        "trl_unigrpo.cli",
        "eval",
        "--benchmark",
        "shapeworld",
        "--model",
        "shapeworld",
    ]
    command += ["--num-prompts", "700", "--batch-size", "70", "--output-dir", str(tmp_path), "--device", "cpu"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background have it ignored
    )
    results = tmp_path / "results.jsonl"
    while process.poll() is None and not (results.is_file() and results.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "The same command goes on" in errors and "Traceback" not in errors
    written = results.read_text("utf-8").count("\n")
    assert written % 70 == 0 and 70 <= written < 700
    assert not (tmp_path / "summary.json").exists()


def test_training_prompts_are_written(tmp_path):
    result = invoke("--write-prompts", tmp_path / "train" / "geneval.jsonl", "--seed", 5, "--num-prompts", 10)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "train" / "geneval.jsonl").read_text().splitlines()]
    assert 40 < len(rows) <= 50 and {"prompt", "tag", "geneval"} == set(rows[0])
    assert json.loads(rows[0]["geneval"])["prompt"] == rows[0]["prompt"]
    from trl_unigrpo.cli.prompt_files import load_prompts

    assert load_prompts(str(tmp_path / "train" / "geneval.jsonl"), "train")["prompt"] == [
        row["prompt"] for row in rows
    ]


def test_decomposed_prompts_can_be_evaluated(tmp_path):
    """`--prompts` reads the file that `trl-unigrpo decompose` writes."""
    from trl_unigrpo.evaluation.benchmarks import load_benchmark
    from trl_unigrpo.rewards.questions.decompose import decompose_with_progress

    row = {
        "prompt": "a photo of a red dog",
        "tag": "colors",
        "include": [{"class": "dog", "count": 1, "color": "red"}],
    }
    decompose_with_progress([row], tmp_path / "q.jsonl", geneval=True)
    (item,) = load_benchmark("prompts", tmp_path / "q.jsonl").items
    assert item.task == "colors" and len(item.questions) == 2
    assert item.questions == read_questions(json.loads((tmp_path / "q.jsonl").read_text())["questions"])
