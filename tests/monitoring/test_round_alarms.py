"""Rounds that go wrong: each fault is made in a run, found, and told of the images that have it."""

from dataclasses import asdict

import pytest
from datasets import Dataset
from PIL import Image

from tests.helpers.editing import tiny_editor
from tests.helpers.rounds import STOP, FixedRounds, rounds_trainer
from tests.helpers.runs import alarms_of, given
from tests.helpers.tiny_unified import PROMPTS, FixedTexts, redness
from trl_unigrpo.monitoring.events import Generation, RoundNote
from trl_unigrpo.monitoring.round_alarms import LONG_WINDOW, WINDOW, RoundWatch, round_metrics


STEPS = {"num_iterations": 1}  # of which each is a generation


def image(level, first=0):
    """Grey with a red corner, whose size is a little of its own."""
    made = Image.new("RGB", (8, 8), (level,) * 3)
    made.paste((255, 0, 0), (0, 0, 4 + first, 4))
    return made


class Keeps(FixedRounds):
    def _sampled_texts(self, trajectories):
        return [STOP for _ in trajectories]


class Seen(FixedRounds):
    """A trainer whose images look as `seen(row, round)` says; the policy paints all the same."""

    def _painted(self, trajectories):
        super()._painted(trajectories)
        return [self.seen(t.row, len(t.rounds) - 1) for t in trajectories]

    def seen(self, row, number):
        return image(10 + 20 * row + 40 * number, row % 4)


class Copies(Seen):
    def seen(self, row, number):
        return super().seen(row, 0).point(lambda level: level + 2 * number)  # a VAE leaves no exact copy


class Spoils(Seen):
    def seen(self, row, number):
        return Image.new("RGB", (8, 8), "black") if number and row % 4 != 2 else super().seen(row, number)


def perfect(images, **_):
    return [1.0 for _ in images]


@pytest.mark.parametrize("rewarded", [redness, perfect])
def test_a_policy_that_always_keeps_is_seen(tmp_path, rewarded):
    rounds_trainer(tmp_path, Keeps, reward_funcs=rewarded, max_steps=WINDOW, **STEPS).train()
    lines = given(tmp_path)
    if rewarded is perfect:  # then it is right to keep
        assert "rounds/kept" not in lines
        return
    line = lines["rounds/kept"]
    assert line["step"] == WINDOW - 1 and line["indices"] == list(range(8)) and not line["stopped"]
    assert line["values"]["share"] == 1 and 0.3 < line["values"]["reward"] < 0.9


def test_a_round_that_copies_what_it_sees_is_seen(tmp_path):
    trainer = rounds_trainer(tmp_path, Copies, max_steps=WINDOW, **STEPS)
    trainer.train()
    line = given(tmp_path)["rounds/unchanged"]
    assert line["step"] == WINDOW - 1 and line["indices"] == [0, 1, 2, 4, 5, 6]  # 3 and 7 keep theirs
    assert "images of round 2 look like the one before" in line["message"]
    log = trainer.state.log_history[0]
    assert log["rounds/unchanged_2"] == 1 and 0 < log["rounds/change_2"] < 0.02
    assert "rounds/change_1" not in log


def test_an_edit_that_copies_its_source_is_seen(make_trainer, tmp_path):
    class CopiesSource(FixedTexts):
        def _painted(self, trajectories):
            painted = super()._painted(trajectories)
            sources = [row["source_images"][0] for row in self._progress.inputs]
            return [source.resize(image.size) for source, image in zip(sources, painted, strict=True)]

    sources = [Image.new("RGB", (16, 8), (60 * number, 100, 200)) for number in range(4)]
    data = Dataset.from_dict({"prompt": PROMPTS, "source_image": sources})
    settings = {"model": tiny_editor(), "train_dataset": data, "max_steps": WINDOW, **STEPS}
    make_trainer(trainer_class=CopiesSource, **settings).train()
    line = given(tmp_path)["rounds/unchanged"]
    assert "images of round 1" in line["message"] and line["indices"] == list(range(8))


def test_a_round_that_spoils_its_image_is_seen(tmp_path):
    rounds_trainer(tmp_path, Spoils, max_steps=LONG_WINDOW, **STEPS).train()
    line = given(tmp_path)["rounds/worse"]
    assert line["step"] == LONG_WINDOW - 1 and "round 2" in line["message"]
    assert set(line["indices"]) >= {0, 1, 5} and not {3, 7} & set(line["indices"])  # which keep theirs


