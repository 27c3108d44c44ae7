"""Process rewards: they join the advantage of the thinking, and the image never hears of them."""

import functools
import statistics

import pytest
import torch
from torch import nn
from trl.rewards import think_format_reward

from tests.helpers.oracle import oracle, text_log_probs
from tests.helpers.tiny_unified import FixedTexts, OneByOne, prompts_dataset, redness, tiny_bagel, tiny_config, weights
from trl_unigrpo.models.experts import expert_of
from trl_unigrpo.rewards import thinking_reward
from trl_unigrpo.rewards.thinking import reward_scope


# Two groups of 4; no two image advantages are alike, so that rows are known by theirs after TRL's shuffle.
IMAGES = [0.0, 1.0, 2.0, 4.0, 0.0, 5.0, 3.0, 9.0]
THINKINGS = [0.3, 0.1, 0.2, 0.9, 0.5, 0.5, 0.1, 0.6]


def images(images, **_):
    return IMAGES


@thinking_reward
def thinkings(completions, **_):
    return THINKINGS


@thinking_reward
def words(completions, **_):
    return [float(len(completion.split())) for completion in completions]


def by_hand(rewards, scale="group"):
    """TRL's formula on Python's floats; None where there is no reward."""
    groups = [rewards[:4], rewards[4:]]
    scored = [[r for r in group if r is not None] for group in groups]
    spread = [statistics.stdev(group) for group in scored]
    if scale == "batch":
        spread = [statistics.stdev([r for group in scored for r in group])] * 2
    return [
        0.0 if r is None else (r - statistics.mean(scored[i])) / (1.0 if scale == "none" else spread[i] + 1e-4)
        for i in (0, 1)
        for r in groups[i]
    ]


def advantages(seen, expected_images):
    """(image's, thinking's) advantages of one generation batch in the order of the rewards."""
    rows = {}
    for batch in seen.batches[:2]:
        for own, text in zip(batch["advantages"], batch["text_advantages"], strict=True):
            (row,) = [i for i, value in enumerate(expected_images) if abs(value - own.item()) < 1e-5]
            rows[row] = (own.item(), text.item())
    assert sorted(rows) == list(range(8))
    return [rows[i][0] for i in range(8)], [rows[i][1] for i in range(8)]


def logged(trainer):
    """Take what was logged, without what a clock says."""
    clocks = ("time", "per_second", "profiling", "runtime")
    return [{k: v for k, v in entry.items() if not any(c in k for c in clocks)} for entry in trainer.state.log_history]


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_weight_zero_changes_nothing_to_the_bit(make_trainer, aggregation):
    settings = {"max_steps": 4, "multi_objective_aggregation": aggregation}
    plain = make_trainer(model=tiny_bagel(), **settings)
    plain.train()
    with pytest.warns(UserWarning, match="logged, not trained on"):
        logging = make_trainer(model=tiny_bagel(), reward_funcs=[redness, words], **settings)
    logging.train()
    after, other = weights(plain.model), weights(logging.model)
    assert all(torch.equal(after[name], other[name]) for name in after)
    for entry, extended in zip(logged(plain), logged(logging), strict=True):
        own = {k: v for k, v in extended.items() if not k.startswith(("process/", "rewards/words/"))}
        for logs in (own, entry):  # the mean over a column of another table may be added up in another order
            logs["rewards/redness/mean"] = round(logs.get("rewards/redness/mean", 0.0), 5)
        assert own == entry
    assert logging.state.log_history[0]["rewards/words/mean"] > 0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_by_hand(make_trainer, train, scale):
    trainer = make_trainer(
        reward_funcs=[images, thinkings], process_reward_weight=0.25, scale_rewards=scale, max_steps=1
    )
    seen = train(trainer)
    of_images, of_thinkings = by_hand(IMAGES, scale), by_hand(THINKINGS, scale)
    found_images, found_texts = advantages(seen, of_images)
    assert found_images == pytest.approx(of_images, abs=1e-5)
    expected = [a + 0.25 * b for a, b in zip(of_images, of_thinkings, strict=True)]
    assert found_texts == pytest.approx(expected, abs=1e-5)
    log = trainer.state.log_history[0]
    assert log["reward"] == pytest.approx(statistics.mean(IMAGES))
    assert log["process/reward"] == pytest.approx(statistics.mean(THINKINGS))
    assert log["rewards/thinkings/mean"] == pytest.approx(statistics.mean(THINKINGS))
    assert log["process/frac_none"] == log["process/frac_zero_std"] == log["reward/frac_none"] == 0


