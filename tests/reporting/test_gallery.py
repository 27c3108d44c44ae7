"""The gallery that a training writes: what it shows, when, and that nothing of it stops a run."""

import math
import re

import numpy as np
import pytest
from PIL import Image

from tests.helpers.tiny_unified import prompts_dataset, redness
from trl_unigrpo.monitoring.events import Watcher
from trl_unigrpo.monitoring.image_statistics import diversity, image_statistics
from trl_unigrpo.reporting.gallery import Gallery
from trl_unigrpo.reporting.run_files import read_run


class Notes(Watcher):
    def __init__(self):
        self.generations = []

    def on_generation(self, args, state, control, generation, **kwargs):
        self.generations.append((state.global_step, generation))


def judged(prompts, completions, images, log_extra, **_):
    log_extra("answers", [f"yes {i}" for i in range(len(images))])
    return [float(i % 4) / 4 if i else None for i in range(len(images))]


EVALUATED = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_on_start": True,
    "num_generations_eval": 1,
    "per_device_eval_batch_size": 2,
}


def test_the_gallery_holds_what_was_generated(make_trainer, tmp_path):
    notes = Notes()
    trainer = make_trainer(
        reward_funcs=[redness, judged],
        reward_weights=[0.5, 2.0],
        callbacks=[notes],
        eval_dataset=prompts_dataset(copies=1),
        max_steps=8,
        gallery_steps=4,
        **EVALUATED,
    )
    trainer.train()
    run = read_run(tmp_path)
    assert run.finished and run.problems == []
    trained = [shown for shown in run.shown if shown.mode == "train"]
    assert [shown.step for shown in trained] == [0, 4, 6]  # the first of each four steps, and the last of all
    generations = {step: found for step, found in notes.generations if found.mode == "train"}
    for shown in trained:
        found = generations[shown.step]
        assert shown.group_size == 4 and shown.total == len(shown.samples) == 8
        for i, sample in enumerate(shown.samples):
            assert (sample.prompt, sample.thinking) == (found.prompts[i], found.thinking[i])
            assert sample.advantage == pytest.approx(found.advantages[i])
            assert sample.extra["answers"] == f"yes {i}"
            values = [found.rewards["redness"][i], found.rewards["judged"][i]]
            total = 0.5 * values[0] + 2 * values[1]
            if math.isnan(total):
                assert sample.reward is None and sample.rewards == {"redness": None, "judged": None}
            else:
                assert sample.reward == pytest.approx(total, abs=1e-6)
            kept = np.asarray(Image.open(tmp_path / "gallery" / sample.image)).astype(float)
            assert np.abs(kept - np.asarray(found.images[i])).mean() < 8
    evaluated = [shown for shown in run.shown if shown.mode == "eval"]
    assert [shown.step for shown in evaluated] == [0, 2, 4, 6, 8]
    batches = [found for _, found in notes.generations if found.mode == "eval"]
    order = [*batches[0].prompts, *batches[1].prompts]
    assert sorted(order) == sorted(prompts_dataset(copies=1)["prompt"])
    for shown in evaluated:  # of two batches, put together again
        assert [sample.prompt for sample in shown.samples] == order
        assert [sample.index for sample in shown.samples] == [0, 1, 2, 3]
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert [row["reward"] for row in run.metrics if "reward" in row] == pytest.approx([e["reward"] for e in logged])
    diversities = [row["images/diversity"] for row in run.metrics if "images/diversity" in row]
    assert diversities == pytest.approx([diversity(g.statistics, 4) for g in generations.values()])
    assert run.info["max_steps"] == 8 and run.info["settings"]["num_generations"] == 4
    html = (tmp_path / "gallery.html").read_text()
    assert "Step 6" in html and html.count("data:image/jpeg") == 3 * 8 + 5 * 4


def test_it_is_whole_at_every_save_and_goes_on_after_a_resumption(make_trainer, tmp_path):
    pages = []

    class AtSave(Watcher):
        def on_save(self, args, state, control, **kwargs):
            pages.append((tmp_path / "gallery.html").read_text())

    arguments = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "gallery_steps": 2}
    trainer = make_trainer(**arguments)
    trainer.add_callback(AtSave())  # after the gallery
    trainer.train()
    assert [re.findall(r"<b>Step (\d+)", page) for page in pages] == [["0"], ["2", "0"], ["4", "2", "0"]]
    (tmp_path / "gallery" / "records.jsonl").open("a").write('{"kind": "metr')  # it crashed later
    make_trainer(**{**arguments, "max_steps": 8}).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    run = read_run(tmp_path)
    assert [shown.step for shown in run.shown] == [0, 2, 4, 6] and run.finished
    assert [row["step"] for row in run.metrics if "loss" in row] == list(range(1, 9))
    assert [row["step"] for row in run.metrics if "train_runtime" in row] == [8]  # the first run's end was none


def test_a_resumed_run_shows_what_it_would_have_shown(make_trainer, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 2, "max_steps": 10, "gallery_steps": 6, "num_iterations": 2}
    for folder, resume in (("whole", None), ("resumed", tmp_path / "whole" / "checkpoint-4")):
        make_trainer(tmp_path / folder, **arguments).train(resume_from_checkpoint=resume and str(resume))
    assert [shown.step for shown in read_run(tmp_path / "whole").shown] == [0, 6, 8]
    assert [shown.step for shown in read_run(tmp_path / "resumed").shown] == [6, 8]


