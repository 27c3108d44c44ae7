"""Calls of the model are counted, and the cut into micro-batches and passes changes nothing but what it must."""

import pytest
import torch
from peft import LoraConfig

from tests.helpers.runs import assert_same_update
from tests.helpers.tiny_unified import (
    PROMPTS,
    FixedTexts,
    OneByOne,
    beside,
    images_of,
    moved,
    prompts_dataset,
    tiny_bagel,
    weights,
)
from trl_unigrpo.models.bagel import BagelForUnifiedGeneration


# The update is the gradient itself: Adam would blow the last digits of a tiny one up.
PLAIN = {"optim": "sgd", "learning_rate": 0.5, "image_learning_rate": 0.5, "max_grad_norm": 0.0}


def counted(model):
    """Counts calls of the decoder with gradients."""
    calls = []
    model.language_model.model.register_forward_hook(lambda *_: calls.append(1) if torch.is_grad_enabled() else None)
    return calls


def test_packed_forward_is_the_only_one_of_a_micro_batch(make_trainer):
    model = tiny_bagel()
    calls = counted(model)
    trainer = make_trainer(model=model, max_steps=4)
    trainer.train()
    assert len(calls) == trainer.state.global_step * trainer.args.gradient_accumulation_steps


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"flow_context_grad": "full"},
        {"guidance_scale": 3.0},
        {"guidance_scale": 3.0, "flow_context_grad": "full"},
        {"image_objective": "awm"},
        {"image_objective": "nft"},
    ],
    ids=["detach", "full", "guidance", "guidance-full", "awm", "nft"],
)
def test_velocities_one_by_one_give_the_packed_update(make_trainer, settings):
    updates = []
    for cls in (BagelForUnifiedGeneration, OneByOne):
        model = tiny_bagel()
        model.__class__ = cls
        before, calls = weights(model), counted(model)
        trainer = make_trainer(model=model, **PLAIN, **settings)
        trainer.train()
        updates.append((weights(model), len(calls)))
    (packed, packed_calls), (single, single_calls) = updates
    assert single_calls > packed_calls
    assert_same_update(before, packed, single)


@pytest.mark.parametrize("cls", [BagelForUnifiedGeneration, OneByOne])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_update_computes_velocities_in_the_precision_of_the_rollout(make_trainer, train, cls, guidance_scale):
    model = tiny_bagel()
    model.__class__ = cls
    trainer = make_trainer(model=model, bf16=True, guidance_scale=guidance_scale)
    second_pass = [batch for batch in train(trainer).batches if "old" in batch]
    assert second_pass
    for batch in second_pass:
        # bf16 twice; float32 would differ by its rounding.
        assert torch.equal(batch["old"], batch["steps"].states.velocity)


def test_old_and_reference_velocities_have_the_precision_of_the_rollout(make_trainer, train):
    # An update per micro-batch: both are computed before the first.
    settings = {"gradient_accumulation_steps": 1, "steps_per_generation": 2, "num_iterations": 1, "max_steps": 2}
    for batch in train(make_trainer(bf16=True, **settings)).batches:
        for policy in ("old", "reference"):
            # bf16 twice; float32 would differ by its rounding.
            assert torch.equal(batch[policy], batch["steps"].states.velocity), policy


def test_one_ratio_per_image_needs_its_velocities_together(make_trainer):
    model = tiny_bagel()
    model.__class__ = OneByOne
    with pytest.raises(ValueError, match="image_objective='fpo' needs all velocities.*OneByOne.*Use 'awm'"):
        make_trainer(model=model, image_objective="fpo")


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_gradient_accumulation_does_not_change_the_update(make_trainer, loss_type):
    updates = []
    for batch, accumulation in ((8, 1), (4, 2), (2, 4)):
        model = tiny_bagel()
        before = weights(model)
        trainer = make_trainer(
            model=model,
            loss_type=loss_type,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=3,  # into the second generation: its noise is the same too
            trainer_class=FixedTexts,
            **PLAIN,
        )
        trainer.train()
        updates.append(weights(model))
    assert_same_update(before, updates[0], updates[1])
    assert_same_update(before, updates[0], updates[2])


def test_last_accumulation_of_an_epoch_may_be_short(make_trainer):
    # One prompt makes one micro-batch an epoch: whatever the accumulation, the update is of that one.
    updates = []
    for accumulation in (1, 2):
        model = tiny_bagel()
        before = weights(model)
        make_trainer(
            model=model,
            train_dataset=prompts_dataset(PROMPTS[:1], copies=1),
            gradient_accumulation_steps=accumulation,
            steps_per_generation=1,
            num_iterations=1,
            max_steps=1,
            trainer_class=FixedTexts,
            **PLAIN,
        ).train()
        updates.append(weights(model))
    assert_same_update(before, *updates)


