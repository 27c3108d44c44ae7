"""Seconds of the phases, and a bar for the slow ones."""

import re
import threading
import time

import pytest

from trl_unigrpo.monitoring.progress import Phases


def test_phases_count_their_own_seconds_alone():
    ended = []
    phases = Phases(lambda name, seconds: ended.append((name, seconds)))
    phases.begin("update")
    time.sleep(0.05)
    phases.begin("update")  # runs already
    with phases("think"):
        time.sleep(0.1)
    time.sleep(0.05)
    phases.end("update")
    phases.end("update")
    assert [name for name, _ in ended] == ["think", "update"]
    assert [seconds for _, seconds in ended] == pytest.approx([0.1, 0.1], abs=0.04)


def test_a_phase_that_fails_ends():
    ended = []
    phases = Phases(lambda name, seconds: ended.append(name), shows=True)

    def fails():
        with phases("paint"):
            phases.begin("inner")
            raise ValueError

    with pytest.raises(ValueError):
        fails()
    assert ended == ["inner", "paint"]


def test_phases_that_an_error_broke_off_are_stopped():
    ended = []
    phases = Phases(lambda name, seconds: ended.append((name, seconds)), shows=True)
    phases.begin("update")
    phases.begin("inner")
    time.sleep(0.1)
    phases.stop()
    assert not ended and not drawing()
    phases.begin("update")
    phases.end("update")
    ((name, seconds),) = ended
    assert name == "update" and seconds < 0.05


@pytest.mark.parametrize("part", ["_get_per_token_logps_and_entropies", "_flow_loss"])
def test_error_in_an_update_ends_it(make_trainer, part):
    trainer = make_trainer(disable_tqdm=False)
    compute, calls = getattr(trainer, part), []

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return compute(*args, **kwargs)

    setattr(trainer, part, fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert not drawing()
    assert trainer._progress.forward is None and not trainer._progress.metrics
    assert "time/update" not in trainer._metrics["train"]
    trainer.train()
    assert trainer.state.global_step == 2


def drawing():
    """Threads of bars."""
    return [thread for thread in threading.enumerate() if "_draw" in thread.name]


def test_slow_phases_have_a_bar_that_knows_the_last_time(capsys):
    phases = Phases(lambda name, seconds: None, shows=True, slow=0.3)
    with phases("reward"):
        pass
    assert capsys.readouterr().err == ""
    with phases("paint"):
        time.sleep(1.3)
    shown = capsys.readouterr().err
    assert "paint: " in shown and "%" not in shown
    with phases("paint"):
        time.sleep(0.1)
    assert re.search(r"paint: +0%.*0/1", capsys.readouterr().err)
    with Phases(lambda name, seconds: None, slow=0.0)("quiet"):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_times_of_a_step(make_trainer):
    def slow(images, **_):
        time.sleep(0.3)
        return [float(i) for i in range(len(images))]

    trainer = make_trainer(reward_funcs=slow, max_steps=2)
    paint = trainer._paint

    def slow_paint(conditioning):
        time.sleep(0.2)
        return paint(conditioning)

    trainer._paint = slow_paint
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert 0.3 <= first["time/reward"] < 0.4 and first["time/paint"] >= 0.2
    assert first["time/images_per_second"] == pytest.approx(8 / first["time/paint"])
    parts = ("think", "paint", "reward", "old_and_reference", "update")
    assert sum(first[f"time/{part}"] for part in parts) == pytest.approx(first["step_time"], rel=0.25)
    assert second["time/update"] < first["step_time"] - 0.5 and "time/reward" not in second
