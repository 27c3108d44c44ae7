"""The benchmarks: what they count, and that the large one runs, small."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.benchmarks import load
from trl_unigrpo.estimate import floor_flops
from trl_unigrpo.estimate.counting import count_flops
from trl_unigrpo.monitoring.events import Watcher


def test_attention_is_counted_forward_and_backward():
    q, k, v = (torch.randn(2, 3, length, 8, requires_grad=True) for length in (5, 7, 7))
    with count_flops() as forward:
        out = F.scaled_dot_product_attention(q, k, v)
    with count_flops() as backward:
        out.sum().backward()
    product = 2 * 2 * 3 * 5 * 7 * 8  # one matrix product: 2 FLOPs, B = 2, A = 3, S = 5, S' = 7, D = 8
    assert forward.get_total_flops() == 2 * product
    assert backward.get_total_flops() == 5 * product
    with count_flops() as plain:
        torch.randn(4, 6) @ torch.randn(6, 10)
    assert plain.get_total_flops() == 2 * 4 * 6 * 10


def test_causal_attention_counts_visible_pairs():
    q = torch.randn(2, 3, 5, 8)
    with count_flops() as counter:
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert counter.get_total_flops() == 4 * 2 * 3 * 8 * (1 + 2 + 3 + 4 + 5)


def test_floor_of_one_token_models_by_hand():
    flops = load("flops")
    model, _ = flops.model_and_tokenizer()
    work = replace(flops.workload(model.config, prompt_length=1), completion_length=1)
    parts = floor_flops(work)
    token = 2 * 4 * (64 * 16 * 16 + 3 * 64 * 192)  # 4 layers: q, k, v, o of 64 x 64, and three matrices of 64 x 192
    word = 2 * 64 * 74
    assert parts["prefill"] == 2 * (token + 4 * 64 * 4 + word)
    assert parts["decode"] == 0


@pytest.fixture(scope="module")
def bagel_step(tmp_path_factory):
    """The script, what it wrote, and what it printed in a small run."""
    script, file = load("bagel_step"), tmp_path_factory.mktemp("bagel_step") / "results.json"
    file.write_text(json.dumps({"512-bf16": "measured before"}))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    script.main(["--tiny", "--results", str(file)])
    torch.set_num_threads(threads)
    return script, json.loads(file.read_text())


@pytest.mark.slow
def test_every_phase_is_timed_and_its_flops_are_the_closed_form(bagel_step):
    script, written = bagel_step
    assert written["512-bf16"] == "measured before"
    result = written["tiny"]
    work = script.at_mean_length(script.workload(script.tiny_config(), script.TINY, half=False))
    assert list(result["phases"]) == list(script.PHASES)
    assert all(phase["seconds"] > 0 for phase in result["phases"].values())
    assert result["floor_flops"] == sum(floor_flops(work).values())
    everything = result["floor_flops"] + sum(result["overhead_flops"].values())
    assert result["counted_flops"] == pytest.approx(everything, rel=0.02)
    exact = ("VAE decode", "reference pass")  # without adapters
    for name in exact:
        assert result["phases"][name]["counted_flops"] == result["phases"][name]["model_flops"]
    for name in ("thinking", "denoising", "update"):
        counted, model = (result["phases"][name][key] for key in ("counted_flops", "model_flops"))
        assert model < counted < 1.1 * model
    assert result["phases"]["optimizer"]["model_flops"] == 0
    for key in ("date", "hardware", "command", "versions", "matmul_flops_per_second"):
        assert result[key]


@pytest.mark.slow
def test_plain_baseline_costs_what_its_closed_form_says(bagel_step):
    script, written = bagel_step
    ours, plain = written["tiny"], written["tiny"]["plain"]
    for name in ("VAE decode", "reference pass"):
        assert plain["counted_flops_scaled"][name] == plain["model_flops"][name]
    for name in ("thinking", "denoising", "update"):
        assert plain["counted_flops_scaled"][name] == pytest.approx(1.05 * plain["model_flops"][name], rel=0.05)
    counted = sum(plain["counted_flops_scaled"].values()) / ours["counted_flops"]
    assert counted > 1.05 and counted == pytest.approx(plain["ratio_model_flops"], rel=0.05)
    # Reference forwards in both passes, each with its own context, against one packed forward.
    work = script.workload(script.tiny_config(), script.TINY, half=False)
    again = plain["model_flops"]["reference pass"] / ours["phases"]["reference pass"]["model_flops"]
    assert again > work.num_iterations
    assert plain["ratio_seconds"] > 1


@pytest.mark.slow
def test_released_pieces_are_cheaper_than_plain(bagel_step):
    script, _ = bagel_step
    for name, piece in script.PIECES.items():
        work = script.workload(script.released_config(), piece, half=True)
        ratio = sum(script.plain_flops(work).values()) / sum(floor_flops(work).values())
        assert 1.05 < ratio < 1.6, name
        assert script.estimate_memory(work).peak < 139 * 2**30 * 0.92, name


@pytest.mark.slow
def test_log_ratios_grow_with_the_difference(bagel_step, tmp_path):
    script, written = bagel_step
    share = written["tiny"]["log_ratio_share"]
    assert share["numbers"] == 64 * 16 and 0 <= share["rms"] <= share["max"] < 0.01
    work = script.workload(script.tiny_config(), script.TINY, half=False)
    trainer = script.random_trainer(work, torch.device("cpu"), str(tmp_path))
    found = []

    class Compared(Watcher):
        def on_image_loss(self, args, state, control, image_loss, **kwargs):
            if image_loss.first_pass:
                states, objective = image_loss.states, image_loss.objective
                noise = torch.randn(states.x.shape, generator=torch.Generator().manual_seed(0))
                differing = (states.velocity + s * noise for s in (1e-3, 2e-3))
                found.append([load("phases").log_ratio_shares(velocity, states, objective) for velocity in differing])

    trainer.add_callback(Compared())
    trainer.train()
    assert len(found) == script.TINY.num_generations // script.TINY.micro_batch_size
    for near, far in found:
        assert near.shape == (script.TINY.micro_batch_size * 3,) and near.abs().min() > 0
        torch.testing.assert_close(far, 2 * near, rtol=0.05, atol=0.0)


def test_phases_interrupt_each_other():
    script = load("phases")
    flops = iter([0, 10, 11, 15, 15])
    phases = script.Phases(torch.device("cpu"), lambda: next(flops))
    with phases("outer"), phases("inner"):
        pass
    assert dict(phases.counted) == {"outer": 10 + 4, "inner": 1}


def test_real_sizes_need_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        load("bagel_step").main(["--only", "512-bf16"])
    assert "--tiny runs the same code" in capsys.readouterr().err