@pytest.mark.parametrize(
    ("accumulation", "steps_per_generation", "iterations", "precomputed", "generations"),
    [
        (2, 2, 1, False, [0, 1, 2, 3]),
        (2, 2, 2, False, [0, 2]),  # UniGRPO's own: the second pass uses what the first one stored
        (1, 2, 1, True, [0, 2]),
        (1, 2, 2, True, [0]),
        (2, 1, 1, False, [0, 0, 1, 1, 2, 2, 3, 3]),
    ],
)
def test_cycle_of_generations_and_old_velocities(
    make_trainer, train, accumulation, steps_per_generation, iterations, precomputed, generations
):
    trainer = make_trainer(
        max_steps=4,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=steps_per_generation,
        num_iterations=iterations,
    )
    starts, paint = [], trainer._paint

    def painted(trajectories):
        starts.append(trainer.state.global_step)
        return paint(trajectories)

    trainer._paint = painted
    seen = train(trainer)
    assert starts == generations
    assert [("old" in batch) for batch in seen.batches[:steps_per_generation]] == (
        [precomputed] * steps_per_generation
    )
    # Whatever the cycle, the old policy is the one that painted the images.
    passes = {}
    for index, batch in enumerate(seen.batches):
        generation = index // (steps_per_generation * iterations)
        passes.setdefault(generation, []).append(batch)
    micro_steps_per_update = accumulation
    for generation, batches in passes.items():
        first_step = generation * steps_per_generation * iterations // micro_steps_per_update
        model = tiny_bagel()
        model.load_state_dict(seen.weights[first_step], strict=False)
        for batch in batches:
            with torch.no_grad():
                expected = model.predict_velocities(batch["steps"])
            if "old" in batch:
                torch.testing.assert_close(batch["old"], expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(batch["steps"].states.velocity, expected, rtol=1e-4, atol=1e-5)


def test_ratio_is_one_in_the_first_pass_and_not_in_the_second(make_trainer):
    trainer = make_trainer(max_steps=4)
    trainer.train()
    history = trainer.state.log_history
    for step in (0, 2):
        assert history[step]["flow/log_ratio_std"] == 0
        assert history[step]["flow/clip_frac"] == 0
    for step in (1, 3):
        assert history[step]["flow/log_ratio_std"] > 0


def test_rollout_velocities_as_old_policy(make_trainer, train):
    seen = train(make_trainer(flow_old_source="rollout"))
    for batch in seen.batches:
        assert torch.equal(batch["old"], batch["steps"].states.velocity)


def test_truncated_thinkings_still_condition_their_image(make_trainer):
    # TRL blanks the masks of truncated rows: the image must see the whole thinking all the same.
    trainer = make_trainer(mask_truncated_completions=True, max_completion_length=3)
    trainer.train()
    batches = trainer._buffered_inputs
    assert any((batch["completion_mask"].sum(1) == 0).any() for batch in batches)
    for batch in batches:
        found = beside(trainer, batch["trajectories"])
        torch.testing.assert_close(found["old"], found["steps"].states.velocity, rtol=1e-4, atol=1e-5)


class Endless(FixedTexts):
    """Thinkings that come to no end, but for those of some rows."""

    ending = ()

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        ends = [2 if row in self.ending else 9 for row in self.rows(len(prompt_ids))]
        return [[8, 9, 10, 11 + i % 4, end] for i, end in enumerate(ends)], None


def test_truncated_thinkings_train_nothing(make_trainer):
    # Adam makes whole steps of any gradient, and the regulariser has one from the start.
    config = LoraConfig(r=2, init_lora_weights=False)
    trainer = make_trainer(trainer_class=Endless, mask_truncated_completions=True, peft_config=config)
    before = weights(trainer.model)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["completions/clipped_ratio"] == 1
    assert log["grad_norm/text"] == log["grad_norm/image"] == log["flow/velocity_mse"] == 0
    assert not moved(before, weights(trainer.model))


@pytest.mark.parametrize("objective", ["flow_grpo", "fpo", "nft"])
def test_images_of_truncated_thinkings_have_no_gradient(make_trainer, objective):
    class Half(Endless):
        ending = (0, 2, 5, 7)

    trainer = make_trainer(trainer_class=Half, mask_truncated_completions=True, image_objective=objective)
    flow_loss, gradients = trainer._flow_loss, {}

    def spied(velocity, old, reference, steps, advantages):
        def keep(gradient):
            for image, of_image in zip(steps.image.tolist(), gradient, strict=True):
                gradients.setdefault(steps.images[image].seed[-1], []).append(of_image.abs().max().item())

        velocity.register_hook(keep)
        return flow_loss(velocity, old, reference, steps, advantages)

    trainer._flow_loss = spied
    trainer.train()
    assert len(gradients) == 8
    assert {row for row, sizes in gradients.items() if max(sizes) > 0} == {0, 2, 5, 7}


@pytest.mark.parametrize("peft", [False, True])
def test_gradient_checkpointing_changes_nothing(make_trainer, peft):
    updates = []
    for checkpointing in (False, True):
        model = tiny_bagel()
        trainer = make_trainer(
            model=model,
            gradient_checkpointing=checkpointing,
            peft_config=LoraConfig(r=2, init_lora_weights=False) if peft else None,
            **PLAIN,
        )
        before = weights(trainer.model)
        trainer.train()
        updates.append(weights(trainer.model))
    assert_same_update(before, *updates)


def test_image_batches_do_not_change_the_images(make_trainer, train):
    batches = [train(make_trainer(image_batch_size=size, max_steps=1)).batches for size in (None, 3)]
    finals = [torch.stack([image.latents for image in images_of(some)]) for some in batches]
    torch.testing.assert_close(*finals)


def test_two_trainers_in_a_row_on_one_model(make_trainer):
    # As in a notebook: the second wraps a model that the first has already patched.
    model = tiny_bagel()
    make_trainer(model=model, max_steps=1).train()
    calls = counted(model)
    again = make_trainer(model=model, max_steps=2)
    start = weights(model)
    again.train()
    assert len(calls) == 4
    assert again.state.log_history[0]["flow/velocity_mse"] == pytest.approx(0, abs=1e-9)  # its own reference
    assert moved(start, weights(model))
