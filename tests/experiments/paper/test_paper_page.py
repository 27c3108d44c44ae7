"""The page: what it says, where its numbers come from, and that nothing a model wrote marks it up."""

import json
import re
from html.parser import HTMLParser
from importlib.resources import files

import markdown
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image
from typer.testing import CliRunner

from tests.helpers.paths import ROOT
from tests.helpers.synthetic import World, edit, write, write_world
from trl_unigrpo.cli import app
from trl_unigrpo.experiments.paper import page as page_module
from trl_unigrpo.experiments.paper.markdown import (
    cpu_time,
    escape,
    interval,
    markdown_table,
    number,
    p_value,
    rate,
)
from trl_unigrpo.experiments.paper.order import ORDER
from trl_unigrpo.experiments.paper.page import read_commentary, render, write_paper_page
from trl_unigrpo.experiments.paper.results import collect
from trl_unigrpo.experiments.paper.tables import changed, search_table, unwrapped


NASTY = "<script>alert(1)</script> | `a` **b** [c](javascript:d) &lt; {{ parameters x Y }} \\| # _e_ ![f](g)"
TITLE = "<b>x</b> | $y_1^$"
KEPT = ROOT / "benchmarks" / "results" / "paper"
RENDERERS = {
    "mkdocs": lambda text: markdown.markdown(text, extensions=["tables", "admonition"]),
    "GitHub": lambda text: MarkdownIt("commonmark", {"html": True}).enable("table").render(text),
}


class Cells(HTMLParser):
    """The text of each table cell, and all tags."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.rows, self.inside = [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


def cells(page, heading, renderer="mkdocs"):
    """Rows of a section's tables."""
    section = page.split(f"\n## {heading}")[1].split("\n## ")[0]
    return Cells(RENDERERS[renderer](section)).rows


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    output = tmp_path_factory.mktemp("page")
    write_world(output, World(num_prompts=28))
    entry = {"settings": {"learning_rate": 3e-4}, "as_good": [1], "at_edge": ["learning_rate"]}
    entry["candidates"] = [{"settings": {"learning_rate": rate}, "reward": 0.75} for rate in (3e-4, 1.5e-4)]
    write(output / "chosen.json", {"unigrpo": entry})
    collect(output)
    return output


@pytest.fixture(scope="module")
def page(output):
    return write_paper_page(output).read_text(encoding="utf-8")


def test_sections_stand_in_order_with_claims_first(page):
    assert re.findall(r"^## (.*)", page, re.MULTILINE) == [
        "Which claims hold under a reward that can be hacked",
        "The numbers behind the verdicts",
        "What changed against the first edition",
        "What was run",
        "Table 1: all systems",
        "Table 2: by category",
        "Figure 3: training curves",
        "Figure 4: guidance in training and in evaluation",
        "Figure 5: the regulariser",
        "Extras: beyond the paper",
        "Ablations",
        "Search",
        "Thinkings and images (Figures 2 and 6 to 8)",
        "What the numbers do not say",
    ]


@pytest.mark.parametrize("renderer", RENDERERS)
def test_tables_hold_the_numbers_of_the_results(output, page, renderer):
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    table = cells(page, "Table 1", renderer)
    header, last = table[0], table[21]
    row = dict(zip(header, last, strict=True))
    found = results["systems"]["unigrpo"]["modes"]["sampled"]
    assert row["system"] == "unigrpo" and row["thinking"] == "yes" and row["seeds"] == "5"
    assert row["rule"].startswith(f"{found['rule']['mean']:.3f}") and row["questions"] == "0.700"
    assert row["learned reward"].startswith(f"{found['learned']['mean']:.3f}")
    assert len(table[1]) == len(header) == 8
    joint = table[22:27]
    found = results["comparisons"]["rule"]["unigrpo/sampled - flow_grpo_thinking/sampled"]
    assert joint[0] == ["image expert alone → both experts", "alone", "both", "difference"]
    assert joint[4][0] == "flow grpo, thinking → unigrpo" and joint[4][3].startswith(f"{found['mean']:+.3f}")
    assert joint[4][2] == table[21][2] and joint[4][1] == next(of[2] for of in table if of[0] == "flow grpo, thinking")
    row = dict(zip(table[27], table[48], strict=True))
    assert (row["system"], row["strict"], row["plan"], row["clipped"]) == ("unigrpo", "0.500", "0.600", "0.19")
    assert row["stopped at"] == "0.50" and row["greedy"].startswith("0.8")
    verdicts = cells(page, "Which claims hold", renderer)
    assert [line[1] for line in verdicts[1:]] == [of["verdict"] for of in results["claims"]]
    numbers = cells(page, "The numbers behind", renderer)
    assert [line[0].rsplit(": ", 1)[1] for line in numbers[1:]] == [of["verdict"] for of in results["claims"]]
    end = {line[0]: line for line in cells(page, "Figure 5", renderer)}["long none"]
    found = results["systems"]["long_none"]["modes"]["sampled"]
    assert end[1].startswith(f"{found['learned']['mean']:.3f}") and end[2].startswith(f"{found['rule']['mean']:.3f}")
    extras = [line[0] for line in cells(page, "Extras", renderer)]
    assert "rounds, first image" in extras and "rounds, second image" in extras
    scouts = next(line for line in cells(page, "Extras", renderer) if line[0] == "scouts")
    difference = results["systems"]["scouts"]["modes"]["sampled"]["difference"]
    assert scouts[2] == "uninft" and scouts[4].startswith(f"{difference['mean']:+.3f}")
    assert cells(page, "Figure 4", renderer)[1][0] == "guidance off"
    assert cells(page, "Search", renderer)[0] == ["system", "learning rate", "of the image expert"]


