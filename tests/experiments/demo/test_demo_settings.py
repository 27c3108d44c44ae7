"""The demo's settings, for which alone the tables of docs/shapeworld.md hold."""

from trl_unigrpo.experiments.demo.paint import UNIGRPO, PaintTask
from trl_unigrpo.shapeworld import demo_settings
from trl_unigrpo.shapeworld.settings import fast_settings


def test_settings_are_those_that_were_measured():
    settings = demo_settings()
    chosen = {"learning_rate": 4e-4, "image_learning_rate": 1.5e-4, "max_steps": 280, "lr_scheduler_type": "linear"}
    chosen |= {"num_generations": 16, "per_device_train_batch_size": 192, "num_inference_steps": 10}
    assert {name: settings[name] for name in chosen} == chosen
    assert not {"flow_epsilon", "flow_regularizer_weight", "num_iterations", "noise_level"} & set(settings)
    paper = PaintTask(UNIGRPO)
    assert (paper.rollouts, paper.settings(140)) == (140, settings)


def test_the_fast_settings_are_those_that_were_measured():
    """Those of docs/performance.md."""
    settings = fast_settings()
    chosen = {"learning_rate": 6e-4, "image_learning_rate": 4e-4, "max_steps": 100, "lr_scheduler_type": "linear"}
    chosen |= {"num_generations": 8, "scout_generations": 16, "per_device_train_batch_size": 96}
    chosen |= {"num_inference_steps": 6, "scout_num_inference_steps": 6}
    chosen |= {"image_objective": "nft", "matching_samples": 3, "flow_regularizer": "none"}
    assert {name: settings[name] for name in chosen} == chosen
    fast = PaintTask()
    assert (fast.rollouts, fast.settings(50)) == (50, settings)
