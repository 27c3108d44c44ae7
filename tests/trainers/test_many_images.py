"""Trajectories of one, two or three images, in one round or two, through the real trainer."""

import functools

import pytest
import torch

from tests.helpers.many_images import (
    ManyImages,
    SeesAndPaintsOneByOne,
    assert_equations,
    images,
    seeing_bagel,
    velocities,
)
from tests.helpers.runs import assert_equal_runs, run
from tests.helpers.tiny_unified import SPECIAL, WORDS, FixedTexts
from tests.helpers.toy_painter import toy_painter
from trl_unigrpo.trajectory import Steps, in_order


toy = functools.partial(toy_painter, len(SPECIAL) + len(WORDS) + 3)

# An optimizer step for each micro-batch: the old velocities are computed before the first.
UPDATES = {"gradient_accumulation_steps": 1, "steps_per_generation": 2, "max_steps": 4}

MODELS = {"packs": seeing_bagel, "one-by-one": functools.partial(seeing_bagel, SeesAndPaintsOneByOne), "toy": toy}


@pytest.fixture
def trained(make_trainer, train, tmp_path):
    """Function that trains a model for the two passes of one generation, and returns what the optimizer saw."""

    def run_passes(make_model, trainer_class=ManyImages, **settings):
        plain = {"max_grad_norm": 0.0, "learning_rate": 0.5, "image_learning_rate": 0.05, "optim": "sgd"}
        model, folder = make_model(), tmp_path / str(len(list(tmp_path.iterdir())))
        trainer = make_trainer(folder, model=model, trainer_class=trainer_class, **{**plain, **settings})
        return trainer, train(trainer)

    return run_passes


def trajectories_of(seen):
    """Those of the first generation, as they were shuffled."""
    found = {t.row: t for batch in seen.batches for t in batch["trajectories"]}
    return list(found.values())


def test_what_is_trained_on_has_several_rounds_and_ragged_windows(trained):
    _, seen = trained(seeing_bagel, max_steps=1)
    rows = trajectories_of(seen)
    assert [t.row for t in rows] != sorted(t.row for t in rows)
    found = {t.row: [(number, len(image.steps)) for number, image in t.painted()] for t in rows}
    assert found == {
        0: [(0, 1)],
        1: [(0, 2), (1, 3)],
        2: [(0, 3), (1, 1), (1, 2)],
        3: [(0, 0), (0, 2)],
        4: [(0, 2)],
        5: [(0, 3), (1, 1)],
        6: [(0, 1), (1, 2), (2, 3)],
        7: [(0, 0), (0, 0)],
    }
    every = [image for t in rows for image in images(t)]
    assert len({image.seed for image in every}) == len({image.latents.numpy().tobytes() for image in every}) == 16
    for row, seen_last in ((2, 0), (6, 1)):
        painted = images(next(t for t in rows if t.row == row))
        shown = [image.context.images for image in painted]
        assert [len(context) for context in shown] == [0, 1, 1]
        assert torch.equal(shown[1][0].latents, painted[0].latents)
        assert torch.equal(shown[2][0].latents, painted[seen_last].latents)
        assert (shown[1][0] is shown[2][0]) == (seen_last == 0)
        assert torch.equal(painted[1].context.ids, painted[2].context.ids)


@pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS)
def test_velocities_of_a_table_are_those_of_each_step_on_its_own(trained, make_model):
    trainer, seen = trained(make_model, max_steps=2)
    single, double = trainer.unified, make_model()
    double.load_state_dict(single.state_dict(), strict=False)
    double.double()
    rows = trajectories_of(seen)
    with torch.no_grad():
        steps = Steps.of(rows)
        together = in_order(single.velocities(steps))
        alone = torch.stack([v for t in rows for image in images(t) for v in velocities(double, image, False)])
    torch.testing.assert_close(together.double(), alone, rtol=0, atol=1e-6)
    assert alone.std() > 0.05


