"""Benchmark files: what is read, what is left out, and each official rule against numbers worked out by hand."""

import csv
import json
import math

import pytest
from PIL import Image

from trl_unigrpo.evaluation.benchmark import Item, evenly_spread
from trl_unigrpo.evaluation.benchmarks import load_benchmark, wise
from trl_unigrpo.evaluation.benchmarks.edits import edit_and_quality_questions
from trl_unigrpo.evaluation.metrics import all_correct, edit_mean, edit_quality
from trl_unigrpo.evaluation.scorers import question_score
from trl_unigrpo.models.sources import read_source
from trl_unigrpo.rewards.questions.question import Question
from trl_unigrpo.shapeworld import shapeworld_edit_dataset


DPG_COLUMNS = ("item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed")
DPG_COLUMNS += ("tuple", "question_natural_language")


def write_jsonl(file, *rows):
    """Rows as lines; texts as they are, whether JSON or not."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def write_dpg(file, *rows):
    with file.open("w", newline="", encoding="utf-8") as out:
        table = csv.DictWriter(out, DPG_COLUMNS)
        table.writeheader()
        for name, number, dependency, kind in rows:
            cells = {"item_id": name, "text": f"the prompt\nof {name}", "proposition_id": number}
            cells |= {
                "dependency": dependency,
                "tuple": f"{kind} - whole (x)",
                "question_natural_language": f"{number}?",
            }
            table.writerow(cells)
    return file


def reward(benchmark, item, *answers):
    return question_score(benchmark.metric, item, list(answers)).reward


def test_dpg_zeroes_what_hangs_on_a_no(tmp_path):
    rows = [("p1", 1, "0", "entity"), ("p1", 2, "1", "attribute"), ("p1", 3, "2", "relation")]
    rows += [("p1", 4, "1,3", "other"), ("p1", 5, "4", "other"), ("p2", 1, "0", "global")]
    benchmark = load_benchmark("dpg", write_dpg(tmp_path / "dpg_bench.csv", *rows))
    first, second = benchmark.items
    assert (first.key, first.prompt) == ("p1", "the prompt\nof p1")
    assert [question.parents for question in first.questions] == [(), (0,), (1,), (0, 2), (3,)]
    assert [question.group for question in first.questions] == ["entity", "attribute", "relation", "other", "other"]
    # The third is a no, so that the fourth counts as one and with it the fifth: 2 of 5.
    assert reward(benchmark, first, 0.9, 0.5, 0.4, 1.0, 1.0) == pytest.approx(2 / 5)
    # Answers are yes or no, not shares of it.
    assert reward(benchmark, first, 0.6, 0.6, 0.6, 0.6, 0.6) == 1
    assert reward(benchmark, first, 0.49, 1, 1, 1, 1) == 0
    assert reward(benchmark, second, 0.51) == 1
    assert benchmark.painting.samples == 4 and benchmark.problems == ()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("p1", "two", "0", "entity"), "'proposition_id' is 'two'"),
        (("p1", 2, "7", "entity"), "'dependency' names 7"),
        (("p1", 2, "first", "entity"), "'dependency' is 'first'"),
        (("p1", 1, "0", "entity"), "repeated"),
        (("p1", 2, "2", "entity"), "circle"),
    ],
)
def test_dpg_leaves_out_a_prompt_with_a_bad_question(tmp_path, row, message):
    file = write_dpg(
        tmp_path / "dpg.csv", ("p0", 1, "0", "entity"), ("p1", 1, "0", "entity"), row, ("p2", 1, "0", "other")
    )
    benchmark = load_benchmark("dpg", file)
    assert [item.key for item in benchmark.items] == ["p0", "p2"]
    (problem,) = benchmark.problems
    assert message in problem and "dpg.csv, line" in problem and "'p1' is left out" in problem


def test_lines_of_a_csv_are_counted_as_in_an_editor(tmp_path):
    """Each prompt here is two lines long."""
    file = write_dpg(tmp_path / "dpg.csv", ("p0", 1, "0", "entity"), ("p1", "x", "0", "entity"))
    assert load_benchmark("dpg", file).problems[0].startswith("dpg.csv, line 4:")


def tiif_row(kind, answers, **changes):
    row = {"type": kind, "short_description": f"{kind} short", "long_description": f"{kind} long and longer"}
    questions = [f"{kind} {i}?" for i in range(len(answers))]
    return {**row, "yn_question_list": questions, "yn_answer_list": answers, **changes}


def test_tiif_counts_answers_equal_to_the_files(tmp_path):
    write_jsonl(tmp_path / "color_prompts.jsonl", tiif_row("color", ["yes", "No "]))
    write_jsonl(
        tmp_path / "count_prompts.jsonl",
        tiif_row("count", ["yes"]),
        "{broken",
        tiif_row("count", ["yes", "no"], yn_question_list=["one?"]),
        tiif_row("count", ["perhaps"]),
        tiif_row("count", ["yes"], long_description=" "),
    )
    benchmark = load_benchmark("tiif", tmp_path)
    assert [item.task for item in benchmark.items] == ["color/short", "color/long", "count/short", "count/long"]
    assert [item.prompt for item in benchmark.items[:2]] == ["color short", "color long and longer"]
    short, long = benchmark.items[:2]
    assert short.cluster == long.cluster != benchmark.items[2].cluster
    assert reward(benchmark, short, 0.8, 0.3) == 1
    assert reward(benchmark, short, 0.8, 0.7) == 0.5
    assert reward(benchmark, short, 0.1, 0.7) == 0
    places = [problem.split(":")[0] for problem in benchmark.problems]
    assert sorted(places) == [f"count_prompts.jsonl, line {number}" for number in (2, 3, 4, 5)]


def test_tiif_as_its_repository_has_it(tmp_path):
    """Prompts and questions lie in two folders and belong together by type and line."""
    prompts, asked = tmp_path / "testmini_prompts", tmp_path / "testmini_eval_prompts"
    prompts.mkdir(), asked.mkdir()
    for kind in ("color", "count"):
        rows = [tiif_row(kind, ["yes"] * n, short_description=f"{kind} {n}") for n in (1, 2, 3)]
        painted, questions = (
            ("type", "short_description", "long_description"),
            ("type", "yn_question_list", "yn_answer_list"),
        )
        write_jsonl(prompts / f"{kind}_prompts.jsonl", *({k: row[k] for k in painted} for row in rows))
        write_jsonl(
            asked / f"{kind}_eval_prompts.jsonl",
            *({k: row[k] for k in questions} for row in rows[: 2 + (kind == "color")]),
        )
    write_jsonl(
        asked / "twice_eval_prompts.jsonl", {"type": "color", "yn_question_list": ["x?"], "yn_answer_list": ["no"]}
    )
    benchmark = load_benchmark("tiif", tmp_path)
    assert [(item.prompt, len(item.questions)) for item in benchmark.items if item.task.endswith("short")] == [
        ("color 1", 1), ("color 2", 2), ("color 3", 3), ("count 1", 1), ("count 2", 2)
    ]  # fmt: skip
    assert benchmark.problems[0].startswith("twice_eval_prompts.jsonl, line 1: 'yn_answer_list' of this type")
    assert benchmark.problems[1] == "count_prompts.jsonl, line 3: 'yn_question_list' is missing"


def test_wise_categories_and_shares(tmp_path):
    numbers = {1: "culture", 400: "culture", 401: "time", 520: "time", 521: "space", 640: "space", 641: "biology"}
    numbers |= {760: "biology", 761: "physics", 880: "physics", 881: "chemistry", 1000: "chemistry"}
    assert {number: wise.category(number) for number in numbers} == numbers
    rows = [{"prompt_id": n, "Prompt": f"prompt {n}", "Explanation": "it is {so}"} for n in (*numbers, 0, 1001, "7")]
    file = tmp_path / "all_verified.json"
    file.write_text(json.dumps([*rows, {"prompt_id": 5, "Prompt": "x"}, 3]), encoding="utf-8")
    benchmark = load_benchmark("wise", file)
    assert [item.task for item in benchmark.items] == list(numbers.values())
    assert len(benchmark.problems) == 5 and "'Explanation' is missing" in benchmark.problems[3]
    assert benchmark.overall == pytest.approx(
        {"culture": 0.4, "time": 0.12, "space": 0.12, "biology": 0.12, "physics": 0.12, "chemistry": 0.12}
    )
    (question,) = benchmark.items[0].questions
    assert "prompt 1" in question.text and "it is {so}" in question.text
    assert reward(benchmark, benchmark.items[0], 0.51) == 1 and reward(benchmark, benchmark.items[0], 0.49) == 0


def write_wise(file, *numbers, word="prompt", **more):
    rows = [{"prompt_id": n, "Prompt": f"{word} {n}", "Explanation": "as it says", **more} for n in numbers]
    file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return file


def test_wise_prompts_that_stand_in_two_files_count_once(tmp_path):
    """The benchmark's own folder has all its files once more in `merge.json`."""
    write_wise(tmp_path / "culture.json", 1, 2, 3)
    write_wise(tmp_path / "merge.json", 1, 2, 3, 401, 402, Category="of no matter")
    write_wise(tmp_path / "time.json", 401, 402)
    benchmark = load_benchmark("wise", tmp_path)
    assert [item.key for item in benchmark.items] == ["0001", "0002", "0003", "0401", "0402"]
    assert benchmark.problems == (
        "merge.json, entry 0 (line 2): stands in culture.json, too, like 2 more rows of merge.json; each counts once",
        "time.json, entry 0 (line 2): stands in merge.json, too, like 1 more rows of time.json; each counts once",
    )