@pytest.mark.parametrize("nothing", [None, float("nan"), float("inf")])
def test_missing_scores_are_masked_each_where_they_are_missing(make_trainer, train, nothing):
    scored = [nothing if i == 5 else r for i, r in enumerate(IMAGES)]
    thought = [nothing if i in (2, 6) else r for i, r in enumerate(THINKINGS)]
    trainer = make_trainer(
        reward_funcs=[lambda images, **_: scored, thinking_reward(lambda completions, **_: thought)],
        process_reward_weight=2.0,
        max_steps=1,
    )
    with pytest.warns(UserWarning, match="no score"):
        seen = train(trainer)
    of_images = by_hand([None if i == 5 else r for i, r in enumerate(IMAGES)])
    of_thinkings = by_hand([None if i in (2, 6) else r for i, r in enumerate(THINKINGS)])
    found_images, found_texts = advantages(seen, of_images)
    assert found_images == pytest.approx(of_images, abs=1e-5) and found_images[5] == 0
    expected = [a + 2 * b for a, b in zip(of_images, of_thinkings, strict=True)]
    assert found_texts == pytest.approx(expected, abs=1e-5)
    log = trainer.state.log_history[0]
    assert log["reward/frac_none"] == 1 / 8 and log["process/frac_none"] == 2 / 8
    assert log["reward"] == pytest.approx(statistics.mean(r for i, r in enumerate(IMAGES) if i != 5))


def test_no_thinking_scored_leaves_the_image_s_advantage(make_trainer, train):
    trainer = make_trainer(
        reward_funcs=[images, thinking_reward(lambda completions, **_: [None] * 8)],
        process_reward_weight=1.0,
        max_steps=1,
    )
    seen = train(trainer)
    for batch in seen.batches:
        assert torch.equal(batch["advantages"], batch["text_advantages"]) and batch["advantages"].abs().min() > 0
    assert trainer.state.log_history[0]["process/frac_none"] == 1


def test_thinkings_all_alike_leave_the_image_s_advantage(make_trainer, train):
    alike = thinking_reward(lambda completions, **_: [0.5] * 4 + [0.25] * 4)
    trainer = make_trainer(reward_funcs=[images, alike], process_reward_weight=1.0, max_steps=1)
    seen = train(trainer)
    for batch in seen.batches:
        torch.testing.assert_close(batch["advantages"], batch["text_advantages"])
    assert trainer.state.log_history[0]["process/frac_zero_std"] == 1


def test_reward_weights_weigh_process_rewards_among_each_other(make_trainer, train):
    other = [float(i * i % 5) for i in range(8)]
    trainer = make_trainer(
        reward_funcs=[thinkings, images, thinking_reward(lambda completions, **_: other)],
        reward_weights=[3.0, 2.0, 0.5],
        process_reward_weight=1.0,
        max_steps=1,
    )
    seen = train(trainer)
    of_images = by_hand([2 * r for r in IMAGES])
    of_thinkings = by_hand([3 * a + 0.5 * b for a, b in zip(THINKINGS, other, strict=True)])
    found_images, found_texts = advantages(seen, of_images)
    assert found_images == pytest.approx(of_images, abs=1e-5)
    assert found_texts == pytest.approx([a + b for a, b in zip(of_images, of_thinkings, strict=True)], abs=1e-5)
    assert trainer.state.log_history[0]["reward"] == pytest.approx(2 * statistics.mean(IMAGES))


@pytest.mark.parametrize("cut", ["packed", "one by one", "text alone"])
def test_each_expert_s_gradient_is_that_of_its_own_advantages(make_trainer, train, cut):
    model = tiny_bagel()
    if cut == "one by one":
        model.__class__ = OneByOne
    settings = {"flow_weight": 0.0} if cut == "text alone" else {}
    trainer = make_trainer(
        model=model,
        reward_funcs=[redness, words],
        process_reward_weight=0.7,
        max_grad_norm=0.0,
        learning_rate=0.5,
        image_learning_rate=0.05,
        optim="sgd",
        trainer_class=FixedTexts,
        **settings,
    )
    seen = train(trainer)
    for step in range(2):
        batches = seen.batches[2 * step : 2 * step + 2]
        assert not any(torch.allclose(batch["advantages"], batch["text_advantages"]) for batch in batches)
        of_text = [{**batch, "advantages": batch["text_advantages"]} for batch in batches]
        now, old = seen.weights[step], seen.weights[0]
        text = text_gradients(of_text, now, old)
        image = {} if cut == "text alone" else oracle(batches, now, old, {"text_weight": 0.0})[0]
        for name, gradient in seen.gradients[step].items():
            # The image's own tokens are embedded by the text expert: there the two meet.
            expected = sum(part for part in (text[name], image.get(name)) if part is not None)
            scale = expected.abs().max().item()
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=5e-5 * scale + 1e-9, msg=name)


