"""ReFL: its gradient by its definition, which step it goes through, what it leaves alone, and that it learns."""

import faulthandler
import inspect
import math
import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, Trainer, TrainerCallback

from tests.helpers.tiny_llava import tiny_llava
from tests.helpers.tiny_unified import IMAGE_SIZE, PROMPTS, moved, prompts_dataset, tiny_bagel, tiny_tokenizer, weights
from trl_unigrpo import ReFLConfig, ReFLTrainer
from trl_unigrpo.evaluation import generate
from trl_unigrpo.models.contract import ContextRow
from trl_unigrpo.monitoring.metrics import REFL_METRICS
from trl_unigrpo.rewards import ClipReward, LocalReader, LocalVLMJudge, ReadBackReward
from trl_unigrpo.shapeworld import (
    evaluate_model,
    load_base,
    shapeworld_dataset,
    soft_shapeworld_reward,
)
from trl_unigrpo.trainers.refl import (
    as_reward,
    image_losses,
    late_step_range,
    reward_gradient,
)


SIZE = (IMAGE_SIZE, IMAGE_SIZE)


def likeness(pixels, prompts, **columns):
    """1 minus the squared distance to an image that depends on the prompt."""
    targets = torch.stack(
        [torch.from_numpy(np.random.default_rng(len(prompt)).random((3, *SIZE))).float() for prompt in prompts]
    )
    return 1 - (pixels - targets.to(pixels)).square().mean((1, 2, 3))


def make_refl(folder, model=None, reward=likeness, dataset=None, **changes):
    own = {name: changes.pop(name) for name in ("eval_dataset", "peft_config") if name in changes}
    settings = {
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "max_completion_length": 5,
        "num_inference_steps": 6,
        "late_steps": 0.5,
        "image_size": IMAGE_SIZE,
        **changes,
    }
    return ReFLTrainer(
        model=tiny_bagel() if model is None else model,
        reward=reward,
        args=ReFLConfig(str(folder), **settings),
        train_dataset=prompts_dataset() if dataset is None else dataset,
        processing_class=tiny_tokenizer(),
        **own,
    )


