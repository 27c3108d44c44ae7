"""UniGRPOTrainer over a tiny language model and a tiny pipeline: no line of it knows that it is not BAGEL."""

import re
import weakref

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image as PILImage
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.helpers.painting import painted_steps, prompts_alone
from tests.helpers.tiny_cosmos3 import tiny_cosmos3
from tests.helpers.tiny_painters import PROMPTS, generators, tiny_model, unified
from tests.helpers.tiny_pipelines import VOCABULARY, flux2_klein, hidream, qwen3, saved_halves, sd3, tokenizer
from tests.helpers.tiny_unified import PROMPTS as PROMPTS_OF_TRAINING
from tests.helpers.tiny_unified import images_of, moved, prompts_dataset, redness, tiny_config, weights
from trl_unigrpo import ReFLConfig, ReFLTrainer
from trl_unigrpo.evaluation import load_model
from trl_unigrpo.flow.sampler import RolloutPlan
from trl_unigrpo.flow.states import LinePoints
from trl_unigrpo.images import mark_failed
from trl_unigrpo.models.pipeline import PipelineForUnifiedGeneration, PipelineUnifiedConfig
from trl_unigrpo.models.pipeline.loop import PipelineLoop
from trl_unigrpo.sampling import decode, paint
from trl_unigrpo.trainers.failed_images import mask_failed
from trl_unigrpo.trainers.sft_trainer import UnifiedSFTConfig, UnifiedSFTTrainer
from trl_unigrpo.trainers.unigrpo_trainer import UniGRPOTrainer
from trl_unigrpo.trajectory import Image, Round, Steps, Trajectory, in_order


def arguments(**changes):
    return {"processing_class": tokenizer(), "image_size": 8, "max_completion_length": 4, **changes}


@pytest.mark.parametrize(("peft", "checkpointing"), [(False, False), (True, True)], ids=["full", "lora"])
def test_both_are_trained_and_nothing_else(make_trainer, peft, checkpointing):
    model = tiny_model()
    config = LoraConfig(r=2) if peft else None
    trainer = make_trainer(model=model, peft_config=config, gradient_checkpointing=checkpointing, **arguments())
    before = weights(trainer.model)
    trainer.train()
    changed = moved(before, weights(trainer.model))
    assert {name.removeprefix("base_model.model.").split(".")[0] for name in changed} == {"thinker", "painter"}
    assert not peft or all(".lora_" in name for name in changed)
    history = trainer.state.log_history
    assert history[0]["flow/log_ratio_std"] == 0  # on-policy in the first pass, by the same rows of the same states
    assert history[1]["flow/log_ratio_std"] > 0
    assert history[0]["flow/velocity_mse"] == pytest.approx(0, abs=1e-12)
    assert history[1]["flow/velocity_mse"] > 0
    assert not hasattr(model.painter, "gradient_checkpointing") or not model.painter.gradient_checkpointing


@pytest.mark.parametrize(("weight", "part"), [("text_weight", "painter"), ("flow_weight", "thinker")])
def test_one_expert_alone(make_trainer, weight, part):
    settings = arguments(**{weight: 0.0}, max_steps=1)
    trainer = make_trainer(model=tiny_model(), peft_config=LoraConfig(r=2), **settings)
    before = weights(trainer.model)
    trainer.train()
    changed = moved(before, weights(trainer.model))
    assert {name.removeprefix("base_model.model.").split(".")[0] for name in changed} == {part}


def test_the_painter_hears_what_was_thought(make_trainer, train):
    trainer = make_trainer(model=tiny_model(), **arguments(max_steps=1))
    heard, contexts = [], trainer.unified.contexts

    def kept(trajectories):
        heard.append((trajectories, contexts(trajectories)))
        return heard[-1][1]

    trainer.unified.contexts = kept
    seen = train(trainer)
    (trajectories, told), *_ = heard
    texts = tokenizer().batch_decode([t.text_ids for t in trajectories], skip_special_tokens=True)
    assert told == [text.rpartition("</think>")[2].strip() or "never empty" for text in texts]
    assert len(set(told)) > 1
    assert sorted(image.context for image in images_of(seen.batches)) == sorted(told)