def test_the_first_figure_is_the_learned_reward_against_the_rule_right_under_the_title(page):
    title, _, figure = page.splitlines()[:3]
    assert title.startswith("# ") and figure.endswith("(paper/hacking.svg)")


def test_every_figure_of_the_page_is_there_and_nothing_else_is(output, page):
    named = re.findall(r"!\[[^\]]*\]\((.*?)\)", page)
    there = [f"paper/{file.name}" for file in (output / "paper").iterdir()]
    assert sorted(named) == sorted(there) and len(named) == 5 + 7


def test_the_same_results_give_the_same_bytes(output, page):
    before = {file: file.read_bytes() for file in [output / "paper.md", *(output / "paper").iterdir()]}
    collect(output)
    write_paper_page(output)
    assert {file: file.read_bytes() for file in before} == before


def test_numbers_of_the_page_come_from_the_results_alone(output, tmp_path):
    """The template and the commentary hold no number but the paper's own and the level of the intervals."""
    template = (files("trl_unigrpo.reporting") / "templates" / "paper.md.jinja").read_text(encoding="utf-8")
    text = re.sub(r"\{[{%].*?[}%]\}", "", template, flags=re.DOTALL)
    for known in (
        "2603.23500",
        "Table 1",
        "Table 2",
        "Figure 3",
        "Figure 4",
        "Figure 5",
        "Figures 2 and 6 to 8",
        "95 %",
    ):
        text = text.replace(known, "")
    assert re.findall(r"\S*\d\S*", text) == []
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    results["systems"]["unigrpo"]["modes"]["sampled"]["rule"] |= {"mean": 0.1234, "low": 0.1, "high": 0.1468}
    write(tmp_path / "results.json", results)
    assert "0.123\u00a0±\u00a00.023" in write_paper_page(tmp_path).read_text(encoding="utf-8")


def test_page_needs_the_results_and_not_the_runs(output, tmp_path):
    (tmp_path / "results.json").write_bytes((output / "results.json").read_bytes())
    page = write_paper_page(tmp_path, tmp_path / "docs.md").read_text(encoding="utf-8")
    assert "strips in the runs' folders, which are not here" in page
    assert "unigrpo thinks 0" in page and "(docs/table.svg)" in page
    assert not list((tmp_path / "docs").glob("*.png"))


