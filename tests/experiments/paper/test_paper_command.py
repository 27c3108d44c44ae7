"""`trl-unigrpo paper`: what is refused before anything starts, and the command from start to end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from trl_unigrpo.cli import app
from trl_unigrpo.experiments.paper.chosen import load_chosen, read_entries
from trl_unigrpo.experiments.paper.jobs import Job
from trl_unigrpo.experiments.paper.runner import IGNORED, PaperOptions, renew_starts
from trl_unigrpo.experiments.paper.systems import QUICK_SYSTEMS, SYSTEMS, Scale
from trl_unigrpo.experiments.paper.training import run_settings


CHOICE = {
    "sft": {"learning_rate": 2e-4},
    "unigrpo": {"learning_rate": 3e-4, "image_learning_rate": 1e-4},
}


@pytest.fixture
def chosen(tmp_path):
    file = tmp_path / "choice.json"
    file.write_text(json.dumps({name: {"settings": settings} for name, settings in CHOICE.items()}))
    return file


def paper(*arguments):
    return CliRunner().invoke(app, ["paper", *map(str, arguments)])


def refused(result, *words):
    assert result.exit_code == 1, result.output
    for word in words:
        assert word in result.output


def test_what_is_wrong_is_refused_before_any_run_starts(tmp_path, chosen):
    output = tmp_path / "runs"
    common = ("--output-dir", output, "--chosen", chosen)
    refused(paper(*common, "--only", "unigrpo,grpo"), "'grpo'", "flow_grpo")
    refused(paper(*common, "--only", "unigrpo", "--seeds", "0,x"), "--seeds x", "0,1,2")
    refused(paper(*common, "--only", "unigrpo", "--only", "unifpo"), "unifpo needs", "--search --only unifpo")
    refused(paper(*common, "--search", "--only", "base"), "nothing is searched", "text_grpo")
    refused(paper(*common, "--search", "--only", "guided_base", "--chosen", tmp_path / "new.json"), "choice for sft")
    refused(paper("--output-dir", output, "--search", "--rollouts", "2"), "full length", "--chosen")
    assert not [file for file in output.rglob("*") if file.suffix == ".txt"]


def test_runs_of_other_settings_are_refused(tmp_path, chosen):
    output = tmp_path / "runs"
    job = Job("unigrpo", 0)
    job.folder(output).mkdir(parents=True)
    settings = run_settings(SYSTEMS["unigrpo"], CHOICE, Scale(35, 210))
    (job.folder(output) / "run.json").write_text(json.dumps({"settings": settings}))
    refused(
        paper("--output-dir", output, "--chosen", chosen, "--only", "unigrpo", "--seeds", "0"),
        *("max_steps=70 there, 140 now", "--output-dir"),
    )


def test_list_shows_what_is_done_and_left(tmp_path):
    folder = Job("unigrpo", 1).folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"system": "unigrpo", "seconds": 600}))
    result = paper("--output-dir", tmp_path, "--only", "unigrpo", "--list", "--jobs", 2)
    assert result.exit_code == 0
    (row,) = [line for line in result.output.splitlines() if "UniGRPO" in line]
    assert [cell.strip() for cell in row.split("│")[4:6]] == ["1", "0 2 3 4"]
    assert "1 of 5 runs are done; about 20 min left, with 2 at a time" in " ".join(result.output.split())
    assert [*tmp_path.iterdir()] == [tmp_path / "unigrpo"]  # looking changes nothing
    assert "guided_base" in paper("--output-dir", tmp_path, "--search", "--list").output


def test_a_long_run_takes_as_long_as_it_is(tmp_path):
    folder = Job("unigrpo", 0).folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"system": "unigrpo", "seconds": 600}))
    arguments = ("--output-dir", tmp_path, "--only", "long_none", "--seeds", 0, "--list", "--jobs", 1)
    assert "about 30 min left" in " ".join(paper(*arguments).output.split())
    folder = Job("long_none", 1).folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"system": "long_none", "seconds": 2400}))
    assert "about 40 min left" in " ".join(paper(*arguments).output.split())


def test_options():
    quick = PaperOptions(output=None, chosen=None, jobs=1, seeds=(0, 1), quick=True)
    assert {job.system for job in quick.all_jobs} == set(QUICK_SYSTEMS) and len(quick.all_jobs) == 11
    full = PaperOptions(output=None, chosen=None, jobs=1)
    assert {job.system for job in full.all_jobs} == set(SYSTEMS)
    trained = [system for system in SYSTEMS.values() if system.method != "none"]
    thrice = [system for system in trained if system.group in ("extras", "ablations")]
    assert len(full.all_jobs) == 2 + 3 * len(thrice) + 5 * (len(trained) - len(thrice))
    search = PaperOptions(output=None, chosen=None, jobs=1, search=True)
    assert len(search.all_jobs) == 5 * len([system for system in SYSTEMS.values() if system.candidates])
    assert search.scale == Scale(70, 700, "validation")
    assert PaperOptions(output=None, chosen=None, jobs=1, generations=3).scale == Scale(3, 1050)


def test_a_start_without_its_model_is_made_anew(tmp_path):
    """Git keeps no models: a start's is needed only as long as a run that goes on from it is left."""
    start, job = Job("two_stage_refl", 0), Job("two_stage", 0)
    start.folder(tmp_path).mkdir(parents=True)
    job.folder(tmp_path).mkdir(parents=True)
    result = start.folder(tmp_path) / "run.json"
    for done, model, kept in ((True, False, True), (False, True, True), (False, False, False)):
        result.write_text("{}")
        other = job.folder(tmp_path) / "run.json"
        other.write_text("{}") if done else other.unlink(missing_ok=True)
        (start.folder(tmp_path) / "model").mkdir() if model else shutil.rmtree(
            start.folder(tmp_path) / "model", ignore_errors=True
        )
        renew_starts([start, job], tmp_path)
        assert result.exists() == kept
    assert "model/" in IGNORED