def test_mixture_of_experts_thinks(make_trainer, train):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        eos_token_id=5,
        pad_token_id=0,
    )
    model = tiny_model(thinker=Qwen3MoeForCausalLM(config))
    # No image and no advantage: the loss that balances the experts is all that there is.
    trainer = make_trainer(
        model=model,
        reward_funcs=lambda images, **_: [1.0] * len(images),
        router_aux_loss_coef=0.1,
        **arguments(flow_weight=0.0, max_steps=1),
    )
    (gradients,) = train(trainer).gradients
    log = trainer.state.log_history[0]
    assert log["aux_loss"] == pytest.approx(2, rel=0.1)  # of two experts in use, when all are used alike
    assert log["loss"] == pytest.approx(0.1 * log["aux_loss"], rel=1e-3)
    assert all(g.abs().max() > 0 for n, g in gradients.items() if n.endswith("mlp.gate.weight"))


@pytest.mark.parametrize("peft", [pytest.param(False, marks=pytest.mark.slow), True], ids=["full", "lora"])
def test_resumes_to_the_bit(make_trainer, tmp_path, peft):
    def run(folder, resume=None):
        settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
        config = LoraConfig(r=2) if peft else None
        trainer = make_trainer(output_dir=folder, model=tiny_model(), peft_config=config, **arguments(**settings))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-1"))  # between two passes
    assert not moved(weights(whole.model), weights(resumed.model))


def test_the_ten_lines_with_another_model(tmp_path):
    """Nothing but the model changes; what is saved is read by transformers and diffusers."""
    tiny = sd3()
    qwen3(language_head=True).save_pretrained(tmp_path / "thinker")
    tokenizer().save_pretrained(tmp_path / "thinker")
    tiny.pipeline.save_pretrained(tmp_path / "painter")
    trainer = UniGRPOTrainer(
        model=PipelineForUnifiedGeneration.from_pretrained(
            thinker=str(tmp_path / "thinker"), painter=str(tmp_path / "painter"), painter_arguments=tiny.arguments
        ),
        reward_funcs=redness,
        args=tiny_config(tmp_path / "run", image_size=8, max_completion_length=4, max_steps=2),
        train_dataset=prompts_dataset(),
        peft_config=LoraConfig(r=2),
    )
    assert trainer.processing_class.get_vocab() == tokenizer().get_vocab()
    trainer.train()
    trainer.save_model(trainer.args.output_dir)
    trainer.create_model_card()
    run = tmp_path / "run"

    model, size = trainer.unified, (8, 8)
    plan = RolloutPlan(model.own_timesteps(3, size), size)
    (image,) = decode(model, paint(model, prompts_alone(PROMPTS[:1]), plan, generators(1)))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "painter")
    pipeline.load_lora_weights(run / "adapters" / "painter")
    call = {"height": 8, "width": 8, "num_inference_steps": 3, "guidance_scale": 1.0, **tiny.arguments}
    other = pipeline(PROMPTS[0], generator=generators(1), **call).images[0]
    assert np.array_equal(np.asarray(image), np.asarray(other))
    base = DiffusionPipeline.from_pretrained(tmp_path / "painter")(PROMPTS[0], generator=generators(1), **call)
    assert not np.array_equal(np.asarray(base.images[0]), np.asarray(other))
    thinker = AutoModelForCausalLM.from_pretrained(tmp_path / "thinker", dtype=torch.float32)
    thinker = PeftModel.from_pretrained(thinker, run, subfolder="adapters/thinker")
    ids = torch.tensor([[10, 40, 90, 41]])
    assert torch.equal(thinker(input_ids=ids).logits, model(ids).logits)
    card = (run / "README.md").read_text(encoding="utf-8")
    assert f'pipeline.load_lora_weights("{run}", subfolder="adapters/painter", ' in card


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["nothing"], "target_modules 'nothing' match no module of the model"),
        (["q_proj"], "match 4 modules of frozen, which are not trained"),
    ],
)
def test_adapters_in_the_wrong_place(make_trainer, targets, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(model=tiny_model(), peft_config=LoraConfig(r=2, target_modules=targets), **arguments())


def test_an_image_size_that_the_painter_can_not_paint(make_trainer):
    with pytest.raises(ValueError, match="QwenImagePipeline can't paint an image of 36 x 36 pixels"):
        make_trainer(model=tiny_model("qwen_image"), **arguments(image_size=36))


def test_evaluates_with_guidance(make_trainer):
    trainer = make_trainer(model=tiny_model(), **arguments(eval_guidance_scale=3.0, num_generations_eval=1))
    plain = make_trainer(model=tiny_model(), **arguments(num_generations_eval=1))
    rewards = [t.evaluate(t.train_dataset.select(range(4)))["eval_reward"] for t in (trainer, plain)]
    assert rewards[0] != rewards[1]


class Memory:
    """Bytes that autograd keeps for backward."""

    def __init__(self):
        self.now = self.peak = 0

    def hooks(self):
        class Kept:
            pass

        def keep(x):
            kept = Kept()
            kept.x = x
            self.now += x.nbytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(kept, self.release, x.nbytes)
            return kept

        return torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.x)

    def release(self, size):
        self.now -= size


