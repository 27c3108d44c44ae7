"""The loss that UniGRPO's optimizer sees, against the paper's formulas written out by hand."""

import pytest
import torch

from tests.helpers.oracle import oracle
from tests.helpers.tiny_unified import FixedTexts


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({}, 1.0),
        ({"flow_context_grad": "full", "sde_window_scope": "sample"}, 0.25),
        ({"ratio_norm": False, "flow_regularizer": "latent_kl"}, 0.5),
        pytest.param({"sde_type": "cps", "flow_regularizer": "latent_kl_flow_grpo"}, 0.25, marks=pytest.mark.slow),
        pytest.param({"text_weight": 0.5, "flow_weight": 2.0}, 0.25, marks=pytest.mark.slow),
        ({"guidance_scale": 3.0, "num_inference_steps": 6, "sde_window_size": 5}, 0.25),
        pytest.param({"guidance_scale": 3.0, "flow_context_grad": "full"}, 1.0, marks=pytest.mark.slow),
        ({"image_objective": "fpo", "matching_samples": 5}, 0.02),
        pytest.param(
            {"image_objective": "awm", "matching_samples": 4, "flow_context_grad": "full"},
            0.02,
            marks=pytest.mark.slow,
        ),
        pytest.param({"image_objective": "awm", "guidance_scale": 2.0}, 0.02, marks=pytest.mark.slow),
        ({"image_objective": "nft", "text_weight": 0.0}, 0.002),
    ],
    ids=["paper", "full-context-gradient", "plain-ratio-kl", "cps", "weights", "guidance", "guidance-full", "unifpo"]
    + ["awm-full", "awm-guidance", "nft"],
)
def test_gradients_of_both_passes_are_those_of_the_formulas(make_trainer, train, settings, rate):
    # Rates that move some of the ratios, but not all, past the clip ranges.
    trainer = make_trainer(
        max_grad_norm=0.0,
        learning_rate=0.5,
        image_learning_rate=rate,
        optim="sgd",
        trainer_class=FixedTexts,
        **settings,
    )
    seen = train(trainer)

    rollout_weights, fixed = seen.weights[0], {}
    for step in range(2):
        batches = seen.batches[2 * step : 2 * step + 2]
        expected, loss = oracle(batches, seen.weights[step], rollout_weights, settings, fixed)
        assert trainer.state.log_history[step]["loss"] == pytest.approx(loss, abs=2e-6)
        for name, gradient in seen.gradients[step].items():
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=5e-5 * scale + 1e-9, msg=name)
    second = trainer.state.log_history[1]
    if settings.get("image_objective") != "nft":
        assert second["flow/log_ratio_std"] > 0
        assert 0 < second["flow/clip_frac"] < 1
    if settings.get("text_weight") != 0:
        assert second["clip_ratio/region_mean"] > 0
