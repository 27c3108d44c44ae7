"""The benchmarks: what they count, and that the large one runs, small."""

import json
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.benchmarks import load
from trl_unigrpo.estimate import floor_flops, overhead_flops
from trl_unigrpo.estimate.counting import count_flops
from trl_unigrpo.estimate.flops import text_forward
from trl_unigrpo.monitoring.events import Watcher
from trl_unigrpo.shapeworld import load_base


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
    work = replace(flops.workload(model.config, 1), completion_length=1)
    parts = floor_flops(work)
    token = 2 * 4 * (64 * 16 * 16 + 3 * 64 * 192)  # 4 layers: q, k, v, o of 64 x 64, and three matrices of 64 x 192
    word = 2 * 64 * 74
    assert parts["prefill"] == 2 * (token + 4 * 64 * 4 + word)
    assert parts["decode"] == 0


@pytest.mark.parametrize(("context", "tolerance"), [("markov", 0.02), ("full", 0.04)])
def test_two_rounds_cost_the_closed_form(context, tolerance):
    """
    The looks, too: beside the floor there is what `overhead_flops` names, and little else. In one row small copies of
    both images are computed together, as if they saw as much as the second.
    """
    script = load("flops")
    work, counted = script.counted(*load_base(seeing=True), 2, context)
    floor = sum(floor_flops(work).values())
    assert work.shown == (11, 11)
    assert work.seen(1) == (30 if context == "full" else 0) + 22 + 6 + 20
    assert counted == pytest.approx(floor + sum(overhead_flops(work).values()), rel=tolerance)
    assert counted < 1.1 * floor or context == "full"


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
    lengths = result["thinking_lengths"]
    assert lengths == {"min": 4, "mean": 6, "max": 8}
    # Contexts of the mean length, padded to the longest; a thinking that has ended is decoded on beside the others.
    padded = (lengths["max"] - 1) / (lengths["mean"] - 1)
    most = {"VAE decode": 1, "reference pass": 1.005, "thinking": 1.1 * padded, "denoising": 1.1, "update": 1.1}
    for name, bound in most.items():
        counted, model = (result["phases"][name][key] for key in ("counted_flops", "model_flops"))
        assert model <= counted <= bound * model, name
    assert result["phases"]["optimizer"]["model_flops"] == 0
    for key in ("date", "hardware", "command", "versions", "matmul_flops_per_second"):
        assert result[key]
    seconds = {name: phase["seconds"] for name, phase in result["phases"].items()}
    assert result["seconds"] == sum(seconds.values())
    assert result["floor_ratio"] == pytest.approx(
        result["seconds"] / (result["floor_flops"] / result["matmul_flops_per_second"])
    )
    assert result["thinking_tokens_per_second"] == pytest.approx((4 + 5 + 7 + 8) / seconds["thinking"])
    assert result["image_steps_per_second"] == pytest.approx(4 * 6 / seconds["denoising"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "keeps_contexts"), [("plain", False), ("plain_cached", True)])
def test_plain_baselines_cost_what_their_closed_form_says(bagel_step, name, keeps_contexts):
    script, written = bagel_step
    ours, plain = written["tiny"], written["tiny"][name]
    work = script.at_mean_length(script.workload(script.tiny_config(), script.TINY, half=False))
    assert plain["model_flops"] == script.plain_flops(work, keeps_contexts)
    counted, model = plain["counted_flops_scaled"], plain["model_flops"]
    for phase in ("VAE decode", "reference pass"):
        assert counted[phase] == pytest.approx(model[phase], rel=1e-4)  # text attends a little more than at its mean
    for phase in ("thinking", "denoising", "update"):
        assert counted[phase] == pytest.approx(1.05 * model[phase], rel=0.05)  # adapters
    ratio = sum(counted.values()) / ours["counted_flops"]
    assert ratio > 1.03 and ratio == pytest.approx(plain["ratio_model_flops"], rel=0.05)
    # Reference forwards in both passes, against one packed forward.
    assert model["reference pass"] > work.num_iterations * 0.9 * ours["phases"]["reference pass"]["model_flops"]
    assert plain["ratio_seconds"] == pytest.approx(sum(plain["seconds_scaled"].values()) / ours["seconds"])
    assert plain["ratio_seconds"] > 1


@pytest.mark.slow
def test_a_kept_context_is_encoded_once_a_pass(bagel_step):
    """By hand: 4 images of 3 stochastic steps, 2 passes, contexts of 12 + 6 tokens."""
    script, written = bagel_step
    again, kept = (written["tiny"][name]["counted_flops_scaled"] for name in ("plain", "plain_cached"))
    work = script.at_mean_length(script.workload(script.tiny_config(), script.TINY, half=False))
    context = text_forward(work, 18)
    saved = again["reference pass"] - kept["reference pass"]
    assert saved == pytest.approx((2 * 4 * 3 - 4) * context.total, rel=0.01)
    saved = again["update"] - kept["update"]
    assert saved == pytest.approx((2 * 4 * 3 - 4) * (context.total + context.adapters), rel=0.01)


