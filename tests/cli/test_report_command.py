"""`trl-unigrpo report`: pages from folders of runs, and errors that say which folder and what was expected."""

from typer.testing import CliRunner

from tests.helpers.run_folders import write_run
from trl_unigrpo.cli import app


def report(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_one_run_and_several(tmp_path):
    runs = [write_run(tmp_path / name, steps=(0, 4), gain=gain) for name, gain in (("one", 0.1), ("two", -0.1))]
    result = report(runs[0])
    assert result.exit_code == 0 and result.output.strip() == str(runs[0] / "gallery.html")
    assert "It works" in (runs[0] / "gallery.html").read_text(encoding="utf-8")
    assert report(*runs, "--output", tmp_path / "both.html").exit_code == 0
    page = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert "It works" in page and "It got worse" in page and "2 runs side by side" in page


def test_folders_without_a_run_are_named(tmp_path):
    run = write_run(tmp_path / "run", steps=(0, 1))
    for folder, says in (
        (tmp_path, "holds no run: expected gallery/records.jsonl"),
        (tmp_path / "no", "not a folder"),
    ):
        result = report(run, folder, "--output", tmp_path / "page.html")
        assert result.exit_code == 1 and not (tmp_path / "page.html").exists()
        assert str(folder) in result.output and says in result.output
    assert report().exit_code == 2
