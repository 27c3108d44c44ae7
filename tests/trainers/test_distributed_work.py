"""Two processes whose work is unequal: the same numbers as one, and little that travels between them."""

import pickle

import pytest
import torch.distributed as dist

from tests.helpers.processes import in_processes
from tests.helpers.runs import assert_same_update
from tests.helpers.tiny_unified import (
    PROMPTS,
    SPECIAL,
    WORDS,
    FixedTexts,
    build_trainer,
    prompts_dataset,
    redness,
    weights,
)
from tests.helpers.toy_painter import toy_painter
from trl_unigrpo.reporting.gallery import SIDE
from trl_unigrpo.reporting.run_files import read_run


class FixedInEvaluation(FixedTexts):
    """The same, where asking for the places of rows counts them as painted: in an evaluation."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        before = self._progress.eval_rows
        outputs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self._progress.eval_rows = before
        return outputs


def none_for_some(prompts, completions, images, **_):
    """No reward for two of the four prompts: in a generation one process may have these alone."""
    found = redness(prompts, completions, images)
    return [None if "cat" in prompt else red for prompt, red in zip(prompts, found, strict=True)]


async def in_parts(prompts, completions, images, log_metric, **_):
    """Asked about images while others are painted."""
    log_metric("in_parts/asked", float(len(images)))
    return redness(prompts, completions, images)


in_parts.per_image = True

SETTINGS = {"optim": "sgd", "learning_rate": 0.5, "image_learning_rate": 0.5, "trainer_class": FixedInEvaluation}
UPDATES = {
    "no rewards": {"reward_funcs": none_for_some},
    "overlap": {"reward_funcs": in_parts, "image_batch_size": 1},
}
ROWS = 5  # of an evaluation: two processes with two rows each repeat three of them


def update(folder, case, size):
    trainer = build_trainer(folder, per_device_train_batch_size=size, **SETTINGS, **UPDATES[case])
    before = weights(trainer.model)
    trainer.train()
    return before, weights(trainer.model), trainer.state.log_history


def evaluation(folder, size):
    """Metrics, and the samples that the page shows."""
    trainer = build_trainer(
        folder,
        **SETTINGS,
        reward_funcs=[redness, none_for_some],
        eval_dataset=prompts_dataset([*PROMPTS, "a big red dog"][:ROWS], copies=1),
        per_device_eval_batch_size=size,
        num_generations_eval=1,
        gallery_steps=1,
    )
    found = trainer.evaluate()
    trainer.create_model_card()  # waits for the page
    times = (
        "eval_time",
        "eval_model_preparation",
        "eval_runtime",
        "eval_samples",
        "eval_steps",
        "eval_loss",
        "eval_entropy",
        "eval_clip",
    )
    return {name: value for name, value in found.items() if not name.startswith(times)}


def bytes_sent(folder):
    """The largest object that a process sends when images of 1024 pixels are shown."""
    sent, names = [], ("gather_object", "all_gather_object")
    before = {name: getattr(dist, name) for name in names}

    def counting(name):
        def counted(*args, **kwargs):
            sent.append(len(pickle.dumps(args[0] if name == "gather_object" else args[1])))
            return before[name](*args, **kwargs)

        return counted

    for name in names:
        setattr(dist, name, counting(name))
    try:
        model = toy_painter(len(SPECIAL) + len(WORDS) + 3)
        settings = {"image_size": 1024, "gallery_steps": 1, "max_steps": 1, "num_iterations": 1}
        build_trainer(folder, model=model, per_device_train_batch_size=2, **settings).train()
    finally:
        for name in names:
            setattr(dist, name, before[name])
    return sent


def work(folder, rank):
    return {
        "updates": {case: update(folder / case, case, 2)[1:] for case in UPDATES},
        "evaluation": evaluation(folder / "evaluation", 2),
        "sent": bytes_sent(folder / "sent"),
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, in_processes(work, folder)


@pytest.mark.parametrize("case", UPDATES)
def test_the_update_is_that_of_one_process(two, tmp_path, case):
    before, after, log = update(tmp_path, case, 4)
    for rank in two[1]:
        found, its_log = rank["updates"][case]
        assert_same_update(before, after, found)
        for name in ("reward", "reward_std", "reward/frac_none", "loss", "grad_norm/text", "grad_norm/image"):
            assert its_log[0][name] == pytest.approx(log[0][name], rel=1e-3, abs=1e-5), name
    assert log[0]["reward/frac_none"] == (0.5 if case == "no rewards" else 0)
    if case == "overlap":
        assert log[0]["in_parts/asked"] == its_log[0]["in_parts/asked"] == 1  # each image by itself


def test_an_uneven_evaluation_counts_each_row_once(two, tmp_path):
    folder, ranks = two
    alone, at_once = evaluation(tmp_path / "4", 4), evaluation(tmp_path / "8", 8)
    for found in (rank["evaluation"] for rank in ranks):  # of batches with the same rows
        assert found == pytest.approx(alone, rel=1e-4, nan_ok=True)
    means = ("reward", "rewards/redness/mean", "reward/frac_none", "images/pixel_std", "completions/mean_length")
    for name in means:  # whatever the batches
        assert at_once[f"eval_{name}"] == pytest.approx(alone[f"eval_{name}"], rel=1e-4), name
    shown = [
        [(sample.prompt, sample.thinking) for sample in read_run(place).shown[-1].samples]
        for place in (tmp_path / "4", folder / "evaluation")
    ]
    assert shown[0] == shown[1] and len(shown[0]) == ROWS


def test_no_full_image_travels(two):
    images = 4  # of each process
    for rank in two[1]:
        assert max(rank["sent"]) <= images * (3 * SIDE**2 + 4096)  # in full: 3 x 1024^2 each
        assert max(rank["sent"]) > images * 3 * SIDE**2  # and thumbnails do