def text_gradients(batches, now, old):
    """Of the clipped text objective, one thinking at a time."""
    models = [tiny_bagel(), tiny_bagel()]
    for model, state in zip(models, (now, old), strict=True):
        model.load_state_dict(state, strict=False)
    total, samples = 0.0, 0
    for batch in batches:
        for row, advantage in enumerate(batch["advantages"].double()):
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
            completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
            current, before = (text_log_probs(model, prompt, completion) for model in models)
            ratio = (current - before.detach()).exp()
            total = total + torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
            samples += 1
    (-total / samples).backward()
    return {name: p.grad for name, p in models[0].named_parameters()}


def test_image_s_first_gradient_is_the_same_to_the_bit(make_trainer, train):
    gradients = []
    for weight in (0.0, 5.0):
        trainer = make_trainer(
            model=tiny_bagel(),
            reward_funcs=[redness, words],
            process_reward_weight=weight,
            max_steps=1,
            trainer_class=FixedTexts,
        )
        gradients.append(train(trainer).gradients[0])
    before, after = gradients
    same = {name for name in before if torch.equal(before[name], after[name])}
    image = {name for name in before if expert_of(trainer.unified, name) == "image"}
    assert image and image <= same
    assert any(name not in same for name in before)


def test_evaluation_logs_process_rewards(make_trainer):
    trainer = make_trainer(
        reward_funcs=[redness, words],
        process_reward_weight=1.0,
        eval_dataset=prompts_dataset(copies=1),
        num_generations_eval=1,
        per_device_eval_batch_size=2,
    )
    log = trainer.evaluate()
    assert (
        log["eval_process/reward"] == pytest.approx(log["eval_rewards/words/mean"]) and log["eval_process/reward"] > 0
    )


# The mark


class Plan:
    scope = "text"

    async def __call__(self, completions, **_):
        return [float(len(completion)) for completion in completions]


def test_every_kind_of_function_can_be_marked(make_trainer):
    async def patient(completions, **_):
        return [0.25] * len(completions)

    conversation = [[{"role": "user", "content": "a red cat"}], [{"role": "user", "content": "a small tree"}]]

    def characters(completions, factor, **_):
        return [factor * len(completion[0]["content"]) for completion in completions]

    marked = [thinking_reward(patient), thinking_reward(think_format_reward), thinking_reward(Judge())]
    marked.append(functools.partial(thinking_reward(characters), factor=2.0))
    trainer = make_trainer(
        reward_funcs=[redness, *marked],
        process_reward_weight=1.0,
        train_dataset=prompts_dataset(conversation, copies=4),
        max_steps=1,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    names = ("patient", "think_format_reward", "Judge", "characters")
    means = [log[f"rewards/{name}/mean"] for name in names]
    assert means[0] == 0.25 and means[2] == 3.0 and means[3] > 0
    assert log["process/reward"] == pytest.approx(sum(means), rel=1e-5)
    assert log["reward"] == pytest.approx(log["rewards/redness/mean"])
    assert reward_scope(think_format_reward) == reward_scope(characters) == "both"  # the functions themselves are not


class Judge:
    def __call__(self, completions, **_):
        return [3.0] * len(completions)


def test_scope_of_an_object():
    assert reward_scope(Plan()) == "text"
    assert reward_scope(Judge()) == reward_scope(redness) == reward_scope("a-reward-model") == "both"
    assert words.__name__ == "words" and words(completions=["x", "a b"]) == [1.0, 2.0]


@pytest.mark.parametrize("thing", ["some/reward-model", nn.Linear(1, 1), None])
def test_what_is_no_function_cannot_be_marked(thing):
    with pytest.raises(TypeError, match=f"thinking_reward got a {type(thing).__name__}"):
        thinking_reward(thing)


def test_unknown_scope_is_refused(make_trainer):
    class Odd(Judge):
        scope = "image"

    with pytest.raises(ValueError, match="scope='image': expected 'both' or 'text'"):
        make_trainer(reward_funcs=[redness, Odd()])


def test_weights_that_would_do_nothing_are_refused(make_trainer, tmp_path):
    with pytest.raises(ValueError, match="none scores the image"):
        make_trainer(reward_funcs=[words], process_reward_weight=1.0)
    with pytest.raises(ValueError, match="process_reward_weight=0.5, but no reward function is marked"):
        make_trainer(reward_funcs=redness, process_reward_weight=0.5)
    with pytest.raises(ValueError, match="process_reward_weight=0.5 with text_weight=0"):
        tiny_config(tmp_path, process_reward_weight=0.5, text_weight=0.0)
    with pytest.raises(ValueError, match="process_reward_weight=-1: expected 0 or more"):
        tiny_config(tmp_path, process_reward_weight=-1)
