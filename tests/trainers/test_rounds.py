"""Several rounds through the real trainer: what TRL sees, what is paid, and that it is the objective's gradient."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.helpers.examples import run_example
from tests.helpers.judge_server import ChatServer, images_of, yes
from tests.helpers.many_images import assert_equations
from tests.helpers.rounds import PLACEHOLDER, STOP, WORD, FixedRounds, in_order_of_rows, rounds_bagel, rounds_trainer
from tests.helpers.runs import assert_equal_runs, run
from tests.helpers.tiny_unified import (
    PROMPTS,
    OneByOne,
    build_trainer,
    prompts_dataset,
    redness,
    spy_paint,
    tiny_bagel,
    tiny_config,
    tiny_tokenizer,
)
from tests.helpers.toy_painter import toy_painter
from trl_unigrpo.models.bagel import BagelForUnifiedGeneration
from trl_unigrpo.trainers.unigrpo_trainer import UniGRPOTrainer


SGD = {"max_grad_norm": 0.0, "learning_rate": 0.5, "image_learning_rate": 0.05, "optim": "sgd"}
OF_ROUNDS = {"num_inference_steps": [6, 4], "sde_window_size": [3, 1], "sde_window_range": [[0, 5], [0, 3]]}
OF_ROUNDS["noise_level"] = [0.8, 0.4]
UPDATES = {"gradient_accumulation_steps": 1, "steps_per_generation": 2, "max_steps": 4}


@pytest.fixture
def trained(tmp_path, train):
    """Function that trains, and returns the trainer and what the optimizer saw."""

    def run_rounds(**settings):
        trainer = rounds_trainer(tmp_path / str(len(list(tmp_path.iterdir()))), **{**SGD, **settings})
        return trainer, train(trainer)

    return run_rounds


# What TRL sees


@pytest.mark.parametrize("context", ["markov", "full"])
def test_a_row_is_texts_and_observations_and_its_mask_says_which(trained, context):
    trainer, seen = trained(round_context=context, num_rounds=3, round_baseline=0.5, max_steps=1)
    rows = in_order_of_rows(seen.batches)
    assert [len(t.rounds) for t, _ in rows] == [3, 3, 3, 2] * 2
    assert [t.rounds[1].stopped for t, _ in rows] == [False, False, False, True] * 2
    cut = 0
    for t, columns in rows:
        ids, sampled, paid = (columns[name].tolist() for name in ("completion_ids", "tool_mask", "text_advantages"))
        length, at = int(columns["completion_mask"].sum()), 0
        assert length == len(t.row_ids)
        for number, part in enumerate(t.rounds):
            look = part.observation_ids
            if number:
                closed = context == "full" and t.rounds[number - 1].text_ids[-1] != 2
                cut += closed
                words = trainer._tokenizer.encode(f"the {t.prompt[-1]['content']}")
                assert look == [*[2] * closed, PLACEHOLDER, 1, *words, 2, 1]
                assert part.fresh == (context == "markov")
            for own, mask, advantages in ((look, 0, None), (part.text_ids, 1, columns["round_advantages"][number])):
                here = slice(at, at + len(own))
                assert ids[here] == own
                assert sampled[here] == [mask] * len(own)
                if advantages is not None:
                    assert paid[here] == [advantages.item()] * len(own)
                at += len(own)
        assert at == length
    assert (cut > 0) == (context == "full")
    # Nothing has two noises or two windows, and every round its own.
    images = [image for t, _ in rows for _, image in t.painted()]
    assert len({image.seed for image in images}) == len({image.steps.x.numpy().tobytes() for image in images}) == 20
    for number in range(3):
        windows = {tuple(image.steps.t.tolist()) for t, _ in rows for n, image in t.painted() if n == number}
        assert len(windows) == 1


def test_credit_of_a_generation_is_that_of_its_images(trained):
    _, seen = trained(round_baseline=0.5, round_cost=0.1, max_steps=1, scale_rewards="none")
    rows = in_order_of_rows(seen.batches)
    rewards = [[part.reward for part in t.rounds] for t, _ in rows]
    for group in (slice(0, 4), slice(4, 8)):
        first, last = zip(*rewards[group], strict=True)
        assert first[3] == last[3]  # kept
        led_to = torch.tensor([[r - 0.1, r] for r in last[:3]] + [[last[3], last[3] + 0.1]])
        worth = led_to - 0.5 * torch.tensor([[0.0, r] for r in first])
        found = torch.stack([columns["round_advantages"] for _, columns in rows[group]])
        torch.testing.assert_close(found, worth - worth.mean(0))
        assert found.abs().min() > 1e-6


def test_keeping_a_perfect_image_is_paid_a_bonus_and_no_other(trained):
    """Group 1's last image is perfect and kept, group 2's is kept and is not."""

    def score(prompts, completions, images, round_index, **columns):
        return [1.0 if i == 3 else 0.1 * (i % 4) for i in range(4)] + [0.2] * 4 if len(images) == 8 else [0.5] * 6

    plain = {"reward_funcs": score, "max_steps": 1, "scale_rewards": "none"}
    plain |= {"round_baseline": 0.0, "round_reward": "own"}
    found = [in_order_of_rows(trained(**plain, stop_bonus=bonus)[1].batches) for bonus in (0.0, 2.0)]
    paid, rich = (torch.stack([columns["round_advantages"] for _, columns in rows]) for rows in found)
    bonus = torch.tensor([[0.0, -0.5]] * 3 + [[0.0, 1.5]] + [[0.0, 0.0]] * 4)  # of round 2, within its group
    torch.testing.assert_close(rich - paid, bonus)


def test_nothing_is_kept_while_stopping_warms_up(trained):
    _, seen = trained(max_steps=3, num_iterations=1, stop_warmup_steps=2, reflection_template="the {prompt}{or_stop}")
    stops, offers = [], []
    for batches in (seen.batches[:2], seen.batches[2:4], seen.batches[4:]):
        rows = in_order_of_rows(batches)
        stops.append([t.rounds[1].stopped for t, _ in rows])
        others = [t for t, _ in rows if "tree" not in t.prompt[-1]["content"]]
        offers.append({WORD["tree"] in t.rounds[1].observation_ids for t in others})
    assert stops == [[False] * 8, [False] * 8, [False, False, False, True] * 2]
    assert offers == [{False}, {False}, {True}]


# What is trained


@pytest.mark.parametrize(
    "settings",
    [
        {"round_context": "markov"},
        {"round_context": "full", "num_rounds": 3},
        {"round_context": "full", "flow_context_grad": "full"},
        pytest.param({"round_context": "markov", **UPDATES}, marks=pytest.mark.slow),
        {"round_context": "full", **UPDATES},
        {"train_rounds": [2]},
        {**OF_ROUNDS, **UPDATES},
        {"round_group": "tree", "image_objective": "fpo", "matching_samples": 3, "image_learning_rate": 0.02},
    ],
    ids=[
        "markov",
        "full-three",
        "context-grad",
        "markov-updates",
        "full-updates",
        "second-alone",
        "of-rounds",
        "tree-lines",
    ],
)
def test_losses_and_gradients_are_those_of_the_equations(trained, settings):
    trainer, seen = trained(**settings)
    assert_equations(rounds_bagel, trainer, seen, settings)
    logs = trainer.state.log_history
    assert logs[0]["flow/ratio_mean"] == 1
    assert logs[len(seen.weights) - 1]["flow/log_ratio_std"] > 1e-6


def test_first_pass_has_the_ratio_of_the_policy_itself(trained):
    """Old log-probs, where TRL computes them before, are those of the loss, of every round."""
    trainer, seen = trained(**{**UPDATES, "max_steps": 1}, beta=0.1)
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-10)
    assert trainer.state.log_history[0]["clip_ratio/region_mean"] == 0
    assert seen.batches[0]["old_per_token_logps"].shape == seen.batches[0]["completion_ids"].shape


@pytest.mark.parametrize("context", ["markov", "full"])
def test_texts_are_sampled_from_what_is_trained(trained, context):
    """Greedy texts are the likeliest of a forward over what the round sees: images, positions and words."""
    settings = {"temperature": 0.001, "round_context": context, "num_rounds": 3, "allow_stop": False}
    trainer, seen = trained(trainer_class=UniGRPOTrainer, max_steps=1, **settings)
    model, found = rounds_bagel(), []
    for t, _ in in_order_of_rows(seen.batches):
        for number, part in enumerate(t.rounds):
            view = replace(t, rounds=t.rounds[: number + 1]).now()
            hidden = model.backbone(torch.tensor([[*view.prompt_ids, *part.text_ids]]), images=[view.images])
            logits = model.get_output_embeddings()(hidden.last_hidden_state)[0, len(view.prompt_ids) - 1 : -1]
            logits[:, trainer.generation_config.suppress_tokens] = -torch.inf
            found += (logits.argmax(-1) == torch.tensor(part.text_ids)).tolist()
    assert len(found) > 80
    assert all(found)


def test_model_that_does_not_pack_trains_as_its_twin_that_does(trained):
    alone = rounds_bagel()
    alone.__class__ = OneByOne
    (_, one), (_, packed) = trained(model=alone, round_context="full"), trained(round_context="full")
    for step in range(2):
        for name, gradient in packed.gradients[step].items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(
                one.gradients[step][name], gradient, rtol=1e-3, atol=2e-5 * scale + 1e-10, msg=name
            )


def test_rounds_that_are_not_trained_have_neither_steps_nor_tokens(trained):
    _, seen = trained(train_rounds=[2], max_steps=1)
    for t, columns in in_order_of_rows(seen.batches):
        assert [len(image.steps) for _, image in t.painted()] == [0, 3][: len(list(t.painted()))]
        trained_tokens = int((columns["tool_mask"] * columns["completion_mask"]).sum())
        assert trained_tokens == len(t.rounds[1].text_ids)


class AllKeep(FixedRounds):
    def _sampled_texts(self, trajectories):
        return [STOP for _ in trajectories]


def test_rounds_have_steps_windows_and_noise_of_their_own(trained, monkeypatch):
    calls = spy_paint(monkeypatch)
    trained(**OF_ROUNDS, num_rounds=3, max_steps=1)
    assert [len(plan.timesteps) - 1 for _, plan, _ in calls] == [6, 4, 4]
    assert [plan.noise_level for _, plan, _ in calls] == [0.8, 0.4, 0.4]
    assert [len(image.steps) for _, _, images in calls for image in images] == [3] * 8 + [1] * 6 + [1] * 6
    for _, plan, images in calls:
        for image in images:
            assert set(image.steps.t.tolist()) <= set(plan.timesteps.float().tolist())


@pytest.mark.parametrize("train_rounds", [None, [2]])
def test_where_all_keep_their_image_there_is_one_image(trained, train_rounds):
    trainer, seen = trained(trainer_class=AllKeep, num_rounds=3, train_rounds=train_rounds, max_steps=1)
    for t, _ in in_order_of_rows(seen.batches):
        assert len(t.rounds) == 2
        assert len(list(t.painted())) == 1
    log = trainer.state.log_history[0]
    assert (log["rounds/images"], log["rounds/kept_2"]) == (1, 1)
    assert "rounds/better_2" not in log


def test_shown_images_are_encoded_in_the_rollout_alone(trained, monkeypatch):
    calls = []
    encode = BagelForUnifiedGeneration.encode_images
    monkeypatch.setattr(
        BagelForUnifiedGeneration,
        "encode_images",
        lambda self, pixels: calls.append(len(pixels)) or encode(self, pixels),
    )
    trained(max_steps=2)  # two passes over one generation
    assert calls == [8]
    trained(max_steps=2, context_latents="direct")
    assert calls == [8]


# Rewards


class Scorer:
    """A reward that notes its calls; `fails` are (round, row) without a score."""

    __name__ = "scorer"

    def __init__(self, fails=(), every_round=False):
        self.calls, self.fails, self.every_round = [], fails, every_round

    def __call__(self, prompts, completions, images, previous_images, source_images, round_index, **columns):
        self.calls.append((round_index, [len(before) for before in previous_images], completions, list(images)))
        scores = redness(prompts, completions, images)
        return [
            None if (number, i) in self.fails else s
            for i, (number, s) in enumerate(zip(round_index, scores, strict=True))
        ]


def test_each_image_is_scored_once_with_what_came_before(trained):
    scorer = Scorer()
    _, seen = trained(reward_funcs=scorer, max_steps=1, num_rounds=3)
    rounds, before, completions, images = zip(*scorer.calls, strict=True)
    assert rounds == ([0] * 8, [1] * 6, [2] * 6)  # those that keep theirs are not asked again
    assert before == ([0] * 8, [1] * 6, [2] * 6)
    assert len({id(image) for call in images for image in call}) == 20
    assert all("tree" not in text or "cat" not in text for text in completions[1])
    rows = in_order_of_rows(seen.batches)
    assert all(t.rounds[0].reward == t.rounds[1].reward for t, _ in rows if t.rounds[1].stopped)


@pytest.mark.parametrize("every_round", [False, True])
def test_where_the_last_image_alone_is_paid_it_alone_is_scored(trained, every_round):
    scorer, other = Scorer(), Scorer(every_round=every_round)
    _, seen = trained(reward_funcs=[scorer, other], max_steps=1, round_baseline=0.0)
    assert [len(call[0]) for call in scorer.calls] == [8]
    assert scorer.calls[0][0] == [1] * 8
    assert len(other.calls) == 1 + every_round
    rows = in_order_of_rows(seen.batches)
    paid = torch.stack([columns["round_advantages"] for _, columns in rows])
    torch.testing.assert_close(paid[:, 0], torch.stack([columns["advantages"] for _, columns in rows]))


def test_failure_in_one_round_masks_that_round_alone(trained):
    def advantages(fails):
        _, seen = trained(reward_funcs=Scorer(fails), max_steps=1, round_reward="own", round_baseline=0.0)
        return torch.stack([columns["round_advantages"] for _, columns in in_order_of_rows(seen.batches)])

    paid, masked = advantages(()), advantages([(0, 1)])
    assert masked[1, 0] == 0
    assert paid[1, 0] != 0
    torch.testing.assert_close(masked[:, 1], paid[:, 1])
    torch.testing.assert_close(masked[4:], paid[4:])


# Trees


@pytest.mark.parametrize("select", ["worst", "spread"])
def test_a_group_goes_on_from_one_image(trained, select):
    _, seen = trained(round_group="tree", round_select=select, max_steps=1, scale_rewards="none", num_rounds=3)
    rows = in_order_of_rows(seen.batches)
    for group in (rows[:4], rows[4:]):
        for number in (1, 2):
            shown = [t.rounds[number].shown[0] for t, _ in group]
            assert len({id(image) for image in shown}) == 1
        first = torch.tensor([t.rounds[0].reward for t, _ in group])
        gap = (first - first.mean()).abs()
        chosen = int(first.argmin() if select == "worst" else gap.argmax())
        own = [i for i, (t, _) in enumerate(group) if t.rounds[1].stopped]
        assert own == [3]
        assert group[3][0].rounds[1].reward == pytest.approx(first[chosen].item())  # what it keeps is the group's
        for number in (0, 1, 2):
            rewards = torch.tensor([t.rounds[number].reward for t, _ in group])
            paid = torch.stack([columns["round_advantages"][number] for _, columns in group])
            torch.testing.assert_close(paid, rewards - rewards.mean())


# Runs


@pytest.mark.parametrize("settings", [{}, {"round_context": "full"}, {"round_group": "tree"}], ids=str)
def test_run_that_stops_between_passes_ends_where_it_would_have(tmp_path, settings):
    def begin(folder, resume=None):
        brief = {"max_steps": 4, "save_steps": 3, **settings}
        return run(
            lambda output_dir, **more: rounds_trainer(output_dir, UniGRPOTrainer, **more), folder, resume, **brief
        )

    whole = begin(tmp_path / "whole")
    resumed = begin(tmp_path / "resumed", tmp_path / "whole" / "checkpoint-3")
    assert_equal_runs(whole, resumed, 3)
    assert whole._baseline == resumed._baseline


def test_one_round_is_the_plain_trainer(tmp_path):
    settings = {"max_steps": 2, "save_steps": 5, "model": tiny_bagel()}
    several = {"round_context": "full", "round_reward": "sum", "round_cost": 1.0, "train_rounds": [1]}
    plain, one = (
        run(build_trainer, tmp_path / name, **{**settings, **more})
        for name, more in (("plain", {}), ("one", {**several, "model": tiny_bagel()}))
    )
    assert_equal_runs(plain, one, 0)


def test_evaluation_has_rounds_of_its_own_without_trees_and_scores_each(tmp_path, monkeypatch):
    scored = []

    def reward(images, **columns):
        scored.append(redness(None, None, images))
        return scored[-1]

    settings = {"num_rounds": 1, "eval_num_rounds": 3, "round_group": "tree", "round_baseline": 0.0}
    settings |= {"num_generations_eval": 4, "per_device_eval_batch_size": 4}
    trainer = rounds_trainer(
        tmp_path, reward_funcs=reward, eval_dataset=prompts_dataset(PROMPTS[:2], copies=1), **settings
    )
    calls = spy_paint(monkeypatch)
    found = trainer.evaluate()
    assert [len(trajectories) for trajectories, _, _ in calls] == list(map(len, scored)) == [4, 3, 3] * 2
    assert {"eval_rounds/kept_2", "eval_rounds/better_3", "eval_rounds/worse_3"} <= found.keys()
    rows = []
    for first, second, third in (scored[:3], scored[3:]):  # the last of each group keeps its first image
        rows += zip(first, [*second, first[3]], [*third, first[3]], strict=True)
    means = [found[f"eval_rounds/reward_{number}"] for number in (1, 2, 3)]
    assert means == pytest.approx(np.mean(rows, 0).tolist(), rel=1e-5)
    assert found["eval_rounds/best"] == pytest.approx(np.max(rows, 1).mean(), rel=1e-5)
    calls.clear()
    trainer.train()
    assert all(len(trajectories) == 8 for trajectories, _, _ in calls)


def test_completions_name_the_images_between_the_texts(trained):
    trainer, _ = trained(max_steps=1)
    assert all(" [image 1] " in row["thinking"] for row in trainer._book.rows)


def test_the_example_refines_by_a_judge(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    rounds_bagel().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    prompts_dataset().to_csv(tmp_path / "prompts.csv")
    small = {"image_size": 8, "num_inference_steps": 6, "num_generations": 4, "max_completion_length": 4}
    small |= {"max_reflection_length": 4, "max_steps": 1, "gallery_steps": 0}
    small |= {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    with ChatServer(lambda body, attempt: yes(0.1 + 0.8 * np.asarray(images_of(body)[0]).mean() / 255)) as server:
        names = {
            '"ByteDance-Seed/BAGEL-7B-MoT"': repr(str(tmp_path / "model")),
            '"http://localhost:8000/v1"': repr(server.url),
            '"prompts.csv"': repr(str(tmp_path / "prompts.csv")),
            '"bagel-refine"': f"{str(tmp_path / 'out')!r}, **{small!r}",
        }
        log = run_example("self_refinement.py", **names)["trainer"].state.log_history[0]
    assert log["rounds/images"] == 2
    assert log["rounds/kept_2"] == 0
    assert 0 < log["rounds/reward_1"] < 1


# Refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_rounds": 0}, "num_rounds"),
        ({"round_context": "all"}, "round_context"),
        ({"train_rounds": [3]}, "train_rounds"),
        ({"train_rounds": []}, "train_rounds"),
        ({"keep_perfect": 1.5}, "keep_perfect"),
        ({"reflection_template": "{image}"}, "reflection_template"),
        ({"stop_text": " "}, "stop_text"),
        ({"thinking": False, "text_weight": 0.0}, "thinking=False"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level"),
        ({"mask_truncated_completions": True}, "mask_truncated_completions"),
        ({"round_group": "tree", "round_context": "full"}, "round_group='tree'"),
        ({"round_group": "tree", "round_reward": "sum"}, "round_reward='sum'"),
        ({"stop_bonus": -1.0}, "stop_bonus"),
        ({"noise_level": [0.8, 0.7, 0.6]}, r"noise_level=\[0.8, 0.7, 0.6\] with num_rounds=2: .*at most 2"),
        ({"num_rounds": 1, "noise_level": [0.8, 0.7]}, "noise_level=.* with num_rounds=1"),
        ({"noise_level": []}, r"noise_level=\[\] with num_rounds=2"),
        ({"noise_level": [0.8, -1.0]}, "noise_level=-1.0: expected 0 or more"),
        ({"num_inference_steps": [6, 5]}, r"sde_window_range=\[0, 5\] with num_inference_steps=5"),
        ({"sde_window_range": [[0, 5], [0, 2]]}, r"sde_window_size=3 does not fit into sde_window_range=\[0, 2\]"),
        ({"sde_window_range": [[0, 5], [3]]}, r"sde_window_range=\[3\]: expected two"),
        ({"num_inference_steps": [6, "many"]}, "num_inference_steps='many': expected an integer"),
        ({"stop_warmup_steps": -1}, "stop_warmup_steps"),
        ({"stop_bonus": 1.0, "allow_stop": False}, "stop_bonus=1.0 with allow_stop=False"),
        ({"stop_warmup_steps": 5, "allow_stop": False}, "stop_warmup_steps=5 with allow_stop=False"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_rounds_do_not_do_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **{"num_rounds": 2, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"max_reflection_length": 1023},
            "max_reflection_length=1023 leaves no room for a prompt: the model has 1024",
        ),
        ({"max_reflection_length": 600, "num_rounds": 3, "round_context": "full"}, "600 of 3 rounds in one context"),
        ({"max_reflection_length": 600, "eval_num_rounds": 3, "round_context": "full"}, "600 of 3 rounds"),
    ],
)
def test_rounds_that_the_model_has_no_positions_for_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        rounds_trainer(tmp_path, **settings)


def test_clamp_with_stop_warns(tmp_path):
    with pytest.warns(UserWarning, match="no_improve='clamp'"):
        tiny_config(tmp_path, num_rounds=2, no_improve="clamp")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tiny_config(tmp_path, num_rounds=2, no_improve="clamp", allow_stop=False)


def test_column_that_the_rounds_fill_in_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Rename the column"):
        rounds_trainer(tmp_path, train_dataset=prompts_dataset(round_index=[0, 1, 2, 3]))


def test_model_that_is_shown_no_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match="paints from text only"):
        rounds_trainer(tmp_path, model=toy_painter(29))
    with pytest.raises(ValueError, match="image_token_id"):
        rounds_trainer(tmp_path, model=tiny_bagel())