@pytest.mark.skipif(not (KEPT / "results.json").is_file(), reason="no run is kept yet")
def test_the_page_in_the_docs_is_made_from_the_results_that_are_kept(tmp_path):
    for name in ("shapeworld.md", "config.md", "paper_first.md"):
        (tmp_path / name).touch()  # the page links to what lies beside it
    page, before = tmp_path / "paper.md", sorted(KEPT.rglob("*"))
    command = ["paper", "--from-results", "--output-dir", str(KEPT), "--page", str(page)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0 and "paper.md" in result.output.replace("\n", "")  # lines are as wide as a terminal
    assert page.read_bytes() == (ROOT / "docs" / "paper.md").read_bytes()
    made, shown = (sorted(folder.iterdir()) for folder in (tmp_path / "paper", ROOT / "docs" / "paper"))
    assert [file.name for file in made] == [file.name for file in shown]
    for one, other in zip(made, shown, strict=True):
        if one.suffix == ".png":
            assert Image.open(one).tobytes() == Image.open(other).tobytes()
    assert sorted(KEPT.rglob("*")) == before


def test_the_first_edition_s_page_has_the_numbers_of_its_results():
    results = json.loads((ROOT / "benchmarks/results/paper_first/results.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/paper_first.md").read_text(encoding="utf-8")
    claims = cells(page, "Claims and verdicts")[1:]
    assert [line[1] for line in claims] == [claim["verdict"] for claim in results["claims"]]
    table = {(line[0], line[1]): line[2] for line in cells(page, "Table 1") if line[1] in ("yes", "no")}
    assert len(table) == 19
    for system in results["systems"].values():
        for mode, thinking in (("sampled", "yes"), ("direct", "no")):
            if system["group"] == "table1" and mode in system["modes"]:
                assert table[system["title"], thinking] == interval(system["modes"][mode]["reward"])


def test_page_alone_without_results_is_an_error(tmp_path):
    result = CliRunner().invoke(app, ["paper", "--from-results", "--output-dir", str(tmp_path / "none")])
    assert result.exit_code == 1 and "results.json is missing" in result.output
    assert list(tmp_path.iterdir()) == []


def test_without_results_there_is_no_page(tmp_path):
    with pytest.raises(FileNotFoundError, match="results.json is missing"):
        write_paper_page(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "system",
    [
        "base",
        "sft_clean",
        "flow_grpo",
        "two_stage",
        "two_stage_refl",
        "guidance_on",
        "long_latent_kl",
        "rounds",
        "cps",
    ],
)
def test_any_single_system_makes_a_page(tmp_path, system):
    write_world(tmp_path, World(num_prompts=14), systems=(system,), seeds=(0,))
    collect(tmp_path)
    page = write_paper_page(tmp_path).read_text(encoding="utf-8")
    assert "**Not complete.**" in page and "## Which claims hold" in page
    assert "None" not in page and "nan" not in page


def test_what_is_missing_is_said_exactly(tmp_path):
    write_world(tmp_path, World(num_prompts=14), systems=("base", "unigrpo", "sft"), seeds=(0, 1, 4))
    edit(tmp_path / "sft/seed-1/run.json", lambda record: record["evaluations"].pop("greedy"))
    (tmp_path / "fpo/seed-0").mkdir(parents=True)
    collect(tmp_path)
    page = write_paper_page(tmp_path).read_text(encoding="utf-8")
    assert "> - 3 of 5 seeds (without 2, 3): `sft`, `unigrpo`\n" in page
    assert "> - 0 of 5 seeds: `sft_clean`, `refl`," in page
    assert "> - `sft`: no evaluation `greedy` of seeds 1\n" in page
    assert "- `fpo/seed-0` has no run.json: the run is not finished.\n" in page
    assert "| **not measured yet** |" in page


def test_a_complete_page_says_nothing_of_gaps(page):
    assert "Not complete" not in page and "Left out" not in page and "not measured" not in page


def test_unequal_rollouts_are_said(tmp_path):
    write_world(tmp_path, World(num_prompts=14), systems=("unigrpo", "text_grpo"), seeds=(0,))
    edit(tmp_path / "text_grpo/seed-0/run.json", lambda record: record.update(rollouts=99))
    collect(tmp_path)
    assert "so does each other system of Table 1 but text grpo (99)." in write_paper_page(tmp_path).read_text("utf-8")


@pytest.mark.parametrize("renderer", RENDERERS)
def test_nothing_that_a_model_thought_marks_the_page_up(tmp_path, renderer):
    write_world(tmp_path, World(num_prompts=14), systems=("base", "unigrpo"), seeds=(0,))

    def spoil(record):
        record["traces"][0]["thinking"] = NASTY
        record["traces"][1]["prompt"] = NASTY
        record["title"] = TITLE

    edit(tmp_path / "unigrpo/seed-0/run.json", spoil)
    collect(tmp_path)
    page = write_paper_page(tmp_path).read_text(encoding="utf-8")
    html = RENDERERS[renderer](page)
    parsed = Cells(html)
    assert not {"script", "em"} & set(parsed.tags) and "javascript" not in "".join(
        re.findall('(?:href|src)="[^"]*"', html)
    )
    row = next(row for row in parsed.rows if NASTY in row[1])
    assert len(row) == 5 and row[0] == TITLE
    assert not re.search(r"^\{\{ parameters", page, re.MULTILINE)


@pytest.mark.parametrize("renderer", RENDERERS)
@given(text=st.text(st.characters(exclude_categories=("C",)), max_size=40))
def test_escaped_text_comes_back_from_a_table_as_it_was(renderer, text):
    table = markdown_table(["a", "b"], [["x", escape(text)]])
    rows = Cells(RENDERERS[renderer](table)).rows
    assert rows[1][0] == "x" and rows[1][1].split() == text.split()


def test_control_characters_are_shown_as_such():
    assert escape("a\x00\x02b\u202ec") == "a\ufffd\ufffdb\ufffdc"


def test_commentary_goes_under_its_section(output):
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    text = "Ignored.\n\n## search\n\nAn *explanation*.\n\n## table\n"
    commentary = dict.fromkeys(read_commentary(), "") | read_commentary(text)
    page = render(results, {"table": "t.svg", "traces": [None] * 7}, "f", commentary)
    assert "An *explanation*." in page.split("## Search")[1].split("\n## ")[0]
    assert "Ignored" not in page and page.count("An *explanation*.") == 1


REMARK = {"table": "A remark on all of it."}


def test_commentary_speaks_of_the_whole_grid_and_stands_on_its_page_alone(output, tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "read_commentary", lambda: dict.fromkeys(read_commentary(), "") | REMARK)
    assert REMARK["table"] in write_paper_page(output, tmp_path / "whole.md").read_text(encoding="utf-8")
    write_world(tmp_path, World(num_prompts=14), systems=("base", "unigrpo"), seeds=(0,))
    collect(tmp_path, expected={"base": (0,), "unigrpo": (0,)})
    part = write_paper_page(tmp_path).read_text(encoding="utf-8")
    assert REMARK["table"] not in part and "## What changed" not in part
    assert f"{len(ORDER) - 2} of its systems are left out" in part


def test_search_names_systems_that_were_not_run_as_the_tables_do(output):
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    results["systems"] = {"base": results["systems"]["base"]}
    results["search"]["other"] = results["search"]["unigrpo"]
    assert "| UniGRPO |" in search_table(results) and "| other |" in search_table(results)


def test_commentary_with_a_number_is_refused():
    with pytest.raises(ValueError, match=r"section 'table', holds the number '0\.9,'"):
        read_commentary("## table\n\nReward is 0.9, which is much.\n")


def test_shipped_commentary_has_a_section_wherever_the_page_has_room():
    template = (files("trl_unigrpo.reporting") / "templates" / "paper.md.jinja").read_text(encoding="utf-8")
    assert set(re.findall(r"commentary\.(\w+)", template)) == set(read_commentary())


def test_the_page_links_to_others_where_they_are(output, tmp_path):
    names = ("shapeworld.md", "paper_first.md", "config.md")
    for name in names:
        (tmp_path / name).write_text("# A page\n")
    beside = write_paper_page(output, tmp_path / "paper.md").read_text(encoding="utf-8")
    assert all(f"]({name})" in beside for name in names)
    assert not any(name in write_paper_page(output).read_text(encoding="utf-8") for name in names)


def test_numbers_as_text():
    assert interval({"mean": -0.0004, "low": -0.0104, "high": 0.0096}, "+") == "+0.000\u00a0±\u00a00.010"
    assert interval({"mean": 0.5, "low": 0.25, "high": 0.75}, digits=2) == "0.50\u00a0±\u00a00.25"
    assert [rate(value) for value in (3e-4, 7.5e-5, 3.75e-5, 5e-5, 1.5, 4.0)] == [
        "3e-4",
        "7.5e-5",
        "3.75e-5",
        "5e-5",
        "1.5",
        "4",
    ]
    assert [number(None), number(0.12345), number(0.00309, 3, True)] == ["–", "0.123", "0.00309"]
    assert [cpu_time(5400), cpu_time(90)] == ["1.5 CPU hours", "2 CPU minutes"]
    assert [p_value(0.004), p_value(0.04), p_value(1.0)] == ["&lt;\u00a00.01", "0.04", "1"]


def test_changed_settings():
    reference = {"a": 1, "b": "x", "c": [0, 5]}
    assert changed({"a": 2, "b": "x", "c": [0, 5]}, reference) == "a = 2"
    assert changed({"a": 1, "b": "x", "c": [0, 4], "new_one": 0.5}, reference) == "c = \\[0, 4\\], new\\_one = 0.5"
    assert changed(reference, reference) == "–"
    assert changed(dict.fromkeys("abcd", 9), {}) == "a = 9, b = 9, c = 9, d = 9"
    assert changed(dict.fromkeys("abcde", 9), {}) == "5 settings, in its run.json"


def test_thinkings_are_shown_without_their_tags():
    assert unwrapped("<think> red circle </think>") == "red circle"
    assert unwrapped("<think> never closed") == "<think> never closed"
    assert unwrapped("") == unwrapped("<think></think>") == ""
