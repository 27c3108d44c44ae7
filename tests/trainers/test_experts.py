"""Which weights are trained, against which reference, at which rate, and in which precision."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.helpers.tiny_unified import IMAGE_SIZE, PROMPTS, images_of, moved, redness, tiny_bagel, weights
from trl_unigrpo.models.experts import clip_by_expert
from trl_unigrpo.monitoring.trust import TrustError
from trl_unigrpo.trajectory import Round, Trajectory


SIZE = (IMAGE_SIZE, IMAGE_SIZE)
EVERYTHING = r".*layers\.\d+\.(self_attn|mlp).*_proj(_moe_gen)?"


def is_image(name):
    return "moe_gen" in name or any(part in name for part in ("vae2llm", "llm2vae", "time_embedder"))


def velocity_of(model, steps):
    with torch.no_grad():
        return model.predict_velocities(steps)


# Freezing


@pytest.mark.parametrize("off", ["text_weight", "flow_weight"])
@pytest.mark.parametrize("adapters", ["none", "default", "everything", "everything, with a text KL"])
def test_weight_of_zero_leaves_that_expert_as_it_is(make_trainer, off, adapters):
    peft_config = None
    if adapters != "none":
        targets = None if adapters == "default" else EVERYTHING
        peft_config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    trainer = make_trainer(
        peft_config=peft_config, beta=0.1 if "KL" in adapters else 0.0, weight_decay=0.1, max_steps=3, **{off: 0.0}
    )
    before = weights(trainer.model)
    trainer.train()
    changed = moved(before, weights(trainer.model))
    assert changed
    assert {is_image(name) for name in changed} == {off == "text_weight"}
    if adapters != "none":
        assert all("lora_" in name for name in changed)
    # Frozen weights stay frozen: TRL's and our reference passes switch adapters off and on.
    assert all(
        is_image(name) == (off == "text_weight")
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    )


def test_text_alone_samples_by_the_ode_and_records_nothing(make_trainer, train):
    trainer = make_trainer(flow_weight=0.0, num_iterations=1, max_steps=1)
    plans, plan = [], trainer._plan
    trainer._plan = lambda count: plans.append(plan(count)) or plans[-1]
    seen = train(trainer)
    assert [plan.windows for plan in plans] == [None]
    assert all("trajectories" not in batch for batch in seen.batches)
    assert not any(key.startswith("flow/") for key in trainer.state.log_history[0])
    assert trainer.unified.kept_reference is None


def test_without_thinking_images_follow_the_prompt_alone(make_trainer, train):
    model, seen, answers = tiny_bagel(), [], []
    contexts = model.contexts

    def spied(trajectories):
        seen.append(trajectories)
        return contexts(trajectories)

    def reward(prompts, completions, images, **columns):
        answers.extend(completions)
        return redness(prompts, completions, images)

    model.contexts = spied
    before = weights(model)
    trainer = make_trainer(model=model, reward_funcs=reward, thinking=False, text_weight=0.0, max_steps=2)
    batches = train(trainer).batches
    assert set(answers) == {""}
    changed = moved(before, weights(model))
    assert changed
    assert all(model.is_image_parameter(name) for name in changed)
    [trajectories] = seen
    assert all(trajectory.text_ids == [] for trajectory in trajectories)
    messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]  # no system prompt
    prompts = trainer.processing_class.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    expected = [row.ids.tolist() for row in contexts([Trajectory("", ids) for ids in prompts])]
    assert all(image.context.ids.tolist() in expected for image in images_of(batches))


def test_lines_are_sampled_by_the_ode_and_start_at_the_image(make_trainer, train):
    trainer = make_trainer(image_objective="awm", matching_samples=3, num_iterations=1, max_steps=1)
    plans, plan = [], trainer._plan
    trainer._plan = lambda count: plans.append(plan(count)) or plans[-1]
    seen = train(trainer)
    assert [plan.windows for plan in plans] == [None]
    images = images_of(seen.batches)
    assert len({tuple(image.steps.t.tolist()) for image in images}) == len(images)
    noise = torch.stack([image.steps.target + image.latents for image in images])
    assert noise.shape[1] == 3
    assert len(torch.unique(noise.flatten(0, 1).flatten(1), dim=0)) == 3 * len(images)
    for image, ends in zip(images, noise, strict=True):
        t = image.steps.t[:, None, None]
        torch.testing.assert_close(image.steps.x, (1 - t) * image.latents + t * ends)


def test_image_loss_reaches_the_text_expert_through_the_context_only_if_told(make_trainer, train):
    reached = {}
    for context_grad in ("detach", "full"):
        # Advantages of 0 leave the velocity MSE as the only force; weights off the reference make it differ from 0.
        trainer = make_trainer(
            flow_context_grad=context_grad,
            reward_funcs=lambda images, **_: [1.0] * len(images),
            peft_config=LoraConfig(r=2, init_lora_weights=False, target_modules=EVERYTHING),
            max_grad_norm=0.0,
            max_steps=1,
            trust_checks="off",
        )
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.mul_(2 if parameter.requires_grad else 1)
        gradients = train(trainer).gradients[0]
        names = [n for n in gradients if "layers.0.self_attn.k_proj." in n and "lora_B" in n]
        assert len(names) == 1
        reached[context_grad] = gradients[names[0]].abs().max().item()
    # What is left with "detach" comes through the two marker tokens of the image.
    assert reached["full"] > 2 * reached["detach"]


@pytest.mark.parametrize(
    ("changes", "experts"), [({}, "both"), ({"text_weight": 0.0}, "image"), ({"flow_weight": 0.0}, "text")]
)
def test_default_adapters_go_to_the_experts_that_are_trained(make_trainer, changes, experts):
    trainer = make_trainer(peft_config=LoraConfig(r=2), **changes)
    adapted = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert {is_image(name) for name in adapted} == {"both": {False, True}, "image": {True}, "text": {False}}[experts]
    # 7 linear layers, A and B, in each of 2 layers
    assert len(adapted) == 7 * 2 * 2 * (2 if experts == "both" else 1)


def test_expert_without_anything_to_train_is_refused(make_trainer):
    only_text = LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"image expert has no trainable weights.*Set flow_weight=0"):
        make_trainer(peft_config=only_text)
    trainer = make_trainer(peft_config=only_text, flow_weight=0.0)
    assert trainer._setup.trains == {"text": True, "image": False}


# Learning rates and clipping


def test_each_expert_is_stepped_at_its_own_rate_and_the_logs_say_so(make_trainer, train):
    trainer = make_trainer(
        max_steps=4,
        optim="sgd",
        learning_rate=1e-2,
        image_learning_rate=5e-1,
        lr_scheduler_type="linear",
        max_grad_norm=0.0,
    )
    seen = train(trainer)
    after = [*seen.weights[1:], weights(trainer.model)]
    for step in range(4):
        decay = 1 - step / 4
        rates = {"text": 1e-2 * decay, "image": 5e-1 * decay}
        assert seen.rates[step] == pytest.approx(rates)
        for name, gradient in seen.gradients[step].items():
            rate = rates["image" if is_image(name) else "text"]
            torch.testing.assert_close(after[step][name], seen.weights[step][name] - rate * gradient)
        log = trainer.state.log_history[step]
        assert log["learning_rate/text"] == pytest.approx(rates["text"])
        assert log["learning_rate/image"] == pytest.approx(rates["image"])
        assert log["learning_rate"] == pytest.approx(rates["text"])


@pytest.mark.parametrize("max_grad_norm", [0.5, 1e-4])
def test_each_expert_is_clipped_by_its_own_norm(make_trainer, train, max_grad_norm):
    rates = {"text": 1e3, "image": 2e3}  # one giant step, from which the gradient can be read
    trainer = make_trainer(
        max_steps=1,
        num_iterations=1,
        optim="sgd",
        learning_rate=rates["text"],
        image_learning_rate=rates["image"],
        max_grad_norm=max_grad_norm,
    )
    seen = train(trainer)
    free = train(make_trainer(max_steps=1, num_iterations=1, max_grad_norm=0.0))
    after, log = weights(trainer.model), trainer.state.log_history[0]
    for expert in ("text", "image"):
        names = [name for name in free.gradients[0] if is_image(name) == (expert == "image")]
        norm = torch.stack([free.gradients[0][name].norm() for name in names]).norm().item()
        assert log[f"grad_norm/{expert}"] == pytest.approx(norm, rel=1e-4)
        scale = min(1.0, max_grad_norm / norm)
        for name in names:
            applied = (seen.weights[0][name] - after[name]) / rates[expert]
            torch.testing.assert_close(applied, scale * free.gradients[0][name], rtol=1e-3, atol=1e-6 * scale + 2e-9)
    # One joint norm would have shrunk the image's gradient by the text's.
    assert log["grad_norm/text"] > 0.5 > 10 * log["grad_norm/image"]
    both = (log["grad_norm/text"] ** 2 + log["grad_norm/image"] ** 2) ** 0.5
    assert log["grad_norm"] == pytest.approx(both, rel=1e-4)


def test_gradients_are_scaled_as_torch_scales_them_and_an_expert_may_have_none():
    model = tiny_bagel()
    own = {name: p for name, p in model.named_parameters() if p.requires_grad and not is_image(name)}
    for parameter in own.values():
        parameter.grad = torch.randn_like(parameter)
    expected = {name: torch.nn.Parameter(p.detach().clone()) for name, p in own.items()}
    for name, parameter in expected.items():
        parameter.grad = own[name].grad.clone()
    norms = clip_by_expert(model, model, 0.5)
    assert norms["image"] == 0
    torch.testing.assert_close(norms["text"], torch.nn.utils.clip_grad_norm_(expected.values(), 0.5))
    for name, parameter in own.items():
        torch.testing.assert_close(parameter.grad, expected[name].grad)


def test_an_optimizer_of_the_user_is_left_alone(make_trainer):
    model = tiny_bagel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    with pytest.warns(UserWarning, match="your SGD keeps its own settings. learning_rate, image_learning_rate and"):
        trainer = make_trainer(model=model, optimizers=(optimizer, None))
    trainer.train()
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert "name" not in optimizer.param_groups[0]
    log = trainer.state.log_history[0]
    assert log["learning_rate/text"] == log["learning_rate/image"] == 0.25


def test_an_optimizer_of_the_user_is_logged_by_expert_under_its_own_scheduler(make_trainer):
    model = tiny_bagel()
    halves = [[p for n, p in model.named_parameters() if is_image(n) == image] for image in (True, False)]
    optimizer = torch.optim.SGD([{"params": halves[0], "lr": 0.5}, {"params": halves[1], "lr": 0.25}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.5**step])
    trainer = make_trainer(model=model, optimizers=(optimizer, scheduler))
    trainer.train()
    rates = [(log["learning_rate/text"], log["learning_rate/image"]) for log in trainer.state.log_history[:2]]
    assert rates == [(0.25, 0.5), (0.125, 0.5)]


@pytest.mark.parametrize("adapted", [False, True])
def test_an_optimizer_that_steps_nothing_of_an_expert(make_trainer, adapted):
    model = tiny_bagel()
    kept = [p for n, p in model.named_parameters() if adapted or not is_image(n)]
    arguments = {"peft_config": LoraConfig(r=2)} if adapted else {}
    message = f"the SGD holds none of the .* weights of the {'text' if adapted else 'image'} expert.*get_peft_model"
    with pytest.raises(ValueError, match=message):
        make_trainer(model=model, optimizers=(torch.optim.SGD(kept, lr=0.25), None), **arguments)
    if not adapted:
        make_trainer(model=model, optimizers=(torch.optim.SGD(kept, lr=0.25), None), flow_weight=0.0)


def test_weight_decay_keeps_to_its_groups(make_trainer):
    trainer = make_trainer(weight_decay=0.1)
    trainer.create_optimizer()
    groups = {(group["name"], group["weight_decay"]) for group in trainer.optimizer.param_groups}
    assert groups == {("text", 0.1), ("text", 0.0), ("image", 0.1), ("image", 0.0)}
    split = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in split}) == len(split) == len(list(trainer.model.parameters()))


# Precision


def test_adapters_are_float32_on_a_bfloat16_base(make_trainer):
    model = tiny_bagel().to(torch.bfloat16)
    trainer = make_trainer(model=model, peft_config=LoraConfig(r=2), bf16=True)
    dtypes = {name: parameter.dtype for name, parameter in trainer.model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "lora_" not in name} == {torch.bfloat16}
    trainer.train()
    assert trainer.state.log_history[0]["flow/log_ratio_std"] == 0


def test_bfloat16_adapter_of_the_user_is_brought_to_float32(make_trainer):
    config = LoraConfig(r=2, target_modules=tiny_bagel().default_lora_targets("both"))
    model = get_peft_model(tiny_bagel().to(torch.bfloat16), config, autocast_adapter_dtype=False)
    trainer = make_trainer(model=model, bf16=True)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()


def test_training_bfloat16_weights_is_questioned(make_trainer):
    with pytest.raises(TrustError, match=r"stored in torch.bfloat16.*Load the model in torch.float32"):
        make_trainer(model=tiny_bagel().to(torch.bfloat16), bf16=True)


def test_thinking_is_painted_from_the_weights_that_were_sampled_with(make_trainer):
    # A rollout with adapters on, the reference with them off: the state of the adapters survives both.
    trainer = make_trainer(peft_config=LoraConfig(r=2))
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.1 if parameter.requires_grad else 0)
    base = trainer.unified
    contexts = base.contexts([Trajectory("", [1, 8, 2, 1], rounds=[Round([6, 2])])])
    before = base.encode_context(contexts).keys[1]
    with base.reference() as reference:
        off = reference.encode_context(contexts).keys[1]
    after = base.encode_context(contexts).keys[1]
    assert torch.equal(before, after)
    assert not torch.allclose(before, off, atol=1e-3)
