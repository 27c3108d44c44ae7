"""Layers whose parts torch.compile has traced compute what they compute without it."""

import pytest
import torch
import torch._dynamo
from peft import LoraConfig

from tests.helpers.painting import steps_at
from tests.helpers.tiny_unified import IMAGE_SIZE, tiny_bagel
from trl_unigrpo.models.bagel.layers import compiled_parts
from trl_unigrpo.models.contract import ContextRow


@pytest.fixture(autouse=True)
def forgotten():
    """Let go of what was traced."""
    yield
    torch._dynamo.reset()


BACKEND = "aot_eager"  # all of the tracing, forward and backward, and none of the C++ compiler's time


def outputs(model, gradients):
    """Velocities, hidden states, tokens, and gradients of all parameters."""
    generator = torch.Generator().manual_seed(0)
    rows = [ContextRow(torch.randint(5, 25, (length,), generator=generator)) for length in (6, 9)]
    x, t = torch.randn(2, 2, 4, 4, generator=generator), torch.tensor([[0.3, 0.8], [0.5, 0.9]])
    steps = steps_at(rows, x, t, (IMAGE_SIZE, IMAGE_SIZE))
    ids = torch.nn.utils.rnn.pad_sequence([row.ids for row in rows], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row.ids) for row in rows], batch_first=True)
    out = model.packed_forward(ids, mask, steps, context_grad=True)
    loss = out.velocity.square().mean() + (out.last_hidden_state * mask[..., None]).square().mean()
    found = {"velocity": out.velocity, "hidden": out.last_hidden_state * mask[..., None]}
    with torch.no_grad():
        context = model.encode_context(rows[:1])
        found["alone"] = model.predict_velocity(context, x[:1, 0], t[:1, 0], (IMAGE_SIZE, IMAGE_SIZE))
    found |= gradients(model, loss)
    with torch.no_grad():
        prompt = rows[0].ids[None]
        found["tokens"] = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5)
    return found


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_compiled_layers_are_the_same_layers(gradients, checkpointing):
    model = tiny_bagel().train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected = outputs(model, gradients)
    model.compile_layers(BACKEND)
    calls = compiled_parts.cache_info()
    found = outputs(model, gradients)
    assert compiled_parts.cache_info().hits + compiled_parts.cache_info().misses > calls.hits + calls.misses
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_a_trainer_compiles_the_layers_that_it_trains(make_trainer, train):
    updates = []
    for compiled in (False, True):
        trainer = make_trainer(peft_config=LoraConfig(r=2), max_steps=2, bf16=True, compile_layers=compiled)
        layers = trainer.unified.language_model.model.layers
        assert [layer.compiled for layer in layers] == ["inductor" if compiled else None] * len(layers)
        if compiled:
            trainer.unified.compile_layers(BACKEND)
        torch._dynamo.utils.counters.clear()
        updates.append(train(trainer).gradients)
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == compiled
        assert not torch._dynamo.utils.counters["graph_break"]
    for eager, traced in zip(*updates, strict=True):
        for name, gradient in eager.items():
            torch.testing.assert_close(traced[name], gradient, rtol=2e-2, atol=1e-4)