def command(*arguments):
    return [sys.executable, "-m", "trl_unigrpo.cli", "paper", *map(str, arguments)]


@pytest.mark.slow
def test_sigterm_ends_the_command_and_its_runs(tmp_path, chosen):
    output = tmp_path / "runs"
    arguments = ("--output-dir", output, "--chosen", chosen, "--only", "unigrpo", "--jobs", 2, "--rollouts", 50)
    child = subprocess.Popen(command(*arguments, "--seeds", "0,1"), stdout=subprocess.PIPE, text=True)
    histories = [Job("unigrpo", seed).folder(output) / "history.jsonl" for seed in (0, 1)]
    end = time.monotonic() + 200
    while not all(file.exists() and file.read_text() for file in histories):
        assert time.monotonic() < end and child.poll() is None
        time.sleep(0.1)
    runs = children(child.pid)
    assert len(runs) == 2
    child.send_signal(signal.SIGTERM)
    printed, _ = child.communicate(timeout=20)
    assert child.returncode == 128 + signal.SIGTERM and "The same command does the runs that are left" in printed
    for pid in runs:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not list(output.glob("*/*/run.json"))


def children(pid):
    """Ids of the processes that it started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return [int(line) for line in found.stdout.split()]


@pytest.mark.slow
def test_the_search_chooses_and_waits_for_what_it_takes_over(tmp_path):
    """SFT first, then guidance on what was chosen for it; another system added later redoes neither."""
    output, file = tmp_path / "runs", tmp_path / "new.json"
    arguments = ("--search", "--rollouts", 2, "--output-dir", output, "--chosen", file, "--jobs", 2)
    subprocess.run(command(*arguments, "--only", "sft,guided_base"), check=True)
    entries = read_entries(file)
    assert list(entries) == ["sft", "guided_base"]
    for name, mode in (("sft", "sampled"), ("guided_base", "guided")):
        runs = [json.loads((output / "search" / name / str(i) / "run.json").read_text()) for i in range(5)]
        means = [sum(run["evaluations"][mode]["learned"]) / 700 for run in runs]
        assert entries[name]["settings"] == SYSTEMS[name].candidates[means.index(max(means))]
        assert [of["reward"] for of in entries[name]["candidates"]] == pytest.approx(means, abs=1e-4)
    assert runs[0]["settings"]["learning_rate"] == load_chosen(file)["sft"]["learning_rate"]

    before = {run: run.stat().st_mtime_ns for run in output.rglob("run.json")}
    subprocess.run(command(*arguments, "--only", "text_grpo"), check=True)
    assert list(read_entries(file)) == ["sft", "text_grpo", "guided_base"]
    assert all(run.stat().st_mtime_ns == when for run, when in before.items())
