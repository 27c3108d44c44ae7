"""Evaluation inside of training, and sampling outside of it."""

import warnings

import pytest
import torch
from peft import LoraConfig

from tests.helpers.tiny_unified import (
    IMAGE_SIZE,
    PROMPTS,
    prompts_dataset,
    spy_paint,
    tiny_bagel,
    tiny_tokenizer,
    weights,
)
from trl_unigrpo.evaluation import Guidance, generate
from trl_unigrpo.models.prompts import system_ids
from trl_unigrpo.models.tokenizer import never_sampled
from trl_unigrpo.reporting.run_files import read_run
from trl_unigrpo.reporting.run_summary import panels, panels_of


REWARDS = ("eval_easy_reward", "eval_hard_reward")


def keep_images(trainer):
    kept, paint = [], trainer._paint

    def painted(trajectories):
        images = paint(trajectories)
        kept.append((trainer.mode, trajectories, images))
        return images

    trainer._paint = painted
    return kept


def evaluating(make_trainer, **arguments):
    settings = {
        "eval_dataset": prompts_dataset(copies=1),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "num_generations_eval": 1,
        "per_device_eval_batch_size": 2,
    }
    return make_trainer(**{**settings, **arguments})


def test_evaluation_has_its_own_steps_and_is_a_pure_ode(make_trainer):
    trainer = evaluating(make_trainer, max_steps=1)
    plans, make_plan = {}, trainer._plan

    def spied(count):
        plans[trainer.mode] = make_plan(count)
        return plans[trainer.mode]

    trainer._plan = spied
    trainer.train()
    assert len(plans["train"].timesteps) == 7
    assert plans["train"].windows is not None
    assert len(plans["eval"].timesteps) == 5
    assert plans["eval"].windows is None
    log = next(entry for entry in trainer.state.log_history if "eval_reward" in entry)
    assert 0 < log["eval_reward"] < 1
    assert log["eval_reward/frac_none"] == 0
    assert not any(key.startswith("eval_flow/") for key in log)


def test_evaluation_is_guided_and_training_is_not(make_trainer, monkeypatch):
    trainer = evaluating(make_trainer, max_steps=1, eval_guidance_scale=4.0)
    calls = spy_paint(monkeypatch)
    trainer.train()
    trajectories, plan, _ = calls[0]
    assert plan.guidance is None and all(t.system_ids is None for t in trajectories)
    trajectories, plan, guided = calls[-1]
    assert plan.guidance == Guidance(guidance_scale=4.0)
    system = [1, *tiny_tokenizer().encode("think first"), 2]
    assert [t.system_ids for t in trajectories] == [system, system]
    assert all(t.prompt_ids[: len(system)] == system for t in trajectories)
    # The next evaluation's thinkings and noise are the same, so that guidance is all that differs.
    trainer.args.eval_guidance_scale = 1.0
    trainer.evaluate()
    unguided = calls[-1][2]
    assert calls[-1][1].guidance is None
    assert all(torch.equal(a.context.ids, b.context.ids) for a, b in zip(guided, unguided, strict=True))
    assert not any(torch.allclose(a.latents, b.latents) for a, b in zip(guided, unguided, strict=True))


def test_guided_evaluation_of_prompts_that_bring_their_own_system_message(make_trainer):
    prompts = [
        [{"role": "system", "content": "first"}, {"role": "user", "content": "a red cat"}],
        [{"role": "user", "content": "a small tree"}],
    ]
    dataset = prompts_dataset(prompts, copies=2)
    trainer = evaluating(make_trainer, train_dataset=dataset, eval_dataset=dataset, eval_guidance_scale=4.0)
    kept, paint = [], trainer._paint
    trainer._paint = lambda trajectories: kept.append([t.system_ids for t in trajectories]) or paint(trajectories)
    trainer.evaluate()
    own, models = ([1, *tiny_tokenizer().encode(text), 2] for text in ("first", "think first"))
    assert kept == [[own, models]] * 2


def test_two_evaluations_of_the_same_weights_are_the_same(make_trainer):
    trainer = evaluating(make_trainer)
    kept = keep_images(trainer)
    first = trainer.evaluate()
    torch.rand(7)  # training has moved on
    second = trainer.evaluate()
    images = [[image.tobytes() for image in batch] for _, _, batch in kept]
    assert images[:2] == images[2:]
    assert images[0] != images[1]  # other noise for other rows
    assert first["eval_reward"] == second["eval_reward"]


def test_rows_of_an_evaluation_have_noise_of_their_own(make_trainer):
    # The same prompt, and no thinking: noise is all that can differ, in a batch and from batch to batch.
    dataset = prompts_dataset(PROMPTS[:1], copies=6)
    trainer = evaluating(make_trainer, eval_dataset=dataset, thinking=False, text_weight=0.0)
    kept = keep_images(trainer)
    trainer.evaluate()
    assert [len(images) for _, _, images in kept] == [2, 2, 2]
    assert len({image.tobytes() for _, _, images in kept for image in images}) == 6