def test_wise_files_that_disagree_are_refused(tmp_path):
    write_wise(tmp_path / "culture.json", 1, 2)
    write_wise(tmp_path / "culture_rewrite.json", 2, word="a rewritten prompt")
    with pytest.raises(
        ValueError,
        match=r"culture_rewrite.json, entry 0 \(line 2\) and culture.json, entry 1 \(line 7\) both have .*\b2\b",
    ):
        load_benchmark("wise", tmp_path)
    assert len(load_benchmark("wise", tmp_path / "culture_rewrite.json").items) == 1


def test_wise_rows_are_named_by_line(tmp_path):
    file = write_wise(tmp_path / "wise.json", 1, 2, 2, "x")
    benchmark = load_benchmark("wise", file)
    assert [item.key for item in benchmark.items] == ["0001", "0002"]
    assert benchmark.problems == (
        "wise.json, entry 2 (line 12): '0002' is already wise.json, entry 1 (line 7)",
        "wise.json, entry 3 (line 17): 'prompt_id' is 'x', expected a number from 1 to 1000",
    )
    file.write_text(file.read_text()[:-40])
    with pytest.raises(ValueError, match=r"wise.json is no JSON .*line 19"):
        load_benchmark("wise", file)
    file.write_text('\ufeff[{"prompt_id": 3, "Prompt": "a \\n, [", "Explanation": "b"},\n\n3]', encoding="utf-8")
    assert load_benchmark("wise", file).problems == ("wise.json, entry 1 (line 3): a int, expected an object",)