def test_a_generation_is_unchanged_by_the_gallery(make_trainer, tmp_path, train):
    """Random numbers, weights and metrics of the training are those of a run without one."""
    shown = train(make_trainer(tmp_path / "with", gallery_steps=1))
    hidden = train(make_trainer(tmp_path / "without", gallery_steps=0))
    assert not (tmp_path / "without" / "gallery").exists() and not (tmp_path / "without" / "gallery.html").exists()
    for with_it, without in zip(shown.weights, hidden.weights, strict=True):
        assert all((with_it[name] == without[name]).all() for name in without)


def test_a_gallery_that_fails_does_not_stop_the_run(make_trainer, tmp_path, caplog):
    (tmp_path / "gallery").write_text("a file where the folder should be")
    trainer = make_trainer(gallery_steps=1)
    trainer.train()
    assert trainer.state.global_step == 2
    assert "The gallery failed. Training goes on." in caplog.text


def test_evaluations_of_several_datasets_are_kept_apart(make_trainer, tmp_path):
    datasets = {"easy": prompts_dataset(["a red cat"], 1), "hard": prompts_dataset(["a small tree"], 1)}
    trainer = make_trainer(eval_dataset=datasets, gallery_steps=50, **{**EVALUATED, "per_device_eval_batch_size": 1})
    trainer.train()
    evaluated = [shown for shown in read_run(tmp_path).shown if shown.mode == "eval"]
    assert {(s.dataset, s.samples[0].prompt) for s in evaluated} == {("easy", "a red cat"), ("hard", "a small tree")}
    assert len(evaluated) == 4


def test_long_evaluations_keep_few_images_in_memory(make_trainer):
    trainer = make_trainer(
        eval_dataset=prompts_dataset(["a red cat"], 40),
        gallery_steps=50,
        **{**EVALUATED, "per_device_eval_batch_size": 8},
    )
    gallery = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Gallery))
    kept = []

    class Count(Watcher):
        def on_prediction_step(self, *args, **kwargs):
            kept.append(sum(len(images) for _, (images, _) in gallery._evaluated))

    trainer.add_callback(Count())
    trainer.evaluate()
    assert max(kept) == 16 and len(kept) == 5


def test_diversity_is_the_mean_distance_of_pairs_within_groups():
    def grey(*levels):
        return [image_statistics(Image.new("RGB", (32, 32), (level,) * 3)) for level in levels]

    assert diversity(grey(0, 0, 255, 255), 2) == 0
    assert diversity(grey(0, 255, 255, 255), 2) == pytest.approx(0.5)
    assert diversity(grey(0, 51, 255), 3) == pytest.approx((0.2 + 1 + 0.8) / 3)
    assert math.isnan(diversity(grey(0, 1), 1))
    half = Image.new("RGB", (32, 32))
    half.paste((255, 255, 255), (0, 0, 16, 32))
    assert diversity([image_statistics(half), *grey(0)], 2) == pytest.approx(math.sqrt(0.5))


def test_nothing_is_written_by_other_processes(make_trainer, tmp_path):
    trainer = make_trainer(gallery_steps=1)
    trainer.state.is_world_process_zero = False
    gallery = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Gallery))
    gallery.on_log(trainer.args, trainer.state, trainer.control, logs={"reward": 1.0})
    gallery.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    gallery.on_save(trainer.args, trainer.state, trainer.control)
    assert list(tmp_path.iterdir()) == []


def test_texts_of_any_kind_go_through_a_training(make_trainer, tmp_path):
    prompts = ["<script>alert(1)</script>", "a" * 300, "قطة 红猫 🐈‍⬛", "null \x00 and \x1b[31m"]

    def judged(images, log_extra, **_):
        log_extra("notes", ["</div><script>", None, "\ud83d", {"a": math.nan}] * (len(images) // 4))
        return [float(i) for i in range(len(images))]

    make_trainer(reward_funcs=judged, train_dataset=prompts_dataset(prompts), gallery_steps=1).train()
    run = read_run(tmp_path)
    assert {sample.prompt for sample in run.shown[0].samples} <= set(prompts)
    html = (tmp_path / "gallery.html").read_text(encoding="utf-8")
    assert "<script" not in html and "\x00" not in html and run.problems == []


def test_alarms_of_a_training_are_on_its_page(make_trainer, tmp_path):
    """Half of the rewards fail: whichever alarms that raises stand on the page as they stand in alarms.jsonl."""

    def fails(images, **_):
        return [float(i) if i % 2 else None for i in range(len(images))]

    make_trainer(reward_funcs=fails, gallery_steps=1, max_steps=8, alarms="warn").train()
    alarms = read_run(tmp_path).alarms
    assert any("none" in alarm.name or "fail" in alarm.name for alarm in alarms)
    html = (tmp_path / "gallery.html").read_text(encoding="utf-8")
    assert all(alarm.name in html for alarm in alarms) and "No alarm was raised" not in html
