"""Images of several sizes and shapes, and evaluation in a size of its own."""

import math
from functools import partial

import pytest
import torch
from PIL import Image

from tests.helpers.editing import edits, tiny_editor
from tests.helpers.many_images import assert_equations, images
from tests.helpers.rounds import rounds_trainer
from tests.helpers.runs import assert_equal_runs, run
from tests.helpers.tiny_painters import tiny_model
from tests.helpers.tiny_pipelines import tokenizer
from tests.helpers.tiny_unified import FixedTexts, OneByOne, broken, prompts_dataset, redness, tiny_bagel
from trl_unigrpo import UniGRPOConfig
from trl_unigrpo.trainers.windows import draw_size


LIST = ["8x8", "4x16", "4x8"]
SIZES = [(8, 8), (4, 16), (4, 8)]
"""The first two have as many numbers, 16, the third has half of them."""

SGD = {"max_grad_norm": 0.0, "learning_rate": 0.5, "image_learning_rate": 2.0, "optim": "sgd"}


@pytest.fixture
def sized(make_trainer):
    return partial(make_trainer, image_size=LIST, trainer_class=FixedTexts, train_dataset=prompts_dataset(), **SGD)


class Noting:
    """A reward that notes the (height, width) of the images that it gets, by prompt."""

    __name__ = "noting"

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, completions, images, **columns):
        self.calls.append([(prompt, image.size[::-1]) for prompt, image in zip(prompts, images, strict=True)])
        return redness(prompts, completions, images)

    @property
    def sizes(self):
        return {size for call in self.calls for _, size in call}


# Draws


def test_draws_are_by_seed_generation_and_group_alone(tmp_path):
    def drawn(seed=1, **settings):
        args = UniGRPOConfig(str(tmp_path), use_cpu=True, seed=seed, image_size=LIST, **settings)
        return [[draw_size(args, True, generation, group) for group in range(4)] for generation in range(100)]

    first = drawn()
    assert drawn() == first != drawn(seed=2)
    flat = [size for generation in first for size in generation]
    assert all(90 < flat.count(size) < 180 for size in SIZES)  # 133 of each; five standard deviations
    assert len({tuple(generation) for generation in first}) > 50
    twice = UniGRPOConfig(str(tmp_path), use_cpu=True, image_size=["8x8", "4x8", "4x8"])
    assert 230 < sum(draw_size(twice, True, 0, group) == (4, 8) for group in range(400)) < 310


def test_ranks_draw_the_sizes_of_groups_that_they_share(sized):
    """A group of eight on two processes of four rows each."""
    trainer, found = sized(num_generations=8, gradient_accumulation_steps=4), []
    for rank in range(2):
        trainer.accelerator.state._shared_state["process_index"] = rank
        try:
            rows = trainer._trajectories(["a"] * 4, [[1]] * 4, [[2]] * 4)
        finally:
            trainer.accelerator.state._shared_state["process_index"] = 0
        found += [(t.row, t.size) for t in rows]
    assert [row for row, _ in found] == list(range(8))
    assert {size for _, size in found} == {draw_size(trainer.args, True, 0, 0)}


# Training


@pytest.mark.parametrize(
    ("settings", "make_model"),
    [
        ({}, tiny_bagel),
        ({"flow_context_grad": "full"}, tiny_bagel),
        ({"image_objective": "awm", "matching_samples": 2}, lambda: broken(OneByOne)),
        ({"gradient_accumulation_steps": 1, "steps_per_generation": 4, "max_steps": 4}, tiny_bagel),
    ],
    ids=["packed", "full", "one-by-one", "updates"],
)
def test_losses_and_gradients_are_those_of_the_equations(sized, train, settings, make_model):
    """Each step of each image by itself, in float64, with clip range and regulariser of its own size."""
    reward = Noting()
    settings = {
        "gradient_accumulation_steps": 4,
        "flow_context_grad": "detach",
        "flow_regularizer_weight": 1e-3,
    } | settings
    trainer = sized(model=make_model(), reward_funcs=reward, **settings)
    seen = train(trainer)
    sizes = [{image.size for t in batch["trajectories"] for image in images(t)} for batch in seen.batches]
    assert all(len(size) == 1 for size in sizes)
    painted = {size for batch in sizes for size in batch}
    assert len({math.prod(size) for size in painted}) == 2  # numbers of an image, which scale the constants
    assert reward.sizes == painted
    for call in reward.calls:
        assert all(len(set(call[start : start + 4])) == 1 for start in range(0, len(call), 4))
    assert_equations(make_model, trainer, seen, settings)


def test_micro_batches_of_rows_dealt_by_size_add_up_to_those_of_single_rows(sized, train):
    """With one row a micro-batch nothing has to be dealt."""
    few = train(sized(per_device_train_batch_size=1, gradient_accumulation_steps=16, max_steps=1))
    many = train(sized(per_device_train_batch_size=4, gradient_accumulation_steps=4, max_steps=1))
    (one,), (other,) = few.gradients, many.gradients
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], rtol=1e-4, atol=1e-6 * gradient.abs().max().item(), msg=name)


