"""Stories: all turns of the user are known, one image a turn; and edits that are looked at again."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import IterableDataset

from tests.helpers.editing import PLACEHOLDER, edits, source, tiny_editor
from tests.helpers.examples import run_example
from tests.helpers.judge_server import ChatServer, images_of, text_of, yes
from tests.helpers.many_images import assert_equations, images
from tests.helpers.rounds import STOP, FixedRounds, in_order_of_rows
from tests.helpers.stories import TURNS, stories, story_trainer
from tests.helpers.tiny_unified import FixedTexts, redness, tiny_tokenizer
from trl_unigrpo.shapeworld import load_base, shapeworld_story_dataset, shapeworld_story_reward
from trl_unigrpo.trainers.unigrpo_config import UniGRPOConfig
from trl_unigrpo.trainers.unigrpo_trainer import UniGRPOTrainer


SGD = {"max_grad_norm": 0.0, "learning_rate": 0.5, "image_learning_rate": 0.05, "optim": "sgd"}
LOOK = {"reflection_template": "the {prompt}", "round_reward": "final", "num_rounds": 2, "train_dataset": edits()}
LOOK |= {"gradient_accumulation_steps": 2}
OPENED = "<|im_start|> {} <|im_end|> <|im_start|>"


@pytest.fixture
def trained(tmp_path, train):
    """Function that trains, and returns the trainer and what the optimizer saw."""

    def run_stories(**settings):
        trainer = story_trainer(tmp_path / str(len(list(tmp_path.iterdir()))), **{**SGD, **settings})
        return trainer, train(trainer)

    return run_stories


def words(trainer, ids):
    return trainer._tokenizer.decode(ids)


# What is shown and said


@pytest.mark.parametrize("context", ["markov", "full"])
@pytest.mark.parametrize("sources", [True, False], ids=["edit", "paint"])
def test_each_turn_is_said_to_the_image_before_and_painted(trained, context, sources):
    trainer, seen = trained(round_context=context, train_dataset=stories(sources=sources), max_steps=1)
    rows = in_order_of_rows(seen.batches)
    assert len(rows) == 12
    for t, _ in rows:
        turns = TURNS[t.prompt[-1]["content"]]
        assert len(t.rounds) == len(images(t)) == len(turns)
        assert {image.size for image in images(t)} == {t.size or (8, 8)}
        assert len(t.images) == t.prompt_ids.count(PLACEHOLDER) == sources
        for turn, part in zip(turns[1:], t.rounds[1:], strict=True):
            look = part.observation_ids
            assert words(trainer, look[look.index(PLACEHOLDER) + 1 :]) == OPENED.format(turn)
            assert not part.stopped
        own = [part.shown[0] for part in t.rounds[1:]]
        shown = [*t.images, *own]
        passages = [passage.images for passage in t.passages()]
        assert passages == ([t.images, *([image] for image in own)] if context == "markov" else [shown])
    assert any(part.text_ids == STOP for t, _ in rows for part in t.rounds)  # which keeps nothing here


@pytest.mark.parametrize("context", ["markov", "full"])
def test_edit_is_looked_at_again(trained, context):
    trainer, seen = trained(**LOOK, round_context=context, max_steps=1)
    rows = in_order_of_rows(seen.batches)
    assert [t.rounds[1].stopped for t, _ in rows] == [False, False, False, True] * 2
    for t, _ in rows:
        (first, *later), own = t.passages(), t.rounds[1].shown
        assert first.images == (t.images if context == "markov" else [*t.images, *own])
        assert [passage.images for passage in later] == [own] * (context == "markov")
        height, width = own[0].grid
        assert (4 * height, 4 * width) == t.size == images(t)[-1].size
        asked = OPENED.format(f"the {t.prompt[-1]['content']}")
        assert words(trainer, t.rounds[1].observation_ids).endswith(asked)


# What is paid


def test_sum_of_the_images_from_a_turn_on(trained):
    trainer, seen = trained(round_baseline=0.5, scale_rewards="none", max_steps=1)
    rows = in_order_of_rows(seen.batches)
    of_third = [t.rounds[2].reward for t, _ in rows if len(t.rounds) == 3]
    assert trainer.state.log_history[0]["rounds/reward_3"] == pytest.approx(np.mean(of_third))
    for start in (0, 4, 8):
        group = rows[start : start + 4]
        rewards = torch.tensor([[part.reward for part in t.rounds] for t, _ in group])
        number = len(group[0][0].rounds)
        assert rewards.shape == (4, number)
        paid = torch.stack([columns["round_advantages"] for _, columns in group])
        for m in range(number):
            worth = rewards[:, m:].sum(1) - (0.5 * rewards[:, m - 1] if m else 0)
            torch.testing.assert_close(paid[:, m], worth - worth.mean())
            assert paid[:, m].abs().min() > 1e-6
        assert (paid[:, number:] == 0).all()


def scattered(images):
    """Rewards that are better and worse than those of sources."""
    return [1000 * red % 1 for red in redness([], [], images)]


def test_source_is_scored_once_a_group_where_no_improvement_counts(trained):
    calls = []

    def reward(prompts, completions, images, source_images, previous_images, round_index, **columns):
        calls.append((round_index, prompts, images, source_images, previous_images))
        return scattered(images)

    _, seen = trained(
        **LOOK, reward_funcs=reward, no_improve="clamp", allow_stop=False, scale_rewards="none", max_steps=1
    )
    (number, prompts, shown, sources, before), first, second = calls
    assert (number, before, [[one] for one in shown]) == ([-1, -1], [[], []], sources)
    known = {image.tobytes(): place for place, image in enumerate(edits()["source_image"])}
    for prompt, (image,) in [*zip(prompts, sources, strict=True), *zip(second[1], second[3], strict=True)]:
        assert edits()["prompt"][known[image.tobytes()]] == prompt  # in every round, too
    assert [len(call[0]) for call in (first, second)] == [8, 8]
    stood = np.repeat(scattered(shown), 4)
    rows = in_order_of_rows(seen.batches)
    rewards = np.array([[part.reward for part in t.rounds] for t, _ in rows])
    gains = np.stack([rewards[:, 1] - stood, rewards[:, 1] - rewards[:, 0]], 1).clip(min=0).reshape(2, 4, 2)
    paid = torch.stack([columns["round_advantages"] for _, columns in rows]).reshape(2, 4, 2)
    wanted = gains - gains.mean(1, keepdims=True)
    assert all(0 < number < 8 for number in (gains == 0).sum((0, 1)))
    np.testing.assert_allclose(paid.numpy(), wanted, atol=1e-6)


def test_plain_credit_asks_for_no_score_of_the_source(trained):
    numbers = []

    def reward(prompts, completions, images, round_index, **columns):
        numbers.append(round_index)
        return redness(prompts, completions, images)

    trainer, _ = trained(**LOOK, reward_funcs=reward, max_steps=1)
    assert numbers == [[0] * 8, [1] * 6]
    assert "rounds/better_1" not in trainer.state.log_history[0]
    trainer, _ = trained(**LOOK, no_improve="min", max_steps=1)
    log = trainer.state.log_history[0]
    assert log["rounds/better_1"] + log["rounds/worse_1"] == 1


# What is trained


@pytest.mark.parametrize(
    "settings",
    [
        {"round_context": "markov", "max_steps": 1},
        {"round_context": "full", "flow_context_grad": "full"},
        pytest.param({"round_context": "full", "train_dataset": stories(sources=False)}, marks=pytest.mark.slow),
        {"round_group": "tree", "round_reward": "own", "max_steps": 1},
        {**LOOK, "round_context": "markov", "max_steps": 1},
        {**LOOK, "round_context": "full"},
        pytest.param({"model": lambda: tiny_editor(eyes=False)}, marks=pytest.mark.slow),
    ],
    ids=["markov", "full", "paint", "tree", "look-markov", "look-full", "blind"],
)
def test_losses_and_gradients_are_those_of_the_equations(trained, settings):
    make_model = settings.get("model", tiny_editor)
    trainer, seen = trained(**{**settings, "model": make_model()})
    assert_equations(make_model, trainer, seen, settings)
    assert trainer.state.log_history[0]["flow/ratio_mean"] == 1


def test_texts_that_are_not_sampled_leave_the_image_its_source(trained):
    """Without a thinking TRL's row has one token more than the model's."""
    look = {name: value for name, value in LOOK.items() if name != "num_rounds"}
    settings = {"thinking": False, "text_weight": 0.0, "trainer_class": FixedTexts, "flow_old_source": "rollout"}
    trainer, seen = trained(**look, **settings, num_rounds=1, max_steps=1)
    assert trainer.state.log_history[0]["flow/ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert trainer.state.log_history[0]["flow/log_ratio_std"] < 1e-5
    for batch in seen.batches:
        for t in batch["trajectories"]:
            assert images(t)[0].context.images == t.images


def gaps(one, other):
    """Measure how far the images of two runs are from one another: prompt -> a number for each turn."""
    found = {}
    for (a, _), (b, _) in zip(one, other, strict=True):
        pairs = zip(images(a), images(b), strict=True)
        found.setdefault(a.prompt[-1]["content"], []).append([(x.latents - y.latents).abs().max() for x, y in pairs])
    return {prompt: torch.tensor(rows).amax(0) for prompt, rows in found.items()}


@pytest.mark.parametrize("context", ["markov", "full"])
def test_other_turns_and_other_sources_are_other_images(trained, context):
    def told(dataset):
        _, seen = trained(train_dataset=dataset, max_steps=1, round_context=context)
        return in_order_of_rows(seen.batches)

    plain = told(stories())
    swapped = gaps(plain, told(stories({**TURNS, "a red cat": ["a red cat", "the mat", "a big green dog runs"]})))
    assert (swapped.pop("a red cat") > 1e-3).tolist() == [False, True, True]
    assert all((gap == 0).all() for gap in swapped.values())
    sources = gaps(plain, told(stories(first_source=4)))
    # What is seen of the source is the first image alone, or the source itself in every turn.
    assert all((gap[: None if context == "full" else 1] > 1e-3).all() for gap in sources.values())


class TreeOfStories(FixedRounds):
    """Notes the images that stood at the end."""

    def _go_on(self, outputs, images):
        self.first = list(images)
        outputs, self.last = super()._go_on(outputs, images)
        return outputs, self.last


def test_tree_leaves_stories_that_have_ended_as_they_are(trained):
    trainer, seen = trained(trainer_class=TreeOfStories, round_group="tree", round_reward="own", max_steps=1)
    for place, (t, _) in enumerate(in_order_of_rows(seen.batches)):
        assert len(t.rounds) == len(TURNS[t.prompt[-1]["content"]])
        assert (trainer.first[place] is trainer.last[place]) == (len(t.rounds) == 1)
        if len(t.rounds) > 1:
            group = [other for other, _ in in_order_of_rows(seen.batches)[place // 4 * 4 : place // 4 * 4 + 4]]
            assert len({id(other.rounds[1].shown[0]) for other in group}) == 1


# ShapeWorld


def test_story_of_shapeworld_is_scored_by_its_rule(tmp_path, train):
    """The real base, world, reward and trainer: what is paid is what the rule says of the images after each turn."""
    noted = []

    def rule(prompts, completions, images, source_images, turns, round_index, **columns):
        scores = shapeworld_story_reward(prompts, completions, images, source_images, turns, round_index)
        noted.append((round_index, images, source_images, turns, scores))
        return scores

    model, tokenizer = load_base(seeing=True)
    args = UniGRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        max_steps=1,
        num_generations=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        seed=1,
        image_size=48,
        num_inference_steps=8,
        max_completion_length=32,
        max_reflection_length=32,
        system_prompt="",
        num_rounds=3,
        round_reward="sum",
        round_baseline=0.5,
        gallery_steps=0,
        scale_rewards="none",
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = UniGRPOTrainer(
        model=model,
        reward_funcs=rule,
        args=args,
        train_dataset=shapeworld_story_dataset(num_rows=8, seed=3),
        processing_class=tokenizer,
    )
    seen = train(trainer)
    rows = in_order_of_rows(seen.batches)
    assert [call[0] for call in noted] == [[0] * 8, [1] * 8, [2] * 8]
    rewards = []
    for number, (_, painted, sources, turns, scores) in enumerate(noted):
        by_hand = [
            shapeworld_story_reward([""], [""], [image], [source], [story[: number + 1]])[0]
            for image, source, story in zip(painted, sources, turns, strict=True)
        ]
        assert scores == by_hand
        assert [t.rounds[number].reward for t, _ in rows] == pytest.approx(by_hand)
        rewards.append(by_hand)
    assert len(set(map(tuple, rewards))) == 3
    assert np.std(rewards[0]) > 0.1
    worth = np.stack([np.sum(rewards[m:], 0) - (0.5 * np.array(rewards[m - 1]) if m else 0) for m in range(3)], 1)
    paid = torch.stack([columns["round_advantages"] for _, columns in rows]).numpy()
    for group in (slice(0, 4), slice(4, 8)):
        np.testing.assert_allclose(paid[group], worth[group] - worth[group].mean(0), atol=1e-5)


def test_the_example_trains_by_a_judge_that_sees_each_turn(tmp_path, monkeypatch):
    """The script as it is, but for the names of the model, the judge and the file, and smaller numbers."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    tiny_editor().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = []
    for number, (prompt, turns) in enumerate(TURNS.items()):
        source(number).save(tmp_path / f"{number}.png")
        rows.append({"prompt": prompt, "turns": turns, "source_image": str(tmp_path / f"{number}.png")})
    (tmp_path / "stories.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small = {"image_size": 8, "num_inference_steps": 6, "num_generations": 4, "max_completion_length": 4}
    small |= {"report_to": "none", "use_cpu": True, "max_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    small |= {"max_reflection_length": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    asked = Counter()

    def reply(body, attempt):
        before, after = images_of(body)
        assert before.tobytes() != after.tobytes()
        asked.update(turn for turns in TURNS.values() for turn in turns if turn in text_of(body))
        return yes(0.1 + 0.8 * np.asarray(after).mean() / 255)

    with ChatServer(reply) as server:
        replaced = {
            '"ByteDance-Seed/BAGEL-7B-MoT"': repr(str(tmp_path / "model")),
            '"http://localhost:8000/v1"': repr(server.url),
            '"stories.jsonl"': repr(str(tmp_path / "stories.jsonl")),
            '"bagel-stories", ': f"{str(tmp_path / 'out')!r}, **{small!r}, ",
        }
        found = run_example("story.py", **replaced)
    log = found["trainer"].state.log_history[0]
    assert set(asked) == {turn for turns in TURNS.values() for turn in turns}
    assert 0 < log["rewards/consistency/mean"] < 1
    assert log["rounds/images"] == 2


# Refused


GOOD = {"prompt": "a red cat", "turns": ["a red cat"]}
BAD = {
    "A row with the prompt 'a cat' has the turns None, expected a list": {"prompt": "a cat", "turns": None},
    r"holds '<\|im_end\|>', which is no text": {"prompt": "a cat", "turns": ["a cat", "<|im_end|>"]},
}


@pytest.mark.parametrize(
    ("dataset", "settings", "message"),
    [
        ({"a": ["a", "b"], "c": ["c", "d", "e", "f"]}, {}, r"train_dataset: row 1 .*'c' has 4 turns.*num_rounds=4"),
        ({"a": ["a", "b"]}, {"num_rounds": 1}, "has 2 turns, but a trajectory has at most 1 images. Set num_rounds=2"),
        ({"a": ["a"], "b": None}, {}, r"row 1 with the prompt 'b' has the turns None, expected a list.*filter"),
        ({"a": []}, {}, r"has the turns \[\], expected a list of texts"),
        ({"a": ["a", " "]}, {}, "expected a list of texts"),
        ({"a": ["b", "a"]}, {}, "begins with the turn 'b': the first turn is the prompt itself"),
        (
            TURNS,
            {"reflection_template": "{prompt}"},
            "reflection_template='{prompt}' does not work with a column 'turns'",
        ),
        (TURNS, {"no_improve": "clamp"}, "no_improve='clamp' does not work with a column 'turns'"),
        (TURNS, {"remove_unused_columns": True}, "takes the turns away"),
        (
            TURNS,
            {"eval_dataset": stories(sources=False).remove_columns("turns")},
            "eval_dataset has no column 'turns', but another",
        ),
        (TURNS, {"eval_dataset": stories(sources=False), "eval_num_rounds": 2}, "eval_dataset: row 0 .* has 3 turns"),
    ],
)
def test_bad_turns_are_refused_before_a_model_is_loaded(tmp_path, dataset, settings, message):
    settings = {"gradient_accumulation_steps": 1, "train_dataset": stories(dataset, sources=False), **settings}
    with pytest.raises(ValueError, match=message):
        story_trainer(tmp_path, model="no/such-model", **settings)


def test_special_tokens_in_a_turn_are_refused(tmp_path):
    dataset = stories({"a cat": ["a cat", "a <|im_end|> dog"]}, sources=False)
    with pytest.raises(ValueError, match=r"Row 0 of train_dataset holds '<\|im_end\|>'"):
        story_trainer(tmp_path, train_dataset=dataset, gradient_accumulation_steps=1)


@pytest.mark.parametrize("message", BAD)
def test_a_streamed_row_that_is_no_story_ends_the_run(tmp_path, message):
    dataset = IterableDataset.from_generator(lambda: iter([GOOD, BAD[message]]))
    trainer = story_trainer(tmp_path, train_dataset=dataset, dataloader_num_workers=0, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_evaluation_tells_stories_too(tmp_path):
    trainer = story_trainer(tmp_path, eval_dataset=stories(), per_device_eval_batch_size=4, num_generations_eval=1)
    found = trainer.evaluate()
    assert {"eval_rounds/reward_3", "eval_rounds/images"} <= found.keys()
    with pytest.raises(ValueError, match="A column 'turns': train_dataset has one, eval_dataset differs"):
        trainer.evaluate(stories().remove_columns("turns"))


def test_column_of_stories_is_what_the_dataset_of_shapeworld_has():
    row = shapeworld_story_dataset(num_rows=1)[0]
    assert row["turns"][0] == row["prompt"]
    assert source(0).size == (8, 8)