def test_evaluation_leaves_training_as_it_is(make_trainer):
    ends = []
    for strategy in ("no", "steps"):
        trainer = evaluating(make_trainer, eval_strategy=strategy, max_steps=4)
        trainer.train()
        ends.append(weights(trainer.model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_evaluation_with_groups_and_a_text_kl_keeps_frozen_weights_frozen(make_trainer):
    targets = tiny_bagel().default_lora_targets("both")
    trainer = evaluating(
        make_trainer,
        peft_config=LoraConfig(r=2, target_modules=targets),
        beta=0.1,
        flow_weight=0.0,
        num_generations_eval=2,
        max_steps=1,
    )
    trainer.train()
    trainer.evaluate()
    assert not any(
        trainer.unified.is_image_parameter(n) for n, p in trainer.model.named_parameters() if p.requires_grad
    )


def test_evaluation_sets_have_metrics_of_their_own(make_trainer, tmp_path):
    sets = {"easy": prompts_dataset(PROMPTS[:2], 1), "hard": prompts_dataset(PROMPTS[2:], 1)}
    trainer = evaluating(
        make_trainer,
        reward_funcs=lambda prompts, **_: [len(prompt) / 100 for prompt in prompts],
        eval_dataset=sets,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_easy_reward",
        greater_is_better=True,
        gallery_steps=1,
    )
    trainer.train()
    logged = {name: [log[name] for log in trainer.state.log_history if name in log] for name in REWARDS}
    assert all(len(values) == 2 for values in logged.values())
    assert not any("eval_reward" in log for log in trainer.state.log_history)
    assert trainer.state.best_metric == max(logged["eval_easy_reward"])
    run = read_run(tmp_path)
    # The two together are what each gives alone.
    together = trainer.evaluate()
    alone = [trainer.evaluate(part, metric_key_prefix="test")["test_reward"] for part in sets.values()]
    assert [together[name] for name in REWARDS] == alone
    assert alone == pytest.approx([(9 + 20) / 200, (28 + 12) / 200])
    curves = {curve.name: curve.y for curve in panels(run)[0].curves}
    assert curves["held-out prompts, easy"] == logged["eval_easy_reward"]
    assert curves["held-out prompts, hard"] == logged["eval_hard_reward"]
    both = {panel.title for panel in panels_of([run, run], ["a", "b"])}
    assert {"Reward: held-out prompts, easy", "Reward: held-out prompts, hard"} <= both


@pytest.mark.parametrize("metric", ["loss", "eval_reward", "medium_reward"])
def test_best_model_by_a_metric_of_no_evaluation_set(make_trainer, metric):
    sets = {"easy": prompts_dataset(), "hard": prompts_dataset()}
    with pytest.raises(ValueError, match=rf"metric_for_best_model='{metric}' is of none of .*'eval_easy_reward'"):
        evaluating(make_trainer, eval_dataset=sets, metric_for_best_model=metric)


def test_evaluation_with_the_default_batch_after_a_training(make_trainer):
    trainer = make_trainer(max_steps=1, num_generations=12, per_device_train_batch_size=12)
    trainer.train()
    assert 0 < trainer.evaluate(prompts_dataset(PROMPTS[:3], 1))["eval_reward"] < 1


def test_evaluation_that_never_happens_is_said(make_trainer):
    with pytest.warns(UserWarning, match="eval_dataset is not used while training: eval_strategy is 'no'"):
        make_trainer(eval_dataset=prompts_dataset())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for used in ({"eval_strategy": "epoch"}, {"eval_on_start": True}, {"do_eval": True}):
            make_trainer(eval_dataset=prompts_dataset(), **used)


@pytest.mark.parametrize("option", [{"eval_strategy": "steps", "eval_steps": 1}, {"eval_on_start": True}])
def test_evaluation_of_nothing(make_trainer, option):
    with pytest.raises(ValueError, match="there is no eval_dataset. Pass one, or switch evaluation off"):
        make_trainer(**option)


def test_best_model_by_reward(make_trainer, tmp_path):
    trainer = evaluating(
        make_trainer,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        greater_is_better=True,
    )
    trainer.train()
    evaluations = [entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry]
    assert trainer.state.best_metric == max(evaluations)


# evaluation.generate


@pytest.fixture(scope="module")
def model():
    return tiny_bagel()


def sample(model, prompts=PROMPTS, **arguments):
    settings = {"max_completion_length": 5, "num_inference_steps": 4, "image_size": IMAGE_SIZE}
    return generate(model, prompts, tiny_tokenizer(), **{**settings, **arguments})


def test_generate_is_repeatable_and_seeded(model):
    first, again, other = sample(model), sample(model), sample(model, seed=1)
    assert [s.thinking for s in first] == [s.thinking for s in again]
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(first, again, strict=True))
    assert [s.thinking for s in first] != [s.thinking for s in other]
    assert not any(torch.equal(a.latents, b.latents) for a, b in zip(first, other, strict=True))
    assert all(s.image.size == (IMAGE_SIZE, IMAGE_SIZE) for s in first)


def test_generate_leaves_the_random_state_and_the_mode_alone(model):
    model.train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sample(model)
    assert torch.equal(torch.rand(3), expected)
    assert model.training


def test_greedy_thinking_does_not_depend_on_the_seed_or_the_batch(model):
    runs = [sample(model, do_sample=False, **changes) for changes in ({}, {"batch_size": 3}, {"batch_size": 1})]
    for run in runs[1:]:
        assert [s.thinking for s in run] == [s.thinking for s in runs[0]]
        for a, b in zip(run, runs[0], strict=True):
            torch.testing.assert_close(a.latents, b.latents, rtol=1e-4, atol=1e-5)
    assert [s.thinking for s in sample(model, do_sample=False, seed=3)] == [s.thinking for s in runs[0]]


def test_without_thinking_the_image_follows_the_prompt_alone(model):
    plain = sample(model, thinking=False)
    assert {s.thinking for s in plain} == {""}
    for changes in ({"batch_size": 1}, {"do_sample": False}):
        for a, b in zip(sample(model, thinking=False, **changes), plain, strict=True):
            torch.testing.assert_close(a.latents, b.latents, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain[0].latents, sample(model)[0].latents, atol=1e-3)


def test_no_unknown_or_suppressed_token_in_a_thinking(model):
    words = {word for s in sample(model, PROMPTS * 8, max_completion_length=12) for word in s.thinking.split()}
    assert words
    assert words <= set(tiny_tokenizer().get_vocab())


def test_never_sampled_are_markers_padding_and_rows_without_a_token(model, make_trainer):
    tokenizer = tiny_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    special = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>"])
    rows = model.get_output_embeddings().weight.shape[0]
    assert never_sampled(model, tokenizer, [end]) == [*special, *range(len(tokenizer), rows)]
    assert end not in special
    assert special[0] not in never_sampled(model, tokenizer, [end, special[0]])
    assert make_trainer().generation_config.suppress_tokens == never_sampled(model, tokenizer, [end])


def test_tokens_that_the_user_suppresses_join_those(model, make_trainer, train):
    tokenizer, unwanted = tiny_tokenizer(), list(range(6, 16))
    trainer = make_trainer(generation_kwargs={"suppress_tokens": unwanted}, max_steps=1)
    never = never_sampled(model, tokenizer, [tokenizer.eos_token_id])
    assert trainer.generation_config.suppress_tokens == sorted({*never, *unwanted})
    written = torch.cat([batch["completion_ids"].flatten() for batch in train(trainer).batches])
    assert not set(written.tolist()) & set(unwanted)


def test_options_of_the_model_s_own_generation_are_refused_too(make_trainer):
    model = tiny_bagel()
    model.generation_config.update(typical_p=0.9, temperature=0.5)  # TRL sets the latter
    with pytest.raises(ValueError, match=r"^model.generation_config: typical_p=0.9 does not work.*Set it to 1.0"):
        make_trainer(model=model)


@pytest.mark.parametrize("thinking", [True, False])
def test_guidance_paints_other_images_after_the_same_thinking(model, thinking):
    plain = sample(model, thinking=thinking)
    guided = sample(model, thinking=thinking, guidance=Guidance(4.0))
    assert [s.thinking for s in guided] == [s.thinking for s in plain]
    assert not any(torch.allclose(a.latents, b.latents, atol=1e-3) for a, b in zip(guided, plain, strict=True))
    off = sample(model, thinking=thinking, guidance=Guidance())
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(off, plain, strict=True))


def test_guided_images_do_not_depend_on_the_batch(model):
    arguments = {"do_sample": False, "guidance": Guidance(4.0, 1.5)}
    for a, b in zip(sample(model, **arguments), sample(model, batch_size=1, **arguments), strict=True):
        torch.testing.assert_close(a.latents, b.latents, rtol=1e-4, atol=1e-5)


def test_guidance_by_a_thinking_that_there_is_not(model):
    with pytest.raises(ValueError, match=r"image_guidance_scale=1.5 pushes.*thinking=False leaves none"):
        sample(model, thinking=False, guidance=Guidance(4.0, 1.5))


def test_system_ids_are_the_system_message_alone(model):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = model.chat_template
    system, user = {"role": "system", "content": "think first"}, {"role": "user", "content": "a red cat"}
    ids = tokenizer.apply_chat_template([system, user], return_dict=False)
    [head, *none] = system_ids(tokenizer, [[system, user], [user], "a red cat"])
    assert ids[: len(head)] == head == [1, *tokenizer.encode("think first"), 2]
    assert none == [[], []]