@pytest.mark.slow
def test_released_pieces_are_cheaper_than_plain(bagel_step):
    script, _ = bagel_step
    for name, piece in script.PIECES.items():
        work = script.workload(script.released_config(), piece, half=True)
        floor, again, kept = (
            sum(parts.values())
            for parts in (floor_flops(work), script.plain_flops(work), script.plain_flops(work, keeps_contexts=True))
        )
        assert floor < kept < again < 1.6 * floor and again > 1.05 * floor, name
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


def test_the_innermost_phase_that_failed_is_known():
    phases = load("phases").Phases(torch.device("cpu"))

    def step():
        with phases("outer"):
            phases.enter("optimizer")  # as a callback does, which nothing leaves when the step fails
            raise KeyError

    with pytest.raises(KeyError):
        step()
    assert phases.failed == "optimizer"


def test_what_fails_is_written_and_the_rest_still_runs(tmp_path, monkeypatch, capfd):
    script, file = load("bagel_step"), tmp_path / "results.json"
    tiny = replace(script.TINY, num_generations=2, num_inference_steps=4)
    passes, found = script.plain_passes, []

    def out_of_memory(trainer, rows, phases, keeps_contexts):
        found.append(json.loads(file.read_text())["fits"])  # as a crash would leave it
        if keeps_contexts:
            return passes(trainer, rows, phases, keeps_contexts)
        with phases("update"):
            return torch.empty(2**60)

    monkeypatch.setattr(script, "plain_passes", out_of_memory)
    pieces = {"too large": replace(tiny, lora_rank=10**12), "fits": tiny}
    script.run_pieces(pieces, script.tiny_config(), torch.device("cpu"), file, count=False, plain_trajectories=1)
    written = json.loads(file.read_text())
    assert "memory" in written["too large"]["error"] and written["too large"]["phase"] == "loading"
    assert written["fits"]["plain"].keys() == {"error", "phase"} and written["fits"]["plain"]["phase"] == "update"
    assert written["fits"]["plain_cached"]["trajectories_measured"] == 1
    assert found[0]["seconds"] == written["fits"]["seconds"] and "plain" not in found[0]
    assert "plain_cached" not in found[1]
    lines = capfd.readouterr().out
    assert "too large failed in phase 'loading'" in lines
    assert re.search(r"fits: [\d.]+x the counted floor\n", lines)
    assert re.search(r"fits: [\d.]+x faster than the plain structure with its cache\n", lines)
    assert "fits: the plain structure failed in phase 'update'" in lines


def test_flops_at_the_mean_length_are_those_of_all_lengths():
    script = load("bagel_step")
    for piece in script.PIECES.values():
        work = script.workload(script.released_config(), piece, half=True)
        single = [replace(work, num_generations=1, completion_length=n) for n in script.ragged_lengths(work)]
        exact = sum(sum(floor_flops(one).values()) for one in single)
        exact -= (len(single) - 1) * floor_flops(work)["prefill"]  # of one prompt
        assert sum(floor_flops(script.at_mean_length(work)).values()) == pytest.approx(exact, rel=0.001)


@pytest.mark.parametrize(("entry", "code"), [({"error": "out of memory", "phase": "update"}, 1), ({}, 0)])
def test_a_piece_of_ours_that_failed_is_the_exit_code(monkeypatch, entry, code):
    script = load("bagel_step")
    monkeypatch.setattr(script, "run_pieces", lambda *_, **__: {"tiny": entry})
    assert script.main(["--tiny", "--device", "cpu"]) == code


def test_sizes_can_be_chosen(monkeypatch):
    script, given = load("bagel_step"), {}

    def run_pieces(pieces, *_, **options):
        given.update(pieces=pieces, **options)
        return {name: {"error": "", "phase": ""} for name in pieces}

    monkeypatch.setattr(script, "run_pieces", run_pieces)
    sizes = ["--num-generations", "6", "--completion-length", "16", "--plain-trajectories", "2"]
    script.main(["--tiny", "--device", "cpu", *sizes])
    piece = given["pieces"]["tiny"]
    assert (piece.num_generations, piece.completion_length, given["plain_trajectories"]) == (6, 16, 2)
    arguments = script.parse(["--num-generations", "6"])[1]
    assert script.resized(script.PIECES["512-bf16"], arguments).micro_batch_size == 2  # 4 would not divide the group


def test_lengths_of_few_trajectories_have_the_mean_of_all():
    script = load("bagel_step")
    lengths = script.ragged_lengths(script.workload(script.released_config(), script.PIECES["512-bf16"], half=True))
    assert (min(lengths), max(lengths), len(lengths)) == (256, 512, 24)
    for count in (1, 2, 4, 24):
        middle = script.middle_lengths(lengths, count)
        assert sum(middle) / count == pytest.approx(sum(lengths) / 24, rel=0.02)
    assert sorted(script.middle_lengths(lengths, 24)) == sorted(lengths)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tiny", "--num-generations", "1"], "--num-generations 1: expected at least 2"),
        (["--tiny", "--plain-trajectories", "0"], "--plain-trajectories 0: expected at least 1"),
        (["--device", "cuda", "--tiny"], "--device cuda: no GPU found"),
    ],
)
def test_impossible_options_are_named(capsys, arguments, message):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        load("bagel_step").main(arguments)
    assert message in capsys.readouterr().err


def test_real_sizes_need_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        load("bagel_step").main(["--only", "512-bf16"])
    assert "--tiny runs the same code" in capsys.readouterr().err