def test_a_pipeline_paints_sizes_of_one_update_each(make_trainer, train):
    reward = Noting()
    trainer = make_trainer(
        model=tiny_model(),
        processing_class=tokenizer(),
        reward_funcs=reward,
        image_size=["8x8", "8x24"],
        max_completion_length=4,
        gradient_accumulation_steps=4,
    )
    seen = train(trainer)
    sizes = [{image.size for t in batch["trajectories"] for image in images(t)} for batch in seen.batches]
    assert all(len(size) == 1 for size in sizes)
    assert reward.sizes == {(8, 8), (8, 24)}
    history = trainer.state.log_history
    assert history[0]["flow/log_ratio_std"] == 0 < history[1]["flow/log_ratio_std"]


def test_text_alone_needs_no_batches_of_one_size(sized, train):
    trainer = sized(flow_weight=0.0, num_generations=8, per_device_train_batch_size=16, gradient_accumulation_steps=1)
    train(trainer)
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_a_run_resumes_exactly_between_two_passes(make_trainer, tmp_path):
    made = partial(make_trainer, image_size=LIST, max_steps=4)
    whole = run(made, tmp_path / "whole", max_steps=4)
    resumed = run(made, tmp_path / "resumed", max_steps=4, resume=tmp_path / "whole" / "checkpoint-3")
    assert_equal_runs(whole, resumed, 3)


def test_all_rounds_of_a_group_have_its_size(tmp_path, train):
    tree = {"round_group": "tree", "round_select": "random", "gradient_accumulation_steps": 4, "max_steps": 1}
    seen = train(rounds_trainer(tmp_path, image_size=LIST, **tree))
    sizes = [[image.size for t in batch["trajectories"] for image in images(t)] for batch in seen.batches]
    assert all(len(of_batch) > 4 and len(set(of_batch)) == 1 for of_batch in sizes)
    assert len({of_batch[0] for of_batch in sizes}) > 1


# Evaluation


def test_evaluation_paints_at_its_own_size(make_trainer):
    reward = Noting()
    trainer = make_trainer(
        image_size=8,
        eval_image_size=[12, 16],
        reward_funcs=reward,
        eval_dataset=prompts_dataset(copies=1),
        do_eval=True,
        max_steps=1,
    )
    trainer.train()
    assert reward.sizes == {(8, 8)}
    reward.calls.clear()
    trainer.evaluate()
    assert reward.sizes == {(12, 16)}


def test_a_prompt_has_the_same_size_in_each_evaluation_however_it_is_batched(make_trainer):
    found = []
    for batch in (4, 8):
        reward = Noting()
        trainer = make_trainer(
            image_size=LIST,
            reward_funcs=reward,
            eval_dataset=prompts_dataset(),
            do_eval=True,
            num_generations_eval=2,
            per_device_eval_batch_size=batch,
        )
        for _ in range(2):
            reward.calls.clear()
            trainer.evaluate()
            found.append([pair for call in reward.calls for pair in call])
    assert found[0] == found[1] == found[2] == found[3]
    assert {size for _, size in found[0]} == {draw_size(trainer.args, False, 0, group) for group in range(8)}
    assert len({size for _, size in found[0]}) > 1
    assert all(found[0][i] == found[0][i + 1] for i in range(0, len(found[0]), 2))


def test_edits_are_evaluated_at_their_own_number_of_pixels(make_trainer):
    reward = Noting()
    trainer = make_trainer(
        model=tiny_editor(),
        train_dataset=edits(),
        eval_dataset=edits(),
        do_eval=True,
        reward_funcs=reward,
        image_size=8,
        eval_image_size=16,
        max_steps=1,
    )
    trainer.train()
    assert {math.prod(size) for size in reward.sizes} <= {64, 48}
    reward.calls.clear()
    trainer.evaluate()
    assert (16, 16) in reward.sizes


# Wrong use


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": [8, 10]}, r"image_size=\[8, 10\]: .*can't paint an image of 8 x 10 pixels.*multiple of 4"),
        ({"image_size": LIST + ["8x64"]}, "image_size=.*can't paint an image of 8 x 64 pixels.*at most 16"),
        ({"eval_image_size": 20}, r"eval_image_size=20: .*can't paint an image of 20 x 20 pixels.*at most 16"),
        (
            {"train_dataset": edits(), "image_size": LIST},
            "with source images: an edited image has the shape of its source. Pass the side of a square",
        ),
        ({"train_dataset": edits(), "eval_image_size": "4x16"}, "eval_image_size=.*with source images.*such as 8"),
        (
            {"image_size": LIST, "num_generations": 2},
            "per_device_train_batch_size=4 does not divide num_generations=2: with several sizes.*such as 2",
        ),
    ],
)
def test_sizes_that_can_not_be_trained_are_refused_at_construction(make_trainer, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(model=tiny_editor(), **settings)


def test_images_keep_their_shapes_in_a_grid():
    from trl_unigrpo.reporting.trackers import grid

    wide, tall = Image.new("RGB", (256, 64), "red"), Image.new("RGB", (64, 256), "red")
    whole = grid([wide, tall], 2)
    red = torch.frombuffer(bytearray(whole.tobytes()), dtype=torch.uint8).view(*whole.size[::-1], 3)[..., 1] == 0
    assert whole.size == (258, 128)
    assert int(red[:, :128].sum()) == int(red[:, 130:].sum()) == 128 * 32
    assert int(red[48:80, :128].sum()) == 128 * 32  # in the middle of its cell
