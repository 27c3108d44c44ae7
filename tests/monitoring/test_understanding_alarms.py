"""Understanding that a run costs: fixed captions of fixed images, read before, during and after."""

import pytest

from tests.helpers.readings import reads
from tests.helpers.runs import alarms_of, given, run
from tests.helpers.tiny_unified import bagel_with_tower, prompts_dataset, redness, tiny_bagel, tiny_tokenizer
from trl_unigrpo.monitoring import alarms
from trl_unigrpo.monitoring.understanding_alarms import CAPTIONS_FOLDER, ENOUGH, UnderstandingWatch
from trl_unigrpo.rewards import ReadBackReward
from trl_unigrpo.sampling.self_reader import SelfReader


NAME = "understanding/caption_log_prob"
# Eight prompts a generation, of two images each: after two generations there are captions enough.
SETTINGS = {"num_generations": 2, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
SETTINGS |= {"num_iterations": 1, "flow_weight": 0.0, "num_inference_steps": 1, "max_completion_length": 12}
SETTINGS |= {"train_dataset": prompts_dataset(copies=8), "max_grad_norm": 1e9, "lr_scheduler_type": "constant"}


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(alarms, "EVERY", 4)


def brevity(completions, **_):
    return [-float(len(text.split())) for text in completions]


def own_reader():
    """A model, and rewards of which one is its own reading."""
    model, read_back = bagel_with_tower(), ReadBackReward()
    read_back.attach(SelfReader(model, tiny_tokenizer()))
    return {"model": model, "reward_funcs": [read_back, brevity]}


def logged(trainer):
    return {entry["step"]: entry[NAME] for entry in trainer.state.log_history if NAME in entry}


@pytest.mark.parametrize(("rate", "falls"), [(2e-2, True), (1e-4, False)])
def test_a_policy_that_unlearns_to_speak_is_told_of(make_trainer, tmp_path, rate, falls):
    settings = {**SETTINGS, **own_reader(), "learning_rate": rate, "save_strategy": "no"}
    trainer = run(make_trainer, tmp_path, max_steps=7, logging_steps=2, **settings)
    assert [*logged(trainer)] == [2, 4, 7]  # before, during and after, though 7 is no step of the log's
    before, _, after = logged(trainer).values()
    assert before != after and (before - after > 0.2) == falls
    line = given(tmp_path).get("understanding/fallen")
    assert (line is not None) == falls
    if falls:
        assert line["step"] in (4, 7) and not line["stopped"] and line["indices"] == []
        assert line["values"]["before"] == pytest.approx(before) and line["values"]["now"] < before - 0.2


def test_captions_survive_a_resume_and_without_their_images_begin_anew(make_trainer, tmp_path, caplog):
    settings = {**SETTINGS, "learning_rate": 1e-3, "max_steps": 4, "save_steps": 2}
    whole = run(make_trainer, tmp_path, **settings, **own_reader())
    checkpoint = tmp_path / "checkpoint-2"
    resumed = run(make_trainer, tmp_path, checkpoint, **settings, **own_reader())
    assert alarms_of(resumed).state() == alarms_of(whole).state()
    assert logged(resumed) == logged(whole) and [*logged(whole)] == [2, 4]
    assert "compared with what it is now" not in caplog.text
    images = sorted((tmp_path / CAPTIONS_FOLDER).iterdir())
    assert len(images) == 16
    images[3].write_bytes(images[4].read_bytes())  # another run's
    again = run(make_trainer, tmp_path, checkpoint, **settings, **own_reader())
    assert "compared with what it is now" in caplog.text
    assert alarms_of(again).state() != alarms_of(whole).state()
    assert [*logged(again)] == [2, 4]  # of its third and fourth generation


def test_where_nothing_can_be_read_nothing_is(make_trainer, tmp_path, caplog):
    settings = {**SETTINGS, "max_steps": 2, "save_strategy": "no"}
    blind = run(make_trainer, tmp_path / "blind", model=tiny_bagel(), reward_funcs=reads, **settings)
    others = run(make_trainer, tmp_path / "others", model=bagel_with_tower(), reward_funcs=redness, **settings)
    for trainer, folder in ((blind, "blind"), (others, "others")):
        assert not logged(trainer) and not (tmp_path / folder / CAPTIONS_FOLDER).exists()
    (told,) = [record.message for record in caplog.records if "understanding" in record.message]
    assert "The alarm understanding/fallen is off: " in told and "tower" in told


@pytest.mark.parametrize(("drop", "rings"), [(0.18, False), (0.22, True)])
def test_the_limit_is_a_fifth_of_a_token_s_likelihood(drop, rings):
    before = [-1 - 0.01 * number for number in range(ENOUGH)]
    watch = UnderstandingWatch([f"caption {number}" for number in range(ENOUGH)], before, [0] * ENOUGH)
    found = watch.look([value - drop * (0.98 + 0.04 * (number % 2)) for number, value in enumerate(before)])
    assert [alarm.name for alarm in found] == ["understanding/fallen"] * rings