class Gradients(TrainerCallback):
    """The gradients before each optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()})


def train(trainer):
    """Train; the gradients of each step."""
    seen = Gradients()
    trainer.add_callback(seen)
    trainer.train()
    return seen.steps


def logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def captured(trainer):
    """Keep what the images of each micro-batch are painted from, and its prompts."""
    kept, contexts, compute_loss = [], trainer.unified.contexts, trainer.compute_loss

    def spied_contexts(trajectories):
        kept.append([trajectories])
        return contexts(trajectories)

    def spied_loss(model, inputs, **kwargs):
        loss = compute_loss(model, inputs, **kwargs)
        kept[-1].append(inputs["prompts"])
        return loss

    trainer.unified.contexts, trainer.compute_loss = spied_contexts, spied_loss
    return kept


def rewards_by_definition(model, contexts, prompts, m, steps, shift, seed=0, reward=likeness):
    """ReFL's rewards of one batch in the trainer's first step, image by image, with gradient."""
    u = [1 - k / steps for k in range(steps + 1)]
    t = [shift * x / (1 + (shift - 1) * x) for x in u]
    rewards = []
    for row, (context, prompt) in enumerate(zip(contexts, prompts, strict=True)):
        entropy = np.random.SeedSequence((seed, 0, 0, row)).generate_state(2).tolist()
        generator = torch.Generator().manual_seed(entropy[1] << 32 | entropy[0])
        x = torch.randn(model.latent_shape(SIZE), generator=generator)[None]
        with torch.no_grad():
            encoded = model.encode_context([ContextRow(torch.tensor(context))])
            for k in range(m):
                x = x + (t[k + 1] - t[k]) * model.predict_velocity(encoded, x, torch.tensor([t[k]]), SIZE)
        x0 = x - t[m] * model.predict_velocity(encoded, x, torch.tensor([t[m]]), SIZE)
        pixels = model.decode_latents(x0, SIZE, output_type="pt")
        rewards.append(reward(torch.clamp(pixels / 2 + 0.5, 0, 1), [prompt]))
    return torch.cat(rewards)


def contexts_of(trajectories):
    """Prompt, thinking, and the token that closes a thinking which ran out of length."""
    rows = []
    for trajectory in trajectories:
        thinking = trajectory.text_ids
        row = [*trajectory.prompt_ids, *thinking]
        rows.append(row[:-1] if not thinking else row if row[-1] == 2 else [*row, 2])
    return rows


# The gradient


@pytest.mark.parametrize(
    "options",
    [
        {"refl_loss": "hinge", "refl_margin": 2.0, "refl_scale": 1e-3},
        {"refl_loss": "hinge", "refl_margin": 0.9068, "refl_scale": 0.5},  # some images are above the margin
        {"refl_loss": "linear", "refl_scale": 0.1, "thinking": False, "timestep_shift": 1.0, "seed": 3},
        {"refl_loss": "linear", "late_steps": 1.0, "seed": 5},
    ],
    ids=["hinge", "hinge-above", "linear-no-thinking", "any-step"],
)
def test_gradient_is_that_of_the_definition(tmp_path, options):
    trainer = make_refl(tmp_path, **options)
    kept = captured(trainer)
    (gradients,) = train(trainer)
    ((trajectories, prompts),) = kept
    (log,) = logs(trainer)
    thinks = options.get("thinking", True)
    assert all(bool(trajectory.text_ids) == thinks for trajectory in trajectories)
    system = "<|im_start|> think first <|im_end|> " if thinks else ""
    decoded = [trainer.processing_class.decode(trajectory.prompt_ids) for trajectory in trajectories]
    assert decoded == [f"{system}<|im_start|> {prompt} <|im_end|> <|im_start|>" for prompt in prompts]

    model, args = tiny_bagel(), trainer.args
    steps, shift = args.num_inference_steps, args.timestep_shift
    m = round(log["refl/step"])
    rewards = rewards_by_definition(model, contexts_of(trajectories), prompts, m, steps, shift, args.seed)
    if options["refl_loss"] == "hinge":
        losses = torch.nn.functional.relu(args.refl_margin - rewards)
    else:
        losses = -rewards
    loss = args.refl_scale * losses.mean()
    loss.backward()
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert log["reward"] == pytest.approx(rewards.mean().item(), rel=1e-5)
    if options.get("refl_margin") == 0.9068:
        assert 0 < (rewards > 0.9068).sum() < 4
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    size = torch.stack([g.norm() for n, g in expected.items() if g is not None and model.is_image_parameter(n)]).norm()
    assert size > 0
    for name, gradient in gradients.items():
        if model.is_image_parameter(name):
            torch.testing.assert_close(gradient, expected[name], rtol=2e-3, atol=1e-5 * size.item(), msg=name)
        else:
            assert gradient is None, name


def test_only_the_drawn_step_carries_a_gradient(tmp_path):
    trainer = make_refl(tmp_path, max_steps=3)
    calls, noises, predict = [], [], trainer.unified.predict_velocity

    def spied(context, latents, timesteps, image_size):
        velocity = predict(context, latents, timesteps, image_size)
        calls.append((timesteps[0].item(), latents.requires_grad, velocity.requires_grad))
        if timesteps[0] == 1:
            noises.append(latents.clone())
        # Dropout acts on the step that is trained alone.
        assert trainer.model.training == velocity.requires_grad
        assert not any(keys.requires_grad for keys in context.keys)
        return velocity

    trainer.unified.predict_velocity = spied
    trainer.train()
    drawn = [(entry["refl/step"], entry["refl/timestep"]) for entry in logs(trainer)]
    for m, t in drawn:
        of_step, calls[:] = calls[: int(m) + 1], calls[int(m) + 1 :]
        assert [grad for _, _, grad in of_step] == [False] * int(m) + [True]
        assert not any(state for _, state, _ in of_step)
        u = 1 - m / 6
        assert of_step[-1][0] == pytest.approx(t) == pytest.approx(3 * u / (1 + 2 * u))
    assert calls == []
    # Every image of every step starts from noise of its own.
    assert len(torch.cat(noises).flatten(1).unique(dim=0)) == 12


def test_thinkings_are_sampled_anew_in_every_step_as_the_options_say(tmp_path):
    def thinkings(prompts, **changes):
        dataset = Dataset.from_dict({"prompt": prompts})
        trainer = make_refl(tmp_path, dataset=dataset, **{"max_completion_length": 4, **changes})
        kept = captured(trainer)
        trainer.train()
        decode = trainer.processing_class.batch_decode
        return [(shown, decode([t.text_ids for t in seen], skip_special_tokens=True)) for seen, shown in kept]

    alike = ["a red cat"] * 4
    (_, first), (_, second) = thinkings(alike, max_steps=2)
    assert len({*first, *second}) > 4
    assert first != second
    assert {len(text.split()) for text in first} <= {0, 1, 2, 3, 4}
    # Micro-batches have streams of their own.
    (_, one), (_, other) = thinkings(alike, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert one != other
    settings = {"max_completion_length": 4, "num_inference_steps": 1, "image_size": IMAGE_SIZE}
    greedy = generate(tiny_bagel(), PROMPTS, tiny_tokenizer(), do_sample=False, **settings)
    ((prompts, cold),) = thinkings(PROMPTS, temperature=1e-4)
    assert dict(zip(prompts, cold, strict=True)) == {sample.prompt: sample.thinking for sample in greedy}


@pytest.mark.parametrize(
    ("steps", "share", "first"),
    [
        (25, 0.25, 19),
        (40, 0.25, 30),
        (10, 0.25, 8),
        (10, 0.7, 3),
        (10, 1.0, 0),
        (10, 0.1, 9),
        (1, 1.0, 0),
        (3, 0.4, 2),
    ],
)
def test_late_steps(steps, share, first):
    assert late_step_range(steps, share) == (first, steps)


@pytest.mark.slow
def test_drawn_steps_cover_their_range_and_follow_the_seed(tmp_path):
    def drawn(**changes):
        trainer = make_refl(tmp_path, thinking=False, **{"max_steps": 24, **changes})
        trainer.train()
        return [entry["refl/step"] for entry in logs(trainer)]

    first = drawn()
    assert set(first) == {3, 4, 5}
    assert drawn() == first
    assert drawn(seed=1) != first
    # One step per update, however it is cut.
    cut = drawn(per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=6)
    assert cut == first[:6]


def test_hinge_is_linear_below_its_margin():
    rewards = torch.tensor([0.5, 1.9, 2.1, -3.0], requires_grad=True)
    hinge = image_losses(rewards, "hinge", 2.0, 1e-3)
    assert hinge.tolist() == pytest.approx([1.5e-3, 1e-4, 0, 5e-3])
    (of_hinge,) = torch.autograd.grad(hinge.sum(), rewards)
    (of_linear,) = torch.autograd.grad(image_losses(rewards, "linear", 2.0, 1e-3).sum(), rewards)
    assert of_linear.tolist() == pytest.approx([-1e-3] * 4)
    assert of_hinge.tolist() == pytest.approx([-1e-3, -1e-3, 0, -1e-3])


# Rewards that fail


def test_images_without_a_reward_do_not_count():
    pixels = torch.rand(6, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    # The root has no gradient at 0: that image has a reward, and NaN for its gradient.
    factor = torch.tensor([1.0, float("nan"), 1.0, float("inf"), 0.0, 1.0])

    def reward(x):
        return (x.square().sum((1, 2, 3)) * factor).sqrt()

    rewards, loss, gradient = reward_gradient(reward, pixels, lambda r: image_losses(r, "linear", scale=1.0))
    good = [0, 2, 5]
    assert rewards.isnan().tolist() == [False, True, False, True, True, False]
    kept = pixels[good].requires_grad_()
    alone = -((kept + 1) / 2).square().sum((1, 2, 3)).sqrt().mean()
    assert loss.item() == pytest.approx(alone.item(), rel=1e-6)
    torch.testing.assert_close(gradient[good], torch.autograd.grad(alone, kept)[0])
    assert not gradient[[1, 3, 4]].any()


def test_pixels_that_are_no_numbers_stop_before_the_weights_are_gone():
    pixels = torch.zeros(3, 3, 2, 2)
    pixels[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="1 of 3 images came out of the VAE as NaN or infinity.*float32"):
        reward_gradient(lambda p: p.mean((1, 2, 3)), pixels, lambda r: r)


def test_pixels_beyond_the_range_are_clamped_and_get_no_gradient():
    pixels = torch.tensor([-1.5, -1.0, 0.0, 0.5, 1.0, 2.0]).reshape(1, 1, 1, 6).expand(2, 3, 1, 6)
    seen = []

    def reward(x):
        seen.append(x.detach())
        return x.sum((1, 2, 3))

    _, _, gradient = reward_gradient(reward, pixels, lambda r: r)
    assert seen[0][0, 0, 0].tolist() == [0, 0, 0.5, 0.75, 1, 1]
    assert gradient[0, 0, 0].tolist() == [0, 0.25, 0.25, 0.25, 0.25, 0]


def test_failed_rewards_in_training(tmp_path):
    def sometimes(pixels, prompts, **columns):
        failed = torch.tensor([prompt == PROMPTS[0] for prompt in prompts])
        return torch.where(failed, torch.nan, likeness(pixels, prompts))

    def only(pixels, prompts, **columns):
        return likeness(pixels, prompts) * torch.nan

    dataset = prompts_dataset(PROMPTS[:2], copies=2)
    trainer = make_refl(tmp_path, reward=sometimes, dataset=dataset, refl_loss="linear")
    kept = captured(trainer)
    with pytest.warns(UserWarning, match="Some images have no reward"):
        (gradients,) = train(trainer)
    ((trajectories, prompts),) = kept
    (log,) = logs(trainer)
    assert log["reward/frac_none"] == 0.5
    model = tiny_bagel()
    rewards = rewards_by_definition(model, contexts_of(trajectories), prompts, round(log["refl/step"]), 6, 3.0)
    kept_rewards = rewards[[i for i, prompt in enumerate(prompts) if prompt == PROMPTS[1]]]
    assert len(kept_rewards) == 2
    loss = -1e-3 * kept_rewards.mean()
    loss.backward()
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-4)
    name = "language_model.model.layers.0.mlp_moe_gen.up_proj.weight"
    torch.testing.assert_close(gradients[name], model.get_parameter(name).grad, rtol=2e-3, atol=1e-9)

    trainer = make_refl(tmp_path, reward=only, max_steps=2)
    before = weights(trainer.model)
    with pytest.warns(UserWarning, match="Some images have no reward"):
        trainer.train()
    assert not moved(before, weights(trainer.model))
    assert [entry["reward/frac_none"] for entry in logs(trainer)] == [1, 1]
    assert not any("reward" in entry for entry in logs(trainer))


@pytest.mark.parametrize(
    "reward",
    [
        lambda pixels, prompts: likeness(pixels.detach(), prompts),
        lambda pixels, prompts: torch.from_numpy(pixels.detach().numpy().mean((1, 2, 3))),
        lambda pixels, prompts: (pixels > 0.5).float().mean((1, 2, 3)),
        # It has a gradient, but not to the pixels.
        lambda pixels, prompts: torch.ones(len(pixels), requires_grad=True) * 2,
    ],
    ids=["detached", "numpy", "compared", "of-something-else"],
)
def test_reward_without_a_gradient(tmp_path, reward):
    trainer = make_refl(tmp_path, reward=reward)
    before = weights(trainer.model)
    with pytest.raises(ValueError, match="The reward has no gradient to the pixels"):
        trainer.train()
    assert not moved(before, weights(trainer.model))


def test_gradient_of_zero_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="The gradient is 0 at every pixel of the first batch"):
        make_refl(tmp_path, reward=lambda pixels, prompts: pixels.round().mean((1, 2, 3))).train()
    with pytest.warns(UserWarning, match=r"refl_margin=0.1"):
        make_refl(tmp_path, refl_margin=0.1).train()


# What is trained


@pytest.mark.parametrize("adapted", ["", "lora", "lora-on-both", "own-lora"])
def test_only_the_image_expert_is_trained(tmp_path, adapted):
    model, peft_config = tiny_bagel(), None
    both = LoraConfig(r=2, target_modules=model.default_lora_targets("both"))
    if adapted == "own-lora":
        model = get_peft_model(model, both)
    elif adapted:
        peft_config = LoraConfig(r=2) if adapted == "lora" else both
    trainer = make_refl(tmp_path, model=model, peft_config=peft_config, max_steps=2)
    before = weights(trainer.model)
    trainer.train()
    changed = moved(before, weights(trainer.model))
    base = trainer.unified
    of_image = {name for name in before if base.is_image_parameter(name)}
    assert changed
    assert changed <= of_image
    if adapted:
        assert all("lora" in name for name in changed)
    else:
        assert changed == of_image
    assert {n for n, p in trainer.model.named_parameters() if p.requires_grad} <= of_image


def test_micro_batches_make_the_same_update(tmp_path):
    # Without thinkings, which are drawn for a micro-batch together.
    def update(**changes):
        trainer = make_refl(
            tmp_path, thinking=False, optim="sgd", learning_rate=100.0, refl_scale=1.0, max_steps=2, **changes
        )
        before = weights(trainer.model)
        trainer.train()
        return {name: value - before[name] for name, value in weights(trainer.model).items()}, logs(trainer)

    whole, whole_log = update()
    assert max(value.abs().max() for value in whole.values()) > 1e-2
    for changes in (
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "gradient_checkpointing": True},
    ):
        parts, parts_log = update(**changes)
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-6, msg=name)
        for one, other in zip(whole_log, parts_log, strict=True):
            for name in ("loss", "reward", "refl/step", "refl/clamped"):
                assert other[name] == pytest.approx(one[name], rel=1e-4), name


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_gradient_checkpointing_changes_nothing(tmp_path, adapted):
    gradients = []
    for checkpointing in (False, True):
        peft_config = LoraConfig(r=2, init_lora_weights=False) if adapted else None
        gradients += train(make_refl(tmp_path, peft_config=peft_config, gradient_checkpointing=checkpointing))
    trained = [name for name, gradient in gradients[0].items() if gradient is not None]
    assert trained
    for name in trained:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-9, msg=name)


def test_resume_is_exact(tmp_path):
    def run(folder, resume=None, **changes):
        # Dropout in the adapters draws from the global random state; an evaluation in between must not change that.
        trainer = make_refl(
            folder,
            peft_config=LoraConfig(r=2, lora_dropout=0.3),
            max_steps=6,
            save_strategy="steps",
            save_steps=2,
            lr_scheduler_type="linear",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            **changes,
        )
        trainer.train(resume_from_checkpoint=resume)
        log = [
            {k: v for k, v in entry.items() if k in ("step", "loss", "reward", "refl/step", "grad_norm")}
            for entry in logs(trainer)
        ]
        return weights(trainer.model), log

    whole, log = run(tmp_path / "whole")
    resumed, resumed_log = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-4"))
    assert not moved(whole, resumed)
    assert resumed_log == log
    evaluated, evaluated_log = run(
        tmp_path / "evaluated", eval_dataset=prompts_dataset(copies=1), eval_strategy="steps", eval_steps=1
    )
    assert not moved(whole, evaluated)
    assert evaluated_log == log


def test_model_by_folder_is_trained_in_float32(tmp_path):
    tiny_bagel().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for changes, frozen in (({}, torch.float32), ({"bf16": True, "peft_config": LoraConfig(r=2)}, torch.bfloat16)):
        trainer = make_refl(tmp_path / "out", model=str(tmp_path / "model"), max_steps=2, **changes)
        named = list(trainer.model.named_parameters())
        assert {p.dtype for _, p in named if p.requires_grad} == {torch.float32}
        assert {p.dtype for _, p in named if not p.requires_grad} == {frozen}
        before = weights(trainer.model)
        trainer.train()
        assert moved(before, weights(trainer.model))


# Rewards


def test_what_a_function_is_given(tmp_path):
    calls = []

    def reward(pixels, prompts, **columns):
        calls.append((pixels.detach(), prompts, columns))
        return likeness(pixels, prompts)

    talk = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    dataset = Dataset.from_dict({"prompt": talk, "weight": [1.0, 2.0, 3.0, 4.0], "category": list("abcd")})
    make_refl(tmp_path, reward=reward, dataset=dataset).train()
    ((pixels, prompts, columns),) = calls
    assert pixels.shape == (4, 3, *SIZE)
    assert 0 <= pixels.min() < pixels.max() <= 1
    assert sorted(prompts) == sorted(PROMPTS)
    assert set(columns) == {"weight", "category"}
    assert [PROMPTS.index(prompt) for prompt in prompts] == ["abcd".index(x) for x in columns["category"]]
    assert [PROMPTS.index(prompt) + 1 for prompt in prompts] == columns["weight"]


def test_object_with_a_differentiable_score(tmp_path):
    class Likeness:
        def __call__(self, prompts, completions, images, **columns):
            raise AssertionError("this is for trainers without a gradient")

        def differentiable(self, pixels, prompts):
            return likeness(pixels, prompts)

    columns = {"category": list("abcd")}
    ends = []
    for reward in (Likeness(), likeness):
        trainer = make_refl(tmp_path, reward=reward, dataset=prompts_dataset(**columns))
        trainer.train()
        ends.append(weights(trainer.model))
    assert not moved(*ends)
    assert "prompts" in inspect.signature(ClipReward.differentiable).parameters


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("clip", r"reward is a str, expected a function \(pixels, prompts, \*\*columns\)"),
        (object.__new__(LocalVLMJudge), "LocalVLMJudge.differentiable takes pixels, questions, not prompts"),
    ],
)
def test_what_is_no_reward(reward, message):
    with pytest.raises(TypeError, match=message):
        as_reward(reward)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda pixels, prompts: [1.0] * len(prompts), r"returned list, expected a tensor of shape \(4,\)"),
        (lambda pixels, prompts: pixels.mean((2, 3)), r"returned a tensor of shape \(4, 3\), expected"),
        (lambda pixels, prompts: pixels.mean(), r"returned a tensor of shape \(\), expected"),
    ],
)
def test_rewards_of_another_form(tmp_path, reward, message):
    with pytest.raises(TypeError, match=message):
        make_refl(tmp_path, reward=reward).train()


def test_images_are_painted_that_are_read_back_better(tmp_path):
    """By a reader in this process; one that gives no gradient is named at the door."""
    reader, model = LocalReader(*tiny_llava(), device="cpu"), tiny_bagel()
    with pytest.raises(TypeError, match="ReadBackReward reads by the model that paints, which gives no gradient"):
        make_refl(tmp_path, model, ReadBackReward())
    before = weights(model)
    trainer = make_refl(tmp_path, model, ReadBackReward(reader), prompts_dataset(["a red cat"]))
    (gradients,) = train(trainer)
    changed = moved(before, weights(trainer.model))
    assert changed and all(trainer.unified.is_image_parameter(name) for name in changed)
    assert any(gradient is not None and gradient.any() for gradient in gradients.values())
    assert logs(trainer)[0]["reward"] < 0


# Evaluation and logs


def test_evaluation_is_the_mean_reward_of_the_finished_images(tmp_path):
    prompts = [*PROMPTS, "a cat"]
    dataset = Dataset.from_dict({"prompt": prompts})
    trainer = make_refl(tmp_path, thinking=False, eval_dataset=dataset, per_device_eval_batch_size=2)
    before = weights(trainer.model)
    metrics = trainer.evaluate()
    settings = {"thinking": False, "num_inference_steps": 6, "image_size": IMAGE_SIZE, "seed": trainer.args.seed}
    samples = generate(tiny_bagel(), prompts, tiny_tokenizer(), **settings)
    latents = torch.stack([sample.latents for sample in samples])
    pixels = tiny_bagel().decode_latents(latents, SIZE, output_type="pt").detach()
    rewards = likeness((pixels / 2 + 0.5).clamp(0, 1), prompts)
    assert metrics["eval_reward"] == pytest.approx(rewards.mean().item(), rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(1e-3 * (2 - rewards).mean().item(), rel=1e-5)
    assert metrics["eval_reward/frac_none"] == 0
    assert trainer.state.log_history[-1]["eval_reward"] == metrics["eval_reward"]
    torch.rand(3)
    assert trainer.evaluate()["eval_reward"] == metrics["eval_reward"]
    named = trainer.evaluate({"cats": dataset, "dogs": dataset.select([1])})
    assert named["eval_cats_reward"] == metrics["eval_reward"]
    assert named["eval_dogs_reward"] == pytest.approx(rewards[1].item(), abs=0.2)
    assert not moved(before, weights(trainer.model))


def test_evaluation_with_thinkings_repeats_and_can_choose_the_best_model(tmp_path):
    trainer = make_refl(
        tmp_path,
        eval_dataset=prompts_dataset(copies=1),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        greater_is_better=True,
    )
    trainer.train()
    rewards = [entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry]
    assert len(set(rewards)) == 3
    assert trainer.evaluate()["eval_reward"] == max(rewards)


def test_every_documented_metric_is_logged_and_every_logged_one_documented(tmp_path):
    trainer = make_refl(tmp_path, eval_dataset=prompts_dataset(copies=1), logging_steps=2, max_steps=2)
    trainer.train()
    (log,) = logs(trainer)
    assert set(log) - {"loss", "grad_norm", "learning_rate", "epoch", "step"} == set(REFL_METRICS)
    assert all(math.isfinite(log[name]) for name in REFL_METRICS)
    assert 0 <= log["refl/clamped"] < 1
    assert {"eval_reward", "eval_reward/frac_none", "eval_time/paint"} <= set(trainer.evaluate())


def test_evaluation_paints_at_its_own_size(tmp_path):
    sizes = []

    def seen(pixels, prompts, **_):
        sizes.append(tuple(pixels.shape[-2:]))
        return pixels.mean((1, 2, 3))

    trainer = make_refl(tmp_path, reward=seen, image_size="4x8", eval_image_size=16, eval_dataset=prompts_dataset())
    train(trainer)
    assert set(sizes) == {(4, 8)}
    sizes.clear()
    trainer.evaluate()
    assert set(sizes) == {(16, 16)}


# Wrong use


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"refl_loss": "log"}, "refl_loss='log': expected one of 'hinge', 'linear'"),
        ({"refl_margin": float("nan")}, "refl_margin=nan: expected a finite number"),
        ({"refl_scale": 0.0}, "refl_scale=0.0: expected a positive number"),
        ({"temperature": -1.0}, "temperature=-1.0: expected a positive number"),
        ({"timestep_shift": float("inf")}, "timestep_shift=inf: expected a positive number"),
        ({"num_inference_steps": 0}, "num_inference_steps=0: expected a whole number of at least 1"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5: expected an integer"),
        ({"max_completion_length": 0}, "max_completion_length=0: expected a whole number"),
        ({"image_size": -8}, "image_size=-8: expected the side of a square"),
        ({"image_size": [[8, 8], [4, 8]]}, r"image_size=\[\[8, 8\], \[4, 8\]\]: expected one size.*UniGRPOTrainer"),
        ({"late_steps": 0.0}, "late_steps=0.0: expected a share"),
        ({"late_steps": 1.5}, "late_steps=1.5: expected a share"),
        ({"late_steps": 0.05}, "late_steps=0.05 of num_inference_steps=6 holds no step: raise it to 0.167 or more"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "deepspeed=.* is not supported"),
        ({"fsdp": True}, "fsdp=True is not supported"),
        ({"image_size": 12 * IMAGE_SIZE}, "can't paint an image of 96 x 96 pixels"),
        ({"max_completion_length": 5000}, "max_completion_length=5000 leaves no room"),
    ],
)
def test_wrong_option(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_refl(tmp_path, **changes)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"]}, r"train_dataset has no column 'prompt' \(it has \['text'\]\)"),
        ({"prompt": []}, "train_dataset is empty"),
        ({"prompt": ["a"], "pixels": [1]}, "train_dataset has a column 'pixels', a name that is taken"),
    ],
)
def test_wrong_dataset(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        make_refl(tmp_path, dataset=Dataset.from_dict(columns))


def test_wrong_models(tmp_path):
    with pytest.raises(TypeError, match="Linear is not a unified model"):
        make_refl(tmp_path, model=torch.nn.Linear(1, 1))
    adapted = get_peft_model(tiny_bagel(), LoraConfig(target_modules=tiny_bagel().default_lora_targets("text")))
    with pytest.raises(ValueError, match="The image expert has no trainable weights"):
        make_refl(tmp_path, model=adapted)
    with pytest.raises(ValueError, match="the model has adapters already"):
        make_refl(tmp_path, model=adapted, peft_config=LoraConfig(r=2))


def test_hooks_of_transformers_that_are_relied_on():
    """None is private; each must be there, with what the overrides read."""
    hooks = {
        "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
        "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
        "training_step": ("model", "inputs", "num_items_in_batch"),
        "prediction_step": ("model", "inputs", "prediction_loss_only", "ignore_keys"),
        "log": ("logs", "start_time"),
    }
    for name, parameters in hooks.items():
        assert tuple(inspect.signature(getattr(Trainer, name)).parameters)[1:] == parameters
    assert "metric_key_prefix" in inspect.signature(Trainer.evaluation_loop).parameters
    assert Trainer.loss_is_scaled_for_ga is None


# Several processes


PROCESSES = {"thinking": False, "optim": "sgd", "learning_rate": 100.0, "refl_scale": 1.0, "max_steps": 2}


def run_of_a_process(rank, port, folder):
    import os

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(200, exit=True)  # processes that wait for each other say where
    dataset = prompts_dataset(copies=1)
    trainer = make_refl(folder, per_device_train_batch_size=1, gradient_accumulation_steps=2,
                        per_device_eval_batch_size=1, eval_dataset=dataset, **PROCESSES)  # fmt: skip
    trainer.train()
    result = {"weights": weights(trainer.model), "log": trainer.state.log_history, "eval": trainer.evaluate()}
    torch.save(result, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.slow
def test_two_processes_make_the_update_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(run_of_a_process, args=(port, str(tmp_path)), nprocs=2)
    trainer = make_refl(tmp_path, eval_dataset=prompts_dataset(copies=1), **PROCESSES)
    before = weights(trainer.model)
    trainer.train()
    after, metrics = weights(trainer.model), trainer.evaluate()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=False)
        for name in before:
            expected, update = after[name] - before[name], found["weights"][name] - before[name]
            torch.testing.assert_close(update, expected, rtol=1e-3, atol=1e-6, msg=name)
        for one, other in zip(logs(trainer), [entry for entry in found["log"] if "loss" in entry], strict=True):
            for name in ("loss", "reward", "refl/step"):
                assert other[name] == pytest.approx(one[name], rel=1e-4), name
        assert found["eval"]["eval_reward"] == pytest.approx(metrics["eval_reward"], rel=1e-4)


# The real thing


@pytest.mark.slow
def test_it_raises_the_verifiers_score_of_unseen_prompts(tmp_path):
    model, tokenizer = load_base()
    before = evaluate_model(model, tokenizer, 140, "validation")
    trainer = ReFLTrainer(
        model=model,
        reward=soft_shapeworld_reward,
        args=ReFLConfig(
            str(tmp_path),
            max_steps=40,
            per_device_train_batch_size=96,
            learning_rate=2e-4,
            adam_beta2=0.99,
            lr_scheduler_type="constant",
            image_size=48,
            num_inference_steps=10,
            max_completion_length=24,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=shapeworld_dataset("train"),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    after = evaluate_model(model, tokenizer, 140, "validation")
    assert after.reward.mean() > before.reward.mean() + 0.06
    assert after.error.mean() < 3 * before.error.mean()