@pytest.mark.parametrize(
    ("make_model", "settings"),
    [
        (seeing_bagel, {"image_learning_rate": 2.0}),
        (seeing_bagel, {"image_learning_rate": 2.0, "flow_context_grad": "full"}),
        pytest.param(seeing_bagel, {"image_learning_rate": 2.0, "flow_old_source": "rollout"}, marks=pytest.mark.slow),
        (seeing_bagel, {**UPDATES, "image_learning_rate": 2.0}),
        (seeing_bagel, {"image_objective": "fpo", "matching_samples": 3, "image_learning_rate": 0.02}),
        pytest.param(
            seeing_bagel,
            {"image_objective": "awm", "matching_samples": 3, "image_learning_rate": 0.02},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            seeing_bagel,
            {"image_objective": "nft", "matching_samples": 3, "image_learning_rate": 0.002},
            marks=pytest.mark.slow,
        ),
        pytest.param(toy, {}, marks=pytest.mark.slow),  # as "toy-reference", which goes on for a generation
        pytest.param(toy, {"flow_context_grad": "full"}, marks=pytest.mark.slow),
        (toy, {"image_objective": "awm", "matching_samples": 3, "image_learning_rate": 0.002}),
        (toy, {"flow_regularizer_weight": 0.01, "max_steps": 4}),
    ],
    ids=["packs", "packs-full", "packs-rollout", "packs-updates", "packs-fpo", "packs-awm", "packs-nft"]
    + ["toy", "toy-full", "toy-awm", "toy-reference"],
)
def test_losses_and_gradients_are_those_of_the_equations(trained, make_model, settings):
    trainer, seen = trained(make_model, **settings)
    assert_equations(make_model, trainer, seen, settings)
    logs = trainer.state.log_history
    if "flow/log_ratio_std" in logs[0]:
        own = "flow_old_source" not in settings and trainer.args.gradient_accumulation_steps > 1
        assert logs[0]["flow/ratio_mean"] == 1
        assert logs[0]["flow/log_ratio_std"] == (0 if own else pytest.approx(0, abs=1e-8))
        last = logs[len(seen.weights) - 1]
        assert last["flow/log_ratio_std"] > 1e-6
        assert 0 < last["flow/clip_frac"] < 1


@pytest.mark.parametrize(
    ("trainer_class", "settings"),
    [(FixedTexts, {}), (ManyImages, {"guidance_scale": 2.0})],
    ids=["one-image", "many-guided-images"],
)
def test_model_that_does_not_pack_trains_as_its_twin_that_does(trained, trainer_class, settings):
    (one, alone), (other, packed) = (
        trained(make_model, trainer_class, **settings) for make_model in (MODELS["one-by-one"], seeing_bagel)
    )
    for step in range(2):
        for name, gradient in packed.gradients[step].items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(
                alone.gradients[step][name], gradient, rtol=1e-3, atol=2e-5 * scale + 1e-10, msg=name
            )
        logs = [trainer.state.log_history[step] for trainer in (one, other)]
        names = ["loss", "grad_norm"] + ["flow/loss", "flow/velocity_mse"] * (trainer_class is FixedTexts)
        for name in names:
            assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-3, abs=1e-7), name


@pytest.mark.parametrize(
    ("make_model", "settings"),
    [
        (seeing_bagel, {}),
        (seeing_bagel, {"image_objective": "fpo"}),
        (seeing_bagel, {"guidance_scale": 2.0}),
        (toy, {}),
    ],
    ids=["noise", "lines", "guidance", "toy"],
)
def test_run_that_stops_between_passes_ends_where_it_would_have(make_trainer, tmp_path, make_model, settings):
    def begin(folder, resume=None):
        brief = {"max_steps": 4, "save_steps": 3, "gallery_steps": 0, **settings}
        return run(make_trainer, folder, resume, model=make_model(), trainer_class=ManyImages, **brief)

    whole = begin(tmp_path / "whole")
    resumed = begin(tmp_path / "resumed", tmp_path / "whole" / "checkpoint-3")
    assert_equal_runs(whole, resumed, 3)
    assert whole.state.log_history[3]["flow/log_ratio_std"] > 0
