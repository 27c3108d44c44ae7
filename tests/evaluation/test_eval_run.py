"""Painting and scoring into a folder: the same numbers as everywhere else, whatever interrupts it."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.helpers.editing import PAINTED, SIZES, source, tiny_editor
from tests.helpers.judge_server import ChatServer, Reply, images_of, text_of, yes
from tests.helpers.tiny_unified import PROMPTS, tiny_tokenizer
from trl_unigrpo.evaluation import runner
from trl_unigrpo.evaluation.benchmark import Item, Painting, evenly_spread
from trl_unigrpo.evaluation.benchmarks import load_benchmark
from trl_unigrpo.evaluation.compare import compare_folders
from trl_unigrpo.evaluation.page import write_comparison
from trl_unigrpo.evaluation.results import DifferentSettingsError, read_lines, source_files
from trl_unigrpo.evaluation.runner import Options, run, without_unfit_prompts
from trl_unigrpo.evaluation.scorers import (
    JudgeScorer,
    RewardScorer,
    ShapeWorldScorer,
    detector_scorer,
)
from trl_unigrpo.evaluation.summary import summarize
from trl_unigrpo.flow.guidance import Guidance
from trl_unigrpo.rewards import VLMJudge
from trl_unigrpo.rewards.common import DeadRewardError
from trl_unigrpo.rewards.geneval.rules import Detection
from trl_unigrpo.shapeworld import evaluate_model


def redness(prompts, completions, images, **columns):
    return [float(np.asarray(image)[..., 0].mean() / 255) for image in images]


def red():
    return RewardScorer({"redness": redness})


def files_of(folder):
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def without_times(lines):
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def judge(server, **options):
    return VLMJudge("m", base_url=server.url, max_retries=0, timeout=20, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": False}, {"thinking": False, "guidance": Guidance(guidance_scale=2.0)}],
    ids=["sampled", "greedy", "guided, without thinking"],
)
def test_shapeworld_gives_the_demos_numbers(base, tmp_path, options):
    """Two whole batches and a part of one: the same images as all at once, to the bit."""
    model, tokenizer = base
    expected = evaluate_model(model, tokenizer, 17, seed=5, batch_size=7, **options)
    benchmark = load_benchmark("shapeworld", num_prompts=17, seed=5)
    chosen = Options(replace(benchmark.painting, batch_size=7), **options)
    lines = run(model, tokenizer, benchmark, ShapeWorldScorer(), tmp_path / "out", chosen)
    assert [line["prompt"] for line in lines] == expected.prompts
    assert [line["tag"] for line in lines] == expected.categories
    assert [line["thinking"] for line in lines] == expected.thinking
    assert [line["reward"] for line in lines] == expected.reward.tolist()
    for name, values in {"strict": expected.strict, "plan": expected.plan, "image_error": expected.error}.items():
        assert [line["scores"][name] for line in lines] == values.tolist()
    for line, image in zip(lines, expected.images, strict=True):
        with Image.open(tmp_path / "out" / line["image"]) as kept:
            assert np.array_equal(np.asarray(kept), np.asarray(image))


def test_defaults_are_the_demos():
    painting = load_benchmark("shapeworld").painting
    assert painting == Painting(1, 10, 48, 24, 210, 1234)
    assert len(load_benchmark("shapeworld").items) == 1050


@pytest.mark.parametrize("cut", [0.0, 0.3, 0.6, 0.99])
def test_a_killed_run_goes_on_to_the_same_results(base, asked, tmp_path, cut):
    """The file is cut where a kill may leave it, in the middle of a line and of a batch of three."""
    chosen = Options(replace(asked.painting, samples=2))
    whole = run(*base, asked, red(), tmp_path / "whole", chosen)
    assert [(line["row"], line["index"], line["sample"]) for line in whole[3:5]] == [(3, 3, 0), (4, 0, 1)]
    run(*base, asked, red(), tmp_path / "killed", chosen)
    file = tmp_path / "killed" / "results.jsonl"
    written = file.read_bytes()
    file.write_bytes(written[: int(len(written) * cut)])
    seen = []
    again = run(*base, asked, red(), tmp_path / "killed", chosen, on_images=lambda *counts: seen.append(counts))
    assert without_times(again) == without_times(whole) == without_times(read_lines(tmp_path / "killed"))
    assert seen[0] == (written[: int(len(written) * cut)].count(b"\n"), 8) and seen[-1] == (8, 8)
    for line in whole:
        one, other = (np.asarray(Image.open(tmp_path / name / line["image"])) for name in ("whole", "killed"))
        assert np.array_equal(one, other)


def test_a_finished_folder_paints_nothing(base, asked, tmp_path, monkeypatch):
    first = run(*base, asked, red(), tmp_path)
    monkeypatch.setattr(runner, "generate", lambda *args, **kwargs: pytest.fail("painted again"))
    assert run(*base, asked, red(), tmp_path) == first


def test_a_lost_image_is_painted_again(base, asked, tmp_path):
    first = run(*base, asked, red(), tmp_path)
    lost = tmp_path / first[2]["image"]
    pixels = np.asarray(Image.open(lost))
    lost.unlink()
    assert without_times(run(*base, asked, red(), tmp_path)) == without_times(first)
    assert np.array_equal(np.asarray(Image.open(lost)), pixels)


def test_more_samples_leave_the_first_as_they_are(base, asked, tmp_path):
    one = run(*base, asked, red(), tmp_path / "one", Options(replace(asked.painting, batch_size=2)))
    two = run(*base, asked, red(), tmp_path / "two", Options(replace(asked.painting, batch_size=2, samples=2)))
    assert without_times(two[:4]) == without_times(one)
    some_images = {line["image"]: line["reward"] for line in two}
    assert len(some_images) == 8 and len(set(some_images.values())) > 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"do_sample": False}}, "painting.do_sample: true there, false now"),
        ({"painting": {"num_inference_steps": 3}}, "painting.num_inference_steps: 2 there, 3 now"),
        ({"options": {"guidance": Guidance(2.0)}}, "painting.guidance: null there"),
        ({"fingerprint": {"weights": "b"}}, 'model.weights: "a" there, "b" now'),
        ({"items": 3}, "benchmark.prompts: 4 there, 3 now"),
        ({"scorer": RewardScorer({"other": redness})}, "scorer.rewards"),
    ],
)
def test_other_settings_are_refused(base, asked, tmp_path, changes, message):
    run(*base, asked, red(), tmp_path, fingerprint={"weights": "a"})
    before = files_of(tmp_path)
    benchmark = replace(asked, items=asked.items[: changes.get("items", 4)])
    options = Options(replace(asked.painting, **changes.get("painting", {})), **changes.get("options", {}))
    with pytest.raises(DifferentSettingsError, match=re.escape(message)):
        run(
            *base,
            benchmark,
            changes.get("scorer", red()),
            tmp_path,
            options,
            changes.get("fingerprint", {"weights": "a"}),
        )
    assert files_of(tmp_path) == before


def test_a_foreign_folder_is_left_alone(base, asked, tmp_path):
    (tmp_path / "results.jsonl").write_text("my notes\n")
    with pytest.raises(ValueError, match=r"has results\.jsonl but no settings\.json"):
        run(*base, asked, red(), tmp_path)
    assert (tmp_path / "results.jsonl").read_text() == "my notes\n"


def answers(body, attempt):
    """Sure of a yes for even places; silent on one question; every "empty" is a no."""
    text = text_of(body)
    if "in 2?" in text:
        return Reply({"error": {"message": "overloaded"}}, status=500)
    return yes(0.1) if "empty" in text else yes(0.9 if "in 0?" in text else 0.2)


def test_failed_answers_are_masked_and_asked_again(base, asked, tmp_path, monkeypatch):
    with ChatServer(answers) as server:
        lines = run(*base, asked, JudgeScorer(judge(server), asked.metric, "m"), tmp_path)
    assert [line["reward"] for line in lines] == [1.0, 0.5, None, 0.5]
    assert lines[2]["scores"] == {"accuracy": None} and "500" in lines[2]["error"]
    assert [question["answer"] for question in lines[2]["questions"]] == [None, pytest.approx(0.1)]
    assert [question["earned"] for question in lines[1]["questions"]] == [0.0, 1.0]
    settings = json.loads((tmp_path / "settings.json").read_text())
    found = summarize(settings, lines)
    assert found["reward"] == pytest.approx(2 / 3)  # over what was scored: not 1/2
    assert (found["unscored"], found["unscored_share"], found["unanswered_share"]) == (1, 0.25, 1 / 8)
    assert found["metrics"]["accuracy"]["tasks"]["circles"]["mean"] == 1.0
    assert found["questions"]["empty"]["mean"] == 1 and found["questions"]["shape"]["mean"] == pytest.approx(1 / 3)
    assert settings["scorer"] == {"judge": "m"} and server.url not in json.dumps(settings)

    # The same command later: images stay, the judge is asked about the one alone.
    monkeypatch.setattr(runner, "generate", lambda *args, **kwargs: pytest.fail("painted again"))
    with ChatServer(lambda body, attempt: yes(0.1)) as server:
        again = run(*base, asked, JudgeScorer(judge(server), asked.metric, "m"), tmp_path)
        assert len(server.requests) == 2
    assert [line["reward"] for line in again] == [1.0, 0.5, 0.5, 0.5]
    assert again == read_lines(tmp_path)


def test_a_dead_judge_stops_the_run_and_keeps_the_images(base, asked, tmp_path):
    benchmark = replace(asked, painting=replace(asked.painting, batch_size=1, samples=2))
    with ChatServer(lambda body, attempt: Reply(b"", status=503)) as server:
        scorer = JudgeScorer(judge(server), asked.metric, "m")
        with pytest.raises(DeadRewardError, match="The judge m scored no image in 3 batches"):
            run(*base, benchmark, scorer, tmp_path)
    kept = read_lines(tmp_path)
    assert [line["reward"] for line in kept] == [None] * len(kept) and len(kept) == 3


def test_painting_first_and_scoring_later(base, asked, tmp_path, monkeypatch):
    at_once = run(*base, asked, red(), tmp_path / "once")
    painted = run(*base, asked, None, tmp_path / "later")
    assert [line["reward"] for line in painted] == [None] * 4
    assert summarize(json.loads((tmp_path / "later" / "settings.json").read_text()), painted)["reward"] is None
    monkeypatch.setattr(runner, "generate", lambda *args, **kwargs: pytest.fail("painted again"))
    assert without_times(run(*base, asked, red(), tmp_path / "later")) == without_times(at_once)
    with pytest.raises(DifferentSettingsError, match="scorer"):
        run(*base, asked, None, tmp_path / "later")


def test_the_folder_is_what_genevals_scorer_reads(base, tmp_path):
    """Walked as its evaluate_images.py walks: folders named by digits, `metadata.jsonl` as one object, `\\d+.png`."""
    whole = load_benchmark("geneval")
    benchmark = replace(whole, items=evenly_spread(whole.items, 6), painting=Painting(2, 2, 48, 4, 6))

    def detector(images):
        """A bench and a cow in every image, the bench left."""
        return [[Detection("bench", 0.99, (0, 0, 9, 9)), Detection("cow", 0.99, (30, 0, 39, 9))] for _ in images]

    scorer = detector_scorer(detector, lambda image, found: ["red"] * len(found), "d")
    lines = run(*base, benchmark, scorer, tmp_path)
    seen = []
    for folder in sorted((tmp_path / "images").iterdir()):
        assert folder.is_dir() and folder.name.isdigit()
        with open(folder / "metadata.jsonl") as file:
            metadata = json.load(file)
        names = [file.name for file in sorted((folder / "samples").iterdir())]
        assert names == ["0000.png", "0001.png"] and all(re.match(r"\d+\.png", name) for name in names)
        assert metadata == json.loads(json.dumps(benchmark.items[len(seen)].columns))
        seen.append(metadata)
    assert [row["tag"] for row in seen] == list(dict.fromkeys(row["tag"] for row in whole_rows(whole)))
    for line, item in zip(lines, benchmark.items * 2, strict=True):
        wanted = [clause["class"] for clause in item.columns["include"]]
        assert line["reward"] == float(item.task == "single_object" and wanted[0] in ("bench", "cow"))


def whole_rows(benchmark):
    return [item.columns for item in benchmark.items]


def test_geneval_is_the_mean_of_six_tasks():
    """Tasks of different sizes: the mean of all images would be another number."""
    settings = {"benchmark": {"title": "GenEval", "overall": "tasks", "pooled": False}}
    shape = {"single_object": (3, 3), "two_object": (4, 1), "counting": (2, 0), "colors": (5, 5), "position": (2, 1)}
    lines = [
        line_of(f"{task} {i}", task, float(i < right)) for task, (n, right) in shape.items() for i in range(n)
    ] + [line_of("x", "color_attr", 1.0), line_of("y", "color_attr", 0.0)]
    found = summarize(settings, lines)
    assert found["reward"] == pytest.approx((1 + 1 / 4 + 0 + 1 + 1 / 2 + 1 / 2) / 6)
    # Variances of the means, n - 1 in the denominator: only three tasks vary.
    variance = (3 / 16 / 3 + 1 / 4 / 1 + 1 / 4 / 1) / 36
    assert found["ci95"][1] - found["reward"] == pytest.approx(1.959964 * variance**0.5)


def line_of(key, task, reward, questions=(), cluster=None, index=None):
    return {
        "index": key if index is None else index,
        "tag": task,
        "cluster": cluster or key,
        "reward": reward,
        "scores": {"correct": reward},
        "questions": list(questions),
        "seconds": 1.0,
    }


def test_wise_weighs_categories_and_needs_them_all():
    shares = {"culture": 0.4, "time": 0.12, "space": 0.12, "biology": 0.12, "physics": 0.12, "chemistry": 0.12}
    settings = {"benchmark": {"title": "WISE", "overall": shares, "pooled": False}}
    means = {"culture": 0.5, "time": 1.0, "space": 0.0, "biology": 0.5, "physics": 1.0, "chemistry": 0.5}
    lines = [line_of(f"{t}{i}", t, float(i < 2 * mean)) for t, mean in means.items() for i in range(2)]
    assert summarize(settings, lines)["reward"] == pytest.approx(0.4 * 0.5 + 0.12 * (1 + 0 + 0.5 + 1 + 0.5))
    left = summarize(settings, [line for line in lines if line["tag"] != "space"])
    assert left["reward"] is None and left["metrics"]["correct"]["tasks"]["time"]["mean"] == 1.0


def test_tiif_pools_questions_within_a_task():
    settings = {"benchmark": {"title": "TIIF", "overall": "tasks", "pooled": True}}

    def answered(right, number):
        return [{"answer": 1.0, "earned": float(i < right), "group": "g"} for i in range(number)]

    lines = [
        line_of("a", "color/short", 1.0, answered(1, 1), "r1"),
        line_of("b", "color/short", 1 / 3, answered(1, 3), "r2"),
        line_of("c", "color/long", 0.0, answered(0, 1), "r1"),
        line_of("d", "color/long", 1.0, answered(3, 3), "r2"),
    ]
    found = summarize(settings, lines)
    tasks = found["metrics"]["correct"]["tasks"]
    assert tasks["color/short"]["mean"] == pytest.approx(2 / 4) and tasks["color/long"]["mean"] == pytest.approx(3 / 4)
    assert found["reward"] == pytest.approx((2 / 4 + 3 / 4) / 2)


STRANGE = [
    "<script>alert(1)</script> & \"quotes\" 'too'",
    "\x00\x07\x1b[31mred\x1b[0m\t\r\n",
    "日本の猫 🐈‍⬛ العربية \u202e\u2028",
    "🐈" * 10_001,
]


def test_strange_prompts_are_painted_and_kept_as_they_are(base, asked, tmp_path):
    items = tuple(Item(f"line {i}", prompt, "all", columns={"prompt": prompt}) for i, prompt in enumerate(STRANGE))
    lines = run(*base, replace(asked, items=items, metric=None), red(), tmp_path)
    assert [line["prompt"] for line in lines] == [line["prompt"] for line in read_lines(tmp_path)] == STRANGE
    assert all(0 <= line["reward"] <= 1 for line in lines)
    kept = [json.loads((tmp_path / f"images/{i:05}/metadata.jsonl").read_text())["prompt"] for i in range(4)]
    assert kept == STRANGE


def test_a_prompt_without_room_is_left_out_before_painting(base, asked, tmp_path):
    """The longest prompts that fit are painted; a word more, and they are named."""
    model, tokenizer = base

    def words(number):
        return Item(f"{number} words", " ".join(["red"] * number), "all")

    def left(options):
        benchmark = replace(asked, items=tuple(map(words, range(980, 1030))), metric=None)
        fits = without_unfit_prompts(benchmark, model, tokenizer, options)
        assert len(fits.items) + len(fits.problems) == 50 and len(fits.problems) > 0
        assert f"{len(fits.items) + 980} words: the prompt takes" in fits.problems[0]
        longest = replace(benchmark, items=fits.items[-1:])
        run(model, tokenizer, longest, red(), tmp_path / str(len(fits.items)), options)
        return len(fits.items)

    short = replace(asked.painting, max_completion_length=4)
    long = replace(asked.painting, max_completion_length=9)
    counts = [left(Options(short)), left(Options(long)), left(Options(long, thinking=False))]
    assert counts[0] - counts[1] == 5 and counts[2] > counts[0]
    assert without_unfit_prompts(asked, model, tokenizer, Options(asked.painting)) is asked


def test_a_prompt_with_a_special_token_is_left_out_before_painting(base, asked):
    items = [Item(f"line {i}", prompt, "all") for i, prompt in enumerate(["red", "<|im_end|>", "a <|vision_start|>"])]
    fits = without_unfit_prompts(replace(asked, items=tuple(items)), *base, Options(asked.painting))
    assert [item.key for item in fits.items] == ["line 0"]
    assert [problem.partition(" holds")[0] for problem in fits.problems] == ["line 1: A prompt", "line 2: A prompt"]


def test_an_image_that_is_not_a_number_has_no_score_and_is_not_scored_again(base, asked, tmp_path, monkeypatch):
    vae = base[0].codec.vae
    whole, scorer = vae.decode, red()

    def decode(latents, *args, **kwargs):
        out = whole(latents, *args, **kwargs)
        out.sample[::2] = float("nan")
        return out

    monkeypatch.setattr(vae, "decode", decode)
    first = run(*base, replace(asked, metric=None), scorer, tmp_path)
    again = run(*base, replace(asked, metric=None), scorer, tmp_path)
    for lines in (first, again):
        failed = [line["error"] for line in lines if line["reward"] is None]
        assert failed == ["the image came out of the VAE as NaN or infinity"] * len(failed)
        assert 0 < len(failed) < len(lines)


def test_bad_options_are_refused_by_name(asked):
    with pytest.raises(ValueError, match="batch_size=0"):
        Options(replace(asked.painting, batch_size=0))


def test_several_rewards_are_added_up_and_a_missing_one_masks(asked):
    """As in a training; the columns of the rows reach the rewards, awaited or not."""
    items = [replace(item, columns={"prompt": item.prompt, "size": 2.0 * i}) for i, item in enumerate(asked.items)]

    async def from_column(prompts, completions, images, size, **columns):
        return [None if value == 4 else value for value in size]

    def from_text(prompts, completions, images, **columns):
        from_text.last_error = "seen"
        return [
            float("nan") if "blue" in prompt else len(text) for prompt, text in zip(prompts, completions, strict=True)
        ]

    scorer = RewardScorer({"column": from_column, "text": from_text})
    found = scorer(items, [Image.new("RGB", (4, 4))] * 4, ["", "a", "bb", "ccc"])
    assert [score.reward for score in found] == [0.0, None, None, 9.0]
    assert found[3].scores == {"reward": 9.0, "column": 6.0, "text": 3.0}
    assert found[2].error == "column: no score" and found[1].error == "text: seen"


def test_edits_are_painted_from_their_sources_and_judged_beside_them(tmp_path):
    rows = {
        str(place): {"id": f"{place}.png", "prompt": prompt, "edit_type": "adjust"}
        for place, prompt in enumerate(PROMPTS)
    }
    for place in range(4):
        source(place).save(tmp_path / f"{place}.png")
    (tmp_path / "basic_edit.json").write_text(json.dumps(rows))
    benchmark = load_benchmark("imgedit", tmp_path)
    painting = Painting(num_inference_steps=2, image_size=8, max_completion_length=3, batch_size=3)

    def begin(folder, scorer, benchmark=benchmark):
        return run(tiny_editor(), tiny_tokenizer(), benchmark, scorer, tmp_path / folder, Options(painting))

    with ChatServer(lambda body, _: yes(0.25 if "everything" in text_of(body) else 1)) as server:
        lines = begin("judged", JudgeScorer(judge(server), benchmark.metric, "m"))
    assert [line["reward"] for line in lines] == pytest.approx([0.75] * 4)
    assert len(server.requests) == 12
    for place, line in enumerate(lines):
        with Image.open(tmp_path / "judged" / line["image"]) as image:
            assert image.size[::-1] == PAINTED[place]
            with Image.open(tmp_path / "judged" / "official" / f"{place}.png") as official:
                assert image.tobytes() == official.tobytes()
        seen = [images_of(body) for _, body in server.requests if PROMPTS[place] in text_of(body)]
        assert {tuple(shown.size[::-1] for shown in pair) for pair in seen} <= {(SIZES[place], PAINTED[place])}
    for place in range(4):
        (copy,) = source_files(tmp_path / "judged", place)
        with Image.open(copy) as image:
            assert image.size[::-1] == SIZES[place]
    given = []

    def reward(prompts, completions, images, source_images, **columns):
        given.extend(source_images)
        return redness(prompts, completions, images)

    begin("rewarded", RewardScorer({"redness": reward}))
    assert [image.size[::-1] for (image,) in given] == list(SIZES)
    report = compare_folders(*(tmp_path / name for name in ("judged", "rewarded")))
    write_comparison(tmp_path, *report)
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert page.count(">source</div>") == 4 and page.count("data:image/jpeg") == 12
    source(5).save(tmp_path / "0.png")
    with pytest.raises(DifferentSettingsError, match="digest"):
        begin("rewarded", RewardScorer({"redness": reward}))
