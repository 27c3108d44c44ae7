"""The demo's settings, for which alone the tables of docs/shapeworld.md hold."""

from trl_unigrpo.experiments.demo.paint import PaintTask
from trl_unigrpo.shapeworld import demo_settings


def test_settings_are_those_that_were_measured():
    settings = demo_settings()
    chosen = {"learning_rate": 4e-4, "image_learning_rate": 1.5e-4, "max_steps": 280, "lr_scheduler_type": "linear"}
    chosen |= {"num_generations": 16, "per_device_train_batch_size": 192, "num_inference_steps": 10}
    assert {name: settings[name] for name in chosen} == chosen
    assert not {"flow_epsilon", "flow_regularizer_weight", "num_iterations", "noise_level"} & set(settings)
    assert PaintTask.rollouts == 140