def test_memory_is_that_of_one_step():
    model = tiny_model()
    model.requires_grad_(True)
    peaks = []
    for steps in (1, 4):
        plan = RolloutPlan(model.own_timesteps(6, (8, 8)), (8, 8), torch.arange(steps))
        table = painted_steps(model, prompts_alone(PROMPTS), plan, generators())
        memory = Memory()
        with memory.hooks():
            for _, velocity in model.velocities(table):
                velocity.square().mean().backward()
                del velocity
        assert memory.peak > 0
        peaks.append(memory.peak)
    assert peaks[1] <= 1.01 * peaks[0]


def test_gradients_are_those_of_the_network_called_by_hand():
    """Stable Diffusion 3: hidden states, 1000 t, and what its three encoders say."""
    model, size = tiny_model(), (8, 8)
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, *model.latent_shape(size), generator=generator)
    times, target = torch.tensor([0.9, 0.3]), torch.randn(latents.shape, generator=generator)
    images = [
        Image(x, size, prompt, LinePoints(x[None], t[None], x[None]))
        for x, t, prompt in zip(latents, times, PROMPTS[:2], strict=True)
    ]
    steps = Steps.of([Trajectory("", [], rounds=[Round(images=[image])]) for image in images])
    gradients = []
    for velocity in (
        lambda: in_order(model.velocities(steps)),
        lambda: by_hand(model.pipeline, latents, times),
    ):
        model.zero_grad()
        (velocity() - target).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.painter.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 60
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-7)


def by_hand(pipeline, latents, times):
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            PROMPTS[:2], None, None, do_classifier_free_guidance=False, max_sequence_length=32
        )
    return pipeline.transformer(
        latents, encoder_hidden_states=embeds, pooled_projections=pooled, timestep=1000 * times
    ).sample


@pytest.mark.parametrize("context_grad", [pytest.param("detach", marks=pytest.mark.slow), "full"])
def test_a_shared_encoder_is_trained_by_the_image_if_it_may(make_trainer, context_grad):
    """Without a loss on the text nothing else reaches it."""
    tiny = flux2_klein()
    model = PipelineForUnifiedGeneration.from_pretrained(
        painter=tiny.pipeline, painter_arguments=tiny.arguments, dtype=torch.float32
    )
    settings = {"flow_context_grad": context_grad, "text_weight": 1e-30, "gradient_checkpointing": True}
    trainer = make_trainer(model=model, peft_config=LoraConfig(r=2), **arguments(**settings, max_steps=2))
    before = weights(trainer.model)
    trainer.train()
    change = {name: (after - before[name]).abs().max() for name, after in weights(trainer.model).items()}
    thinker, painter = (max(x for n, x in change.items() if f".{part}." in n) for part in ("thinker", "painter"))
    assert painter > 1e-3
    assert (thinker > 1e-3) == (context_grad == "full")
    assert trainer.state.log_history[0]["flow/log_ratio_std"] == 0


