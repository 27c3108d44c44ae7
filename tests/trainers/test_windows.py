"""Which steps are stochastic, and where each sample's noise comes from."""

import pytest
import torch

from tests.helpers.tiny_unified import images_of, moved, weights
from trl_unigrpo.flow import flow_timesteps
from trl_unigrpo.trainers.windows import draw_windows


def window_of(trainer, batch_size=8, round_index=0):
    process = trainer.accelerator.process_index
    rows = range(process * batch_size, (process + 1) * batch_size)
    return draw_windows(trainer.args, trainer.generation, process, rows, round_index).tolist()


def windows_of(trainer, batch_size=8, generations=range(12)):
    drawn = []
    for generation in generations:
        trainer._step = generation * trainer.args.steps_per_generation * trainer.num_iterations
        drawn.append(window_of(trainer, batch_size))
    return drawn


def test_one_contiguous_window_per_generation_drawn_anew(make_trainer):
    drawn = windows_of(make_trainer(), generations=range(30))
    assert {tuple(window) for window in drawn} == {(0, 1, 2), (1, 2, 3), (2, 3, 4)}
    assert windows_of(make_trainer(), generations=range(30)) == drawn
    assert windows_of(make_trainer(seed=7), generations=range(30)) != drawn


def test_micro_steps_of_a_generation_have_one_window_and_one_noise(make_trainer):
    trainer = make_trainer()
    first = [window_of(trainer)]
    for step in range(1, 4):
        trainer._step = step
        first.append(window_of(trainer))
    assert all(window == first[0] for window in first)


@pytest.mark.parametrize("scope", ["generation", "sample"])
def test_each_round_has_a_window_of_its_own(make_trainer, scope):
    trainer = make_trainer(sde_window_scope=scope)
    drawn = [[window_of(trainer, round_index=number) for number in range(12)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert any(window != drawn[0][0] for window in drawn[0])


@pytest.mark.parametrize("scope", ["generation", "rank", "group", "sample"])
def test_scope_of_a_window(make_trainer, scope):
    trainer = make_trainer(sde_window_scope=scope)
    ranks = []
    for rank in (0, 1):
        trainer.accelerator.state._shared_state["process_index"] = rank
        try:
            ranks.append(windows_of(trainer))
        finally:
            trainer.accelerator.state._shared_state["process_index"] = 0
    if scope in ("generation", "rank"):
        assert all(len(window) == 3 and isinstance(window[0], int) for rank in ranks for window in rank)
        assert (ranks[0] == ranks[1]) == (scope == "generation")
        return
    for rank in ranks:
        for rows in rank:
            assert len(rows) == 8
            if scope == "group":
                assert rows[:4] == [rows[0]] * 4
                assert rows[4:] == [rows[4]] * 4
    assert any(rows[0] != rows[-1] for rows in ranks[0])
    assert ranks[0] != ranks[1]  # other groups live on the other rank
    if scope == "sample":
        assert any(rows[0] != rows[1] for rows in ranks[0])


@pytest.mark.parametrize(("mode", "expected"), [("fixed", {(0, 1, 2)}), ("scatter", None)])
def test_mode_of_a_window(make_trainer, mode, expected):
    drawn = {tuple(window) for window in windows_of(make_trainer(sde_window_mode=mode), generations=range(30))}
    assert drawn == expected if expected else len(drawn) > 3


def test_window_is_what_is_recorded(make_trainer, train):
    trainer = make_trainer(sde_window_scope="sample", max_steps=1)
    seen = train(trainer)
    trainer._step = 0
    nodes = flow_timesteps(trainer.args.num_inference_steps, trainer.args.timestep_shift).float()
    expected = sorted(nodes[window].tolist() for window in window_of(trainer))
    tables = [image.steps for image in images_of(seen.batches)]
    assert sorted(steps.t.tolist() for steps in tables) == expected
    for steps in tables:
        assert steps.x.dtype == steps.x_next.dtype == torch.float32


def test_noise_differs_between_samples_and_generations_but_not_between_runs(make_trainer, train):
    # A fixed window starts at step 0, so that the first recorded state is the noise itself.
    runs = [train(make_trainer(max_steps=4, sde_window_mode="fixed", text_weight=0.0)) for _ in range(2)]
    noises = [{image.steps.x[0].numpy().tobytes() for image in images_of(run.batches)} for run in runs]
    assert len(noises[0]) == 16  # 8 images in each of 2 generations
    assert noises[0] == noises[1]
    assert not moved(runs[0].weights[-1], runs[1].weights[-1])


def test_another_seed_is_another_run(make_trainer):
    ends = []
    for seed in (1, 2):
        trainer = make_trainer(seed=seed)
        trainer.train()
        ends.append(weights(trainer.model))
    assert moved(*ends)