def test_copies_of_files_count_once(tmp_path):
    """In every benchmark that is a folder of files; a row that one file has twice is the user's own matter."""
    geneval2 = {"prompt": "x", "atom_count": 1, "vqa_list": [["a?", "yes"]], "skills": ["object"]}
    folders = {
        "dpg": lambda file: write_dpg(file, ("p1", 1, "0", "entity"), ("p1", 2, "1", "entity"), ("p2", 1, "0", "x")),
        "tiif": lambda file: write_jsonl(file, tiif_row("color", ["yes"]), tiif_row("count", ["yes"])),
        "geneval2": lambda file: write_jsonl(file, geneval2, geneval2),
        "prompts": lambda file: write_jsonl(file, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "b"}),
    }
    for name, write in folders.items():
        folder = tmp_path / name
        folder.mkdir()
        ending = "csv" if name == "dpg" else "jsonl"
        alone = load_benchmark(name, write(folder / f"a.{ending}"))
        write(folder / f"b.{ending}")
        both = load_benchmark(name, folder)
        assert both.items == alone.items and alone.problems == ()
        (problem,) = both.problems
        assert problem.startswith(f"b.{ending}, line ") and f"stands in a.{ending}, too" in problem


def test_dpg_files_that_disagree_are_refused(tmp_path):
    write_dpg(tmp_path / "a.csv", ("p1", 1, "0", "entity"), ("p1", 2, "1", "entity"))
    write_dpg(tmp_path / "b.csv", ("p1", 1, "0", "entity"), ("p1", 2, "0", "entity"))
    with pytest.raises(ValueError, match="b.csv, line 4 and a.csv, line 4 both have .*p1"):
        load_benchmark("dpg", tmp_path)


