"""The benchmark beside the peers' structures: each computes what the model does, and ratios are those of a round."""

import json
from dataclasses import replace

import pytest
import torch

from tests.helpers.benchmarks import load
from tests.helpers.painting import steps_at
from tests.helpers.tiny_unified import IMAGE_SIZE, tiny_bagel
from trl_unigrpo.models.contract import ContextRow


SIZE = (IMAGE_SIZE, IMAGE_SIZE)
CONTEXTS = [torch.tensor(row) for row in ([1, 8, 9, 2, 1, 11, 12, 2], [1, 10, 2, 1, 11, 12, 13, 14, 15, 2])]


@pytest.fixture(scope="module")
def packed():
    return load("packed_baseline")


@pytest.fixture
def model():
    return tiny_bagel()


def test_a_packed_trajectory_is_the_models_packed_forward(packed, model):
    """Text, velocities, and the gradient of both in every weight."""
    generator, ids = torch.Generator().manual_seed(0), CONTEXTS[1]
    states, times = torch.randn(3, *model.latent_shape(SIZE), generator=generator), torch.tensor([1.0, 0.7, 0.2])
    hidden, velocity = packed.packed_trajectory(model, ids, states, times, SIZE)
    steps = steps_at([ContextRow(ids)], states[None], times[None], SIZE)
    expected = model.packed_forward(ids[None], None, steps, context_grad=True)
    torch.testing.assert_close(velocity, expected.velocity, rtol=0, atol=2e-5)
    torch.testing.assert_close(hidden, expected.last_hidden_state[0], rtol=0, atol=2e-5)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    seen = [torch.randn(x.shape, generator=generator) for x in (hidden, velocity)]
    outputs = ((hidden, velocity), (expected.last_hidden_state[0], expected.velocity))
    losses = [sum((x * y).sum() for x, y in zip(pair, seen, strict=True)) for pair in outputs]
    found, wanted = (torch.autograd.grad(loss, weights, allow_unused=True) for loss in losses)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * float(other.abs().max()))


@torch.no_grad()
def test_images_denoised_together_have_the_models_velocities(packed, model):
    latents = torch.randn(2, *model.latent_shape(SIZE), generator=torch.Generator().manual_seed(0))
    context = model.encode_context([ContextRow(ids) for ids in CONTEXTS])  # of different lengths
    times = torch.tensor([0.9, 0.3])
    found = packed.denoise_together(model, context, SIZE)(latents, times)
    torch.testing.assert_close(found, model.predict_velocity(context, latents, times, SIZE), rtol=0, atol=2e-5)


@torch.no_grad()
def test_thinkings_leave_when_they_end_and_are_likely(packed, model):
    """Greedy, if the softmax is: the tokens are those of a whole forward."""
    model.get_output_embeddings().weight.mul_(1e4)
    rows = []
    model.language_model.model.register_forward_hook(lambda module, inputs, outputs: rows.append(len(inputs[0])))
    texts = packed.think_together(model, CONTEXTS[0].tolist(), [2, 5, 3])
    assert rows == [1, 3, 3, 2, 1, 1]  # the prompt, and then the tokens
    assert [(len(text), text[-1]) for text in texts] == [(2, 2), (5, 2), (3, 2)]
    whole = model(torch.tensor([[*CONTEXTS[0].tolist(), *texts[1]]])).logits[0].argmax(-1)
    assert texts[1][:-1] == whole[len(CONTEXTS[0]) - 1 :][:4].tolist()


def test_ratios_are_taken_round_by_round():
    script = load("peers")
    values = dict(zip(script.COLUMNS, (1, 2, 3, 5), strict=True))
    rounds = [{name: {"a": value * times, "b": 1.0} for name, value in values.items()} for times in (1, 2, 3)]
    found = script.ratios(rounds, lambda column: column["a"])
    assert found["cached"] == {"median": 2, "min": 2, "max": 2}
    whole = script.ratios(rounds, lambda column: sum(column.values()))["packed"]
    assert whole == {"median": pytest.approx(7 / 3), "min": 2, "max": 2.5}


def test_rows_of_the_page():
    script = load("peers")
    seconds = {
        name: dict.fromkeys(script.PHASES, value) for name, value in zip(script.COLUMNS, (1, 2, 3, 5), strict=True)
    }
    ratio = {name: {"median": 2.0, "min": 1.5, "max": 2.504} for name in script.COLUMNS[1:]}
    rows = script.page_rows({"median_seconds": seconds, "ratio": ratio})
    assert rows[0] == "| thinking | 1.0 | 2.0 | 3.0 | 5.0 |"
    assert len(rows) == 5
    assert rows[-1] == "| **whole, beside ours** | 1 |" + " 2.00 (1.50 to 2.50) |" * 3


@pytest.mark.slow
def test_all_columns_are_measured_and_agree(tmp_path):
    script, tiny, file = load("peers"), load("bagel_step").tiny_config(), tmp_path / "peers.json"
    sizes = {"image_size": 32, "prompt_length": 12, "completion_length": 8, "num_generations": 4}
    work = replace(script.workload(tiny), **sizes, num_inference_steps=6, micro_batch_size=2)
    threads = torch.get_num_threads()
    script.main(["--rounds", "2", "--results", str(file)], work)
    torch.set_num_threads(threads)
    result = json.loads(file.read_text())
    assert max(result["largest_differences"].values()) < 1e-5
    assert len(result["rounds"]) == 2
    for columns in result["rounds"]:
        assert list(columns) == list(script.COLUMNS)
        for column in columns.values():
            assert all(column[phase] > 0 for phase in (*script.SHOWN, "VAE decode", "optimizer"))
            assert column["old log-probs"] == 0  # one pass is its own old policy
        assert columns["plain"]["thinking"] == columns["cached"]["thinking"]
    assert result["ratio_model_flops"]["plain"] > result["ratio_model_flops"]["cached"] > 0


def test_rounds_that_cannot_be(capsys):
    with pytest.raises(SystemExit):
        load("peers").main(["--rounds", "0"])
    assert "--rounds 0: expected at least 1" in capsys.readouterr().err