def test_cosmos3_is_one_model_like_bagel(make_trainer):
    model = tiny_cosmos3()
    words = model.tokenizer
    trainer = make_trainer(
        model=model,
        peft_config=LoraConfig(r=2),
        **{**arguments(image_size=16, max_steps=1), "processing_class": words},
    )
    before = weights(trainer.model)
    trainer.train()
    changed = moved(before, weights(trainer.model))
    groups = {group["name"]: group["params"] for group in trainer.optimizer.param_groups}
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    assert all("add_" not in names[id(p)] and "moe_gen" not in names[id(p)] for p in groups["text"])
    assert any(".to_q." in name for name in changed) and any(".add_q_proj." in name for name in changed)
    assert trainer.state.log_history[0]["flow/log_ratio_std"] == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 2.0},
        pytest.param({"image_objective": "awm"}, marks=pytest.mark.slow),
        {"thinking": False},
    ],
    ids=["guidance", "awm", "no-thinking"],
)
def test_the_trainers_other_settings(make_trainer, train, settings):
    """Guidance by an empty prompt in training, times off the rollout's grid, and images from the prompt alone."""
    text_weight = 0.0 if settings.get("thinking") is False else 1.0
    trainer = make_trainer(
        model=tiny_model(), peft_config=LoraConfig(r=2), **arguments(text_weight=text_weight, max_steps=1, **settings)
    )
    before = weights(trainer.model)
    seen = train(trainer)
    assert any(".painter." in name for name in moved(before, weights(trainer.model)))
    image = images_of(seen.batches)[0]
    if "guidance_scale" in settings:
        assert image.branches == {"text": ""}
        assert trainer.state.log_history[0]["flow/log_ratio_std"] == 0
    if "thinking" in settings:
        assert image.context in PROMPTS_OF_TRAINING


@pytest.mark.parametrize("kind", ["unigrpo", "refl"])
def test_dry_run_waits_for_the_accelerator_and_comes_before_training(make_trainer, tmp_path, monkeypatch, kind):
    def make_model():
        config = PipelineUnifiedConfig(painter_arguments={"max_sequence_length": 1000})
        return PipelineForUnifiedGeneration(qwen3(language_head=True), tokenizer(), sd3().pipeline, config)

    def make_refl(model):
        args = ReFLConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, image_size=8)
        return ReFLTrainer(model, lambda pixels, **_: pixels.mean((1, 2, 3)), args, prompts_dataset())

    make = {"unigrpo": lambda model: make_trainer(model=model, **arguments()), "refl": make_refl}[kind]
    with pytest.raises(ValueError, match=r"fails in a dry run: .*max_sequence_length"):
        make_model()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    model, done, run = make_model(), [], PipelineLoop.run
    monkeypatch.setattr(model, "to", lambda device: done.append(f"to {device}"))
    monkeypatch.setattr(
        PipelineLoop, "run", lambda self, *args, **more: done.append("run") or run(self, *args, **more)
    )
    with pytest.raises(ValueError, match=r"fails in a dry run: .*max_sequence_length"):
        make(model)
    assert done[:2] == ["to cpu", "run"]


@pytest.mark.parametrize("kind", ["sft", "refl"])
def test_adapters_of_the_other_trainers_say_what_they_were_trained_on(tmp_path, kind):
    config = UnifiedSFTConfig if kind == "sft" else ReFLConfig
    size = {} if kind == "sft" else {"image_size": 8}
    args = config(str(tmp_path / "run"), report_to="none", use_cpu=True, bf16=False, **size)
    model = PipelineForUnifiedGeneration.from_pretrained(**saved_halves(tmp_path), dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=model.default_lora_targets("both")))
    if kind == "sft":
        rows = prompts_dataset(completion=["a"] * 4, image=[PILImage.new("RGB", (8, 8))] * 4)
        trainer = UnifiedSFTTrainer(adapted, args, rows)
    else:
        trainer = ReFLTrainer(adapted, lambda pixels, **_: pixels.mean((1, 2, 3)), args, prompts_dataset())
    trainer.save_model()
    assert type(load_model(str(tmp_path / "run"), device="cpu")[0].get_base_model()) is type(model)