def test_geneval2_soft_tifa(tmp_path):
    row = {
        "prompt": "four white bicycles",
        "atom_count": 3,
        "vqa_list": [["How many bicycles are there?", "four"], ["Are they white?", "Yes"], ["Is there a cow?", "no"]],
        "skills": ["count", "attribute", "object"],
    }
    file = write_jsonl(tmp_path / "geneval2_data.jsonl", row, row | {"skills": ["count"]}, row | {"vqa_list": []})
    benchmark = load_benchmark("geneval2", file)
    (item,) = benchmark.items
    assert len(benchmark.problems) == 2
    assert [question.expected for question in item.questions] == ["yes", "yes", "no"]
    assert item.questions[0].text == 'How many bicycles are there? Is the right answer "four"?'
    score = question_score(benchmark.metric, item, [0.9, 0.5, 0.2])  # right with .9, .5 and .8
    assert score.scores["soft_tifa_am"] == pytest.approx((0.9 + 0.5 + 0.8) / 3)
    assert score.reward == score.scores["soft_tifa_gm"] == pytest.approx((0.9 * 0.5 * 0.8) ** (1 / 3))
    assert question_score(benchmark.metric, item, [0.9, 0.0, 0.2]).reward == 0
    assert [question.group for question in item.questions] == row["skills"]


def test_own_prompts_are_an_exam(tmp_path):
    questions = ["Is it red?", {"text": "Is it blue?", "expected": "no"}]
    rows = [{"prompt": "a red ball", "questions": questions, "tag": "colour"}, {"prompt": "x", "questions": []}]
    benchmark = load_benchmark("prompts", write_jsonl(tmp_path / "own.jsonl", *rows))
    (item,) = benchmark.items
    assert item.task == "colour" and "line 2" in benchmark.problems[0] and benchmark.painting.samples > 1
    assert reward(benchmark, item, 0.7, 0.2) == 1
    assert reward(benchmark, item, 0.7, 0.6) == 0.5
    assert reward(benchmark, item, 0.4, 0.6) == 0


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "parquet", "txt"])
def test_own_prompts_in_every_format(tmp_path, ending):
    texts = ["a red ball, and a cat", "日本の猫\u2028🐈", 'a "quoted" <b>dog</b>']
    file = tmp_path / f"own.{ending}"
    if ending == "csv":
        with file.open("w", newline="", encoding="utf-8") as out:
            csv.writer(out).writerows([["prompt"], *([text] for text in texts)])
    elif ending == "json":
        file.write_text(json.dumps([{"prompt": text} for text in texts]), encoding="utf-8")
    elif ending == "jsonl":
        file.write_text("".join(json.dumps({"prompt": t}, ensure_ascii=False) + "\n" for t in texts), encoding="utf-8")
    elif ending == "parquet":
        from datasets import Dataset

        Dataset.from_dict({"prompt": texts}).to_parquet(str(file))
    else:
        file.write_text("\ufeff" + "\n".join(texts), encoding="utf-8")  # as Windows begins a file
    benchmark = load_benchmark("prompts", file)
    assert [item.prompt for item in benchmark.items] == texts and benchmark.metric is None


