"""A checkpoint gets its name when it is whole, a run goes on from no other, and what stops one says what to do."""

import json
import resource
import shutil
from pathlib import Path

import pandas as pd
import pytest
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from tests.helpers.runs import assert_equal_runs, run
from tests.helpers.sft import make_sft
from tests.helpers.tiny_unified import PROMPTS, build_trainer, moved, prompts_dataset, weights
from trl_unigrpo.trainers.whole_checkpoints import UNFINISHED, fault_of


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("finished")
    build_trainer(folder, save_strategy="steps", save_steps=1, image_objective="nft", ema_decay=0.5).train()
    return folder


@pytest.fixture
def two(finished, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "two"))


def cut(file):
    file.write_bytes(file.read_bytes()[:-20])


@pytest.mark.parametrize(
    "name",
    ["trainer_state.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "rollouts_0.pt", "averages.pt"],
)
def test_file_that_is_cut_off_is_found(two, name):
    whole, broken = two / "checkpoint-1", two / "checkpoint-2"
    assert fault_of(whole) is fault_of(broken) is None
    cut(broken / name)
    assert fault_of(broken).startswith(f"{name} is cut off")
    with pytest.raises(ValueError, match=rf"checkpoint-2' is not a whole checkpoint: {name} is cut off.*Name an earl"):
        build_trainer(two).train(resume_from_checkpoint=str(broken))


def test_what_is_not_whole_is_passed_over_and_named(two):
    settings = {"save_strategy": "steps", "save_steps": 1, "image_objective": "nft", "ema_decay": 0.5}
    (two / "checkpoint-2" / "trainer_state.json").unlink()
    shutil.copytree(two / "checkpoint-2", two / UNFINISHED / "checkpoint-3")
    resumed = build_trainer(two, **settings)
    message = (
        r"goes on from \S+/checkpoint-1\. Not whole, and passed over: \S+/_unfinished/checkpoint-3: the run ended "
        r"while it was written; \S+/checkpoint-2: it has no trainer_state.json\."
    )
    with pytest.warns(UserWarning, match=message):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2
    assert sorted(path.name for path in two.iterdir() if path.is_dir()) == ["checkpoint-1", "checkpoint-2"]
    assert fault_of(two / "checkpoint-2") is None


def test_finished_run_tidies_up_what_a_kill_left(two):
    """It fell when the last checkpoint had its name, before the old ones went."""
    shutil.copytree(two / "checkpoint-1", two / UNFINISHED / "old-checkpoint-0")
    settings = {"save_strategy": "steps", "save_steps": 1, "image_objective": "nft", "ema_decay": 0.5}
    build_trainer(two, save_total_limit=1, **settings).train(resume_from_checkpoint=True)
    assert [path.name for path in two.iterdir() if path.is_dir()] == ["checkpoint-2"]


def test_no_checkpoint_to_go_on_from(two, tmp_path):
    trainer = build_trainer(tmp_path / "empty")
    with pytest.raises(
        ValueError, match=r"resume_from_checkpoint=True, but \S+/empty holds no whole checkpoint\. Train"
    ):
        trainer.train(resume_from_checkpoint=True)
    for folder in two.glob("checkpoint-*"):
        cut(folder / "optimizer.pt")
    with pytest.raises(
        ValueError, match=r"no whole checkpoint \(\S+/checkpoint-2: optimizer.pt is cut off; .*-1: opt"
    ):
        build_trainer(two).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"checkpoint-7' is not a whole checkpoint: there is no such folder"):
        build_trainer(two).train(resume_from_checkpoint=str(two / "checkpoint-7"))