# What a painter can't train, or can't show


@pytest.mark.parametrize("excluded", [None, r".*experts.*"])
def test_weights_that_no_gradient_reaches_are_named_at_the_start(make_trainer, excluded):
    """HiDream computes its routed experts without a gradient where it paints."""
    config = LoraConfig(r=2, exclude_modules=excluded)
    options = arguments(image_size=128, text_weight=0.0)
    if excluded is not None:
        trainer = make_trainer(model=unified(hidream()), peft_config=config, **options)
        before = weights(trainer.unified)
        trainer.unified.check_trained_weights()
        assert not moved(before, weights(trainer.unified))
        return
    with pytest.raises(ValueError, match=r"No gradient reaches painter\.double_stream_blocks\.\*") as caught:
        make_trainer(model=unified(hidream()), peft_config=config, **options)
    named = re.search(r"exclude_modules=r'(.*)'\)", str(caught.value)).group(1)
    assert all(re.fullmatch(rf".*{named}", f"painter.single_stream_blocks.0.block.ff_i.experts.1.w{n}") for n in "123")
    remedied = LoraConfig(r=2, exclude_modules=named)
    assert make_trainer(model=unified(hidream()), peft_config=remedied, **options)


@pytest.fixture
def overflowing(monkeypatch):
    """A model whose VAE gives NaN for the images whose numbers are told."""

    def make(broken):
        model = tiny_model()
        vae = model.pipeline.vae
        whole = vae.decode

        def decode(latents, *args, **kwargs):
            out = whole(latents, *args, **kwargs)
            out[0][broken] = float("nan")
            return out

        monkeypatch.setattr(vae, "decode", decode)
        return model

    return make


@pytest.mark.parametrize("asynchronous", [False, True])
def test_images_that_are_not_numbers_have_no_reward_and_no_advantage(make_trainer, train, overflowing, asynchronous):
    seen = []

    def brightness(prompts, completions, images, name, trainer_state, **columns):
        assert len(prompts) == len(completions) == len(images) == len(name)
        assert all(not image.info for image in images)
        seen.append(list(zip(prompts, name, images, strict=True)))
        return [np.asarray(image).mean() / 255 for image in images]

    async def later(**columns):
        return brightness(**columns)

    dataset = prompts_dataset(name=[prompt.upper() for prompt in PROMPTS_OF_TRAINING])
    trainer = make_trainer(
        model=overflowing(slice(1, 8, 3)),
        reward_funcs=later if asynchronous else brightness,
        train_dataset=dataset,
        **arguments(max_steps=1),
    )
    with pytest.warns(UserWarning, match="came out of the VAE as NaN or infinity: they have no reward"):
        batches = train(trainer).batches
    (rows,) = seen
    assert len(rows) == 5
    assert all(name == prompt.upper() for prompt, name, _ in rows)
    (logged, *_) = trainer.state.log_history
    assert logged["images/not_finite"] == logged["reward/frac_none"] == 3 / 8
    advantages = torch.cat([batch["advantages"] for batch in batches])
    assert (advantages == 0).sum() == 3
    assert logged["reward"] == pytest.approx(np.mean([np.asarray(image).mean() / 255 for *_, image in rows]), rel=1e-5)


def test_reward_models_that_look_at_the_text_alone_do_not_reward_them_either():
    images = [PIL.Image.new("RGB", (4, 4)) for _ in range(3)]
    rows = [{"images": image} for image in mark_failed(images, [True, False, True])]
    rewards = mask_failed(Accelerator(cpu=True), torch.ones(3, 2), rows)
    assert rewards.isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]


def test_a_batch_of_images_that_are_no_numbers_is_an_error(make_trainer, overflowing):
    trainer = make_trainer(model=overflowing(slice(None)), **arguments(max_steps=1))
    with pytest.raises(ValueError, match=r"All 8 images of a batch .* pipeline\.vae\.to\(torch\.float32\)"):
        trainer.train()