@pytest.mark.parametrize("column", ["source_image", "source_images"])
def test_own_edits_have_their_sources_and_are_asked_about(tmp_path, column):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    held = [str(tmp_path / "a.png")] if column == "source_images" else str(tmp_path / "a.png")
    missing = {column: "nowhere.png"} if column == "source_image" else {}
    rows = [{"prompt": "make it blue", column: held}, {"prompt": "make it green", **missing}]
    benchmark = load_benchmark("prompts", write_jsonl(tmp_path / "own.jsonl", *rows))
    (item,) = benchmark.items
    assert read_source(item.source_images[0]).getpixel((0, 0)) == (255, 0, 0) and column not in item.columns
    assert "line 2: the source image is" in benchmark.problems[0]
    assert [question.group for question in item.questions] == ["following", "preservation", "quality"]
    assert reward(benchmark, item, 0.9, 0.4, 0.9) == pytest.approx(0.6)
    exam = [{**rows[0], "questions": ["Is it blue?"]}]
    benchmark = load_benchmark("prompts", write_jsonl(tmp_path / "exam.jsonl", *exam))
    assert [question.text for question in benchmark.items[0].questions] == ["Is it blue?"]
    assert benchmark.items[0].source_images and reward(benchmark, benchmark.items[0], 0.9) == 1


def test_own_edits_in_parquet_are_read_as_they_are(tmp_path):
    shapeworld_edit_dataset("test", 2).to_parquet(tmp_path / "edits.parquet")
    benchmark = load_benchmark("prompts", tmp_path / "edits.parquet")
    assert [read_source(item.source_images[0]).size for item in benchmark.items] == [(48, 48)] * 2


def test_bad_rows_are_named_by_line_and_the_rest_runs(tmp_path):
    rows = [
        {"prompt": "one"},
        "no json",
        {"prompt": ""},
        "",
        ["a list"],
        {"text": "x"},
        '{"prompt": "\\ud800"}',
        "null",
    ]
    file = write_jsonl(tmp_path / "own.jsonl", *rows, {"prompt": ["a", "list"]}, {"prompt": "last\x00\x1b[31m"})
    with file.open("ab") as out:
        out.write(b'{"prompt": "\xff"}\n')
    benchmark = load_benchmark("prompts", file)
    assert [item.prompt for item in benchmark.items] == ["one", "last\x00\x1b[31m"]
    numbers = [int(problem.split("line ")[1].split(":")[0]) for problem in benchmark.problems]
    assert numbers == [2, 3, 5, 6, 7, 8, 9, 11]


def test_a_file_without_a_good_row_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no prompt that can be painted(.|\n)*line 1: no JSON"):
        load_benchmark("prompts", write_jsonl(tmp_path / "own.jsonl", "nothing"))


@pytest.mark.parametrize(
    ("name", "data", "error", "message"),
    [
        ("coco", None, ValueError, "expected one of geneval"),
        ("dpg", None, ValueError, "needs data"),
        ("geneval", "file.jsonl", ValueError, "takes no data"),
        ("dpg", "nothing.csv", FileNotFoundError, "no such file"),
    ],
)
def test_wrong_names(name, data, error, message):
    with pytest.raises(error, match=message):
        load_benchmark(name, data)


def test_gedit(tmp_path):
    photograph = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(photograph)
    row = {"key": "k1", "task_type": "color_alter", "instruction": "Make it red.", "instruction_language": "en"}
    row["input_image"] = {"path": str(photograph)}
    bad = [row | {"task_type": "cooking"}, row | {"instruction": ""}, row | {"instruction_language": "fr"}]
    bad += [row | {"input_image": None}, row | {"input_image": {"path": "nowhere.png"}}, row | {"key": "../k"}]
    other = row | {"instruction_language": "cn", "instruction": "变红"}
    benchmark = load_benchmark("gedit", write_jsonl(tmp_path / "gedit.jsonl", row, other, *bad))
    assert [item.key for item in benchmark.items] == ["en/k1", "cn/k1"]
    first = benchmark.items[0]
    assert (first.task, first.official) == ("en/color_alter", "fullset/color_alter/en/k1.png")
    assert [question.group for question in first.questions] == ["following", "preservation", "quality"]
    assert "Make it red." in first.questions[0].text
    assert read_source(first.source_images[0]).size == (4, 4)
    assert "input_image" not in first.columns
    reasons = ("'task_type'", "instruction is ''", "'fr'", "None", "no such file", "name of a file")
    for problem, reason in zip(benchmark.problems, reasons, strict=True):
        assert reason in problem
    with pytest.raises(ValueError, match="no prompt that can be painted"):
        load_benchmark("gedit", write_jsonl(tmp_path / "bad.jsonl", *bad))