def test_rounds_that_go_well_give_no_alarm(tmp_path):
    trainer = rounds_trainer(tmp_path, Seen, max_steps=LONG_WINDOW, **STEPS)
    trainer.train()
    assert not [name for name in given(tmp_path) if name.startswith("rounds/")]
    assert trainer.state.log_history[0]["rounds/change_2"] > 0.1
    assert trainer.state.log_history[0]["rounds/unchanged_2"] == 0
    # What is known of them is in checkpoints, and comes back.
    watch = alarms_of(trainer)._rounds
    assert RoundWatch(**asdict(watch)) == watch and len(watch.gains["2"]) == LONG_WINDOW


def generation(rounds, weight=1.0):
    return Generation("train", 2, [], [], [], [], {}, {"judge": weight}, [], {}, rounds=rounds)


def note(reward, before=None, kept=False, change=None):
    return RoundNote("", reward, before, 0.0, kept, change)


def alarms(rounds, generations=LONG_WINDOW, **settings):
    watch = RoundWatch()
    for _ in range(generations):
        found = watch.look(generation(rounds, **settings))
    return {alarm.name: alarm.values for alarm in found}


@pytest.mark.parametrize(
    ("kept", "reward", "given"), [(10, 0.5, True), (9, 0.5, False), (10, 0.95, False), (10, None, False)]
)
def test_keeping_is_an_alarm_only_where_it_is_too_much(kept, reward, given):
    rounds = [[note(0.5), note(reward if i < kept else 0.6, 0.5, kept=i < kept)] for i in range(10)]
    assert ("rounds/kept" in alarms(rounds)) == given


def test_a_reward_of_another_scale_is_perfect_at_its_best():
    keep, best = [note(12.0), note(12.0, 12.0, kept=True)], [note(25.0)]
    assert alarms([keep] * 4 + [best])["rounds/kept"] == {"share": 1, "reward": 12}
    assert "rounds/kept" not in alarms([keep] * 4)  # for all that is known, nothing is better


@pytest.mark.parametrize(("reward", "given"), [(-1.0, False), (-1.1, False), (-1.5, True)])
def test_keeping_is_judged_alike_where_rewards_are_below_zero(reward, given):
    keep, others = [note(reward), note(reward, reward, kept=True)], [[note(-1.0)], [note(-3.0)]]
    assert ("rounds/kept" in alarms([keep] * 4 + others)) == given


@pytest.mark.parametrize(
    ("changes", "given"),
    [([0.0, 0.0, 0.5], True), ([0.0, 0.5], False), ([0.019, 0.02], False), ([0.019, None], True), ([None] * 2, False)],
)
def test_copies_are_an_alarm_where_they_are_most_of_what_was_painted(changes, given):
    assert ("rounds/unchanged" in alarms([[note(1.0), note(1.0, change=change)] for change in changes])) == given


@pytest.mark.parametrize(
    ("gains", "given"),
    [([-1, -1, 0, 0], True), ([-1, 0, 0, 0], True), ([1, -1, 1, -1], False), ([1, 1, 1, -1], False), ([0] * 4, False)],
)
def test_more_worse_than_better_is_an_alarm(gains, given):
    rounds = [[note(0.5), note(0.5 + 0.1 * gain, 0.5)] for gain in gains]
    assert ("rounds/worse" in alarms(rounds)) == given
    assert "rounds/worse" not in alarms(rounds, LONG_WINDOW - 1)


def test_images_that_were_kept_are_neither_worse_nor_better():
    spoilt, kept = [note(0.5), note(0.1, 0.5)], [note(0.5), note(0.5, 0.5, kept=True)]
    assert alarms([spoilt, kept])["rounds/worse"] == {"gain": -1}


def test_the_changes_of_a_round_are_those_of_what_it_painted():
    rounds = [[note(1.0), note(1.0, change=0.25)], [note(1.0), note(1.0, change=0.01)], [note(1.0)]]
    assert round_metrics(generation(rounds)) == {"rounds/change_2": 0.13, "rounds/unchanged_2": 0.5}
    assert round_metrics(generation([])) == {}
