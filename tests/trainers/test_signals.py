"""A run that is told to stop saves first, and goes on where it stopped."""

import os
import signal

import pytest

from tests.helpers.runs import assert_equal_runs, run
from tests.helpers.tiny_unified import redness


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_the_run_goes_on_exactly(make_trainer, tmp_path, number):
    calls = []

    def interrupted(**columns):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return redness(**columns)

    interrupted.__name__ = redness.__name__
    before = signal.getsignal(number)
    whole = run(make_trainer, tmp_path / "whole", save_steps=100)
    stopped = run(make_trainer, tmp_path / "stopped", save_steps=100, reward_funcs=interrupted)
    assert stopped.state.global_step == 3
    assert signal.getsignal(number) == before
    resumed = run(make_trainer, tmp_path / "resumed", tmp_path / "stopped" / "checkpoint-3", save_steps=100)
    assert_equal_runs(whole, resumed, 3)


@pytest.fixture
def terminal():
    """SIGINT as in a terminal: a job started in the background by a shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("terminal")
def test_interrupt_is_an_interrupt_where_nothing_is_saved(make_trainer, tmp_path):
    def interrupted(**columns):
        os.kill(os.getpid(), signal.SIGINT)
        return redness(**columns)

    with pytest.raises(KeyboardInterrupt):
        make_trainer(output_dir=tmp_path, save_strategy="no", reward_funcs=interrupted).train()