def test_gedit_as_datasets_saves_it(tmp_path):
    from datasets import Dataset

    image = Image.new("RGB", (4, 4), "red")
    row = {"key": "k1", "task_type": "subject-add", "instruction": "加一只猫", "instruction_language": "cn"}
    Dataset.from_list([row | {"input_image": image}]).save_to_disk(str(tmp_path / "gedit"))
    (item,) = load_benchmark("gedit", tmp_path / "gedit").items
    assert read_source(item.source_images[0]).getpixel((0, 0)) == (255, 0, 0)


def test_imgedit(tmp_path):
    (tmp_path / "singleturn" / "animal").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "singleturn" / "animal" / "1.png")
    row = {"id": "animal/1.png", "prompt": "Make it blue.", "edit_type": "adjust"}
    bad = {"2": row | {"id": "animal/2.png"}, "3": row | {"prompt": " "}, "4": row | {"edit_type": None}, "5": []}
    file = tmp_path / "basic_edit.json"
    file.write_text(json.dumps({"1082": row, **bad}))
    for path in (file, tmp_path):
        benchmark = load_benchmark("imgedit", path)
        (item,) = benchmark.items
        assert (item.key, item.task, item.official) == ("1082", "adjust", "1082.png")
        assert read_source(item.source_images[0]).size == (4, 4)
        reasons = ("no photograph 'animal/2.png'", "instruction is ' '", "'edit_type' is None", "a list")
        for problem, reason in zip(benchmark.problems, reasons, strict=True):
            assert reason in problem
    file.write_text("[]")
    with pytest.raises(ValueError, match="holds a list, expected an object"):
        load_benchmark("imgedit", file)
    with pytest.raises(FileNotFoundError, match=r"basic_edit\.json: no such file"):
        load_benchmark("imgedit", tmp_path / "singleturn")


EDIT = edit_and_quality_questions("Make it red.")


def test_scores_of_edits():
    assert edit_quality(EDIT, [0.9, 0.4, 0.9])["edit"] == pytest.approx(0.6)
    assert edit_mean(EDIT, [0.9, 0.4, 0.8])["edit"] == pytest.approx(0.7)
    for metric in (edit_quality, edit_mean):
        assert metric(EDIT, [0.9, None, 0.9])["edit"] is None
        assert list(metric(EDIT, [1, 1, 1])) == ["edit", "following", "preservation", "quality"]


YES, NO = Question("a?"), Question("b?", "no")


@pytest.mark.parametrize(
    ("answers", "correct"),
    [((0.6, 0.4), 1.0), ((0.6, 0.6), 0.0), ((0.6, None), None), ((0.4, None), 0.0), ((None, None), None)],
)
def test_all_correct_hangs_on_a_missing_answer_only_if_the_others_are_right(answers, correct):
    assert all_correct([YES, NO], list(answers)) == {"correct": correct}


def test_a_image_with_too_few_answers_has_no_score(tmp_path):
    item = Item("k", "p", "t", tuple(Question(f"{i}?") for i in range(8)))
    benchmark = load_benchmark("prompts", write_jsonl(tmp_path / "x.jsonl", {"prompt": "p", "questions": ["a?"]}))
    answers = [1.0] * 5 + [0.0] + [None] * 2
    assert reward(benchmark, item, *answers) == pytest.approx(5 / 6)
    score = question_score(benchmark.metric, item, [None, *answers[1:]], "timeout")
    assert (score.reward, score.error, score.scores) == (None, "timeout", {"accuracy": None})


def test_spread_takes_from_all_tasks():
    items = [Item(str(i), "p", f"task {i // 100}") for i in range(600)]
    chosen = evenly_spread(items, 60)
    assert len({item.key for item in chosen}) == 60
    assert all(sum(item.task == f"task {t}" for item in chosen) == 10 for t in range(6))
    assert evenly_spread(items, None) == evenly_spread(items, 1000) == tuple(items)
    assert math.prod(len(evenly_spread(items, n)) == n for n in (1, 7, 599))