def test_best_limit_and_upload_see_whole_checkpoints(tmp_path, monkeypatch):
    pushed = []

    def push(self, checkpoint_folder):
        folder = Path(checkpoint_folder)
        pushed.append((folder.name, fault_of(folder), (folder / "rollouts_0.pt").is_file()))

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    seen = []

    class Saved(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen.append((state.best_global_step, state.best_model_checkpoint))

    trainer = build_trainer(
        tmp_path,
        reward_funcs=lambda prompts, completions, images, **_: [1.0 / (1 + trainer.state.global_step)] * len(images),
        eval_dataset=prompts_dataset(PROMPTS[:1], copies=1),
        callbacks=[Saved()],
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="eval_reward",
        load_best_model_at_end=True,
    )
    trainer.args.push_to_hub = True
    trainer._finish_current_push = lambda: None
    trainer.train()
    best = str(tmp_path / "checkpoint-1")
    assert seen == [(1, best)] * 3
    assert pushed == [(f"checkpoint-{step}", None, True) for step in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["checkpoint-1", "checkpoint-3"]
    for step in (1, 3):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == best


class Until(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, work):
        self.step, self.work = step, work

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.work()


@pytest.mark.parametrize("room", [100_000, 250_000], ids=["weights", "optimizer"])
def test_disk_that_is_full_costs_no_checkpoint(tmp_path, room):
    """The system refuses larger files, as it does on a full disk: by safetensors' writer, and by torch's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = Until(2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard)))
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    message = r"ended after step 2\. .*checkpoint-1 is whole\. Make room there .*resume_from_checkpoint=True"
    try:
        with pytest.raises(OSError, match=message) as caught:
            build_trainer(tmp_path, callbacks=[full], **settings).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path / UNFINISHED / "checkpoint-2") in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-1"]
    resumed = build_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    whole = build_trainer(tmp_path / "whole", **settings)
    whole.train()
    assert_equal_runs(whole, resumed, 1)


@pytest.mark.parametrize("make", [build_trainer, make_sft])
def test_folder_that_can_t_be_written_to(tmp_path, make):
    (tmp_path / "file").write_text("in the place of the folder")
    with pytest.raises(
        NotADirectoryError, match=r"output_dir='\S+/file/run' can't be written to: Not a dir.*Make it wri"
    ):
        make(tmp_path / "file" / "run", save_strategy="steps")


def test_dataset_that_vanishes_costs_no_step(tmp_path):
    files = [tmp_path / f"{i}.txt" for i in range(8)]  # rows are read from them when they are asked for
    for file, prompt in zip(files, PROMPTS * 2, strict=True):
        file.write_text(prompt)
    rows = Dataset.from_dict({"prompt": list(map(str, files))})
    rows = rows.with_transform(lambda batch: {"prompt": [Path(file).read_text() for file in batch["prompt"]]})
    settings = {"train_dataset": rows, "save_strategy": "epoch", "num_iterations": 1, "max_steps": 8}
    whole = build_trainer(tmp_path / "whole", **settings)
    whole.train()
    lost = files[3]
    trainer = build_trainer(tmp_path / "run", callbacks=[Until(1, lost.unlink)], **settings)
    message = (
        r"Training ended after step (\d)\. No such file or directory: \S+/3\.txt\. \S+/checkpoint-\1 is whole\. Put "
        r"it back where it was, and go on with `train\(resume_from_checkpoint=True\)`"
    )
    with pytest.raises(FileNotFoundError, match=message):
        trainer.train()
    lost.write_text(PROMPTS[3])
    resumed = build_trainer(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    assert not moved(weights(whole.model), weights(resumed.model))


def test_log_that_had_begun_goes_on(make_trainer, tmp_path):
    """Its averages, and inside of a generation the table of its texts."""
    settings = {"max_steps": 4, "logging_steps": 4, "log_completions": True}
    whole = run(make_trainer, tmp_path / "whole", **settings)
    for stop in (2, 3):
        folder = tmp_path / f"resumed-{stop}"
        resumed = run(make_trainer, folder, tmp_path / "whole" / f"checkpoint-{stop}", **settings)
        logs = [trainer.state.log_history[0] for trainer in (whole, resumed)]
        names = {name for name in logs[0] if "time" not in name}
        assert {name: logs[0][name] for name in names} == {name: logs[1][name] for name in names}
        assert logs[0]["loss"] != 0
        tables = [
            pd.read_parquet(one / "completions" / "completions_00004.parquet") for one in (tmp_path / "whole", folder)
        ]
        pd.testing.assert_frame_equal(*tables)
        assert len(tables[0]) == 8
