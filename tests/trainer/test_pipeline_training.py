"""UniGRPOTrainer over a tiny language model and a tiny pipeline: no line of it knows that it is not BAGEL."""

import sys
import weakref
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny_unified import moved, weights


sys.path.append(str(Path(__file__).parent.parent / "models"))

from tiny_painters import PROMPTS, generators, painted_from, tiny_model
from tiny_pipelines import tokenizer

from trl_unigrpo.models.unified import FlowInputs
from trl_unigrpo.rollout import RolloutPlan


def arguments(**changes):
    return {"processing_class": tokenizer(), "image_size": 8, "max_completion_length": 4, **changes}


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
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
    trainer = make_trainer(model=tiny_model(), peft_config=LoraConfig(r=2), **arguments(**{weight: 0.0}))
    before = weights(trainer.model)
    trainer.train()
    changed = moved(before, weights(trainer.model))
    assert {name.removeprefix("base_model.model.").split(".")[0] for name in changed} == {part}


def test_the_painter_hears_what_was_thought(make_trainer, train):
    trainer = make_trainer(model=tiny_model(), **arguments(max_steps=1))
    contexts = []
    rollout = trainer.unified.rollout

    def kept(conditioning, plan, noise):
        contexts.append((conditioning, trainer.unified.contexts(conditioning)))
        return rollout(conditioning, plan, noise)

    trainer.unified.rollout = kept
    seen = train(trainer)
    (conditioning, told), *_ = contexts
    texts = tokenizer().batch_decode(conditioning.completion_ids, skip_special_tokens=True)
    assert told == [text.rpartition("</think>")[2].strip() or "never empty" for text in texts]
    assert len(set(told)) > 1
    records = [record for batch in seen.batches for record in batch["flow_records"]]
    assert sorted(record.context for record in records) == sorted(told)


def test_resumes_to_the_bit(make_trainer, tmp_path):
    def run(folder, resume=None):
        settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
        trainer = make_trainer(
            output_dir=folder, model=tiny_model(), peft_config=LoraConfig(r=2), **arguments(**settings)
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-1"))  # between two passes
    assert not moved(weights(whole.model), weights(resumed.model))


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
        records = model.rollout(painted_from(PROMPTS), plan, generators())
        memory = Memory()
        with memory.hooks():
            for _, velocity in model.velocities(records):
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
    flow = FlowInputs(latents[:, None], times[:, None], PROMPTS[:2], size)
    gradients = []
    for velocity in (
        lambda: model.predict_velocities(flow)[:, 0],
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
