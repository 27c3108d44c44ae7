"""Reward functions as TRL calls them, with the images; and the ones that fail."""

import numpy as np
import pytest
import torch
from PIL import Image
from trl.rewards import think_format_reward

from tests.helpers.tiny_unified import IMAGE_SIZE, images_of, prompts_dataset, redness
from trl_unigrpo.images import mark_failed
from trl_unigrpo.reporting.run_files import read_run
from trl_unigrpo.sampling import decode
from trl_unigrpo.trainers.reward_checks import distinct
from trl_unigrpo.trainers.scoring import mask_failed_rewards, with_names


CONVERSATION = [[{"role": "user", "content": "a red cat"}], [{"role": "user", "content": "a small tree"}]]


class Watcher:
    """A reward that keeps what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, completions, images, **columns):
        self.calls.append({"prompts": prompts, "completions": completions, "images": images, **columns})
        return [float(i % 3) for i in range(len(images))]


def advantages_of(batches):
    return torch.cat([batch["advantages"] for batch in batches])


class Channel:
    """A judge of a colour, of which a run may have several."""

    def __init__(self, channel):
        self.channel = channel

    def __call__(self, images, **columns):
        return [float(np.asarray(image)[..., self.channel].mean()) / 255 for image in images]


def test_rewards_that_share_a_name_are_numbered(make_trainer, tmp_path):
    rewards = (Channel(0), redness, Channel(2), lambda images, **_: [0.5] * len(images))
    trainer = make_trainer(reward_funcs=rewards, reward_weights=[1.0, 0.0, 0.0, 0.0], max_steps=1, gallery_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    names = ["Channel", "redness", "Channel_2", "<lambda>"]
    assert trainer.reward_func_names == names
    assert log["rewards/Channel/mean"] == pytest.approx(log["reward"]) == pytest.approx(log["rewards/redness/mean"])
    assert log["rewards/Channel_2/mean"] != pytest.approx(log["reward"], rel=1e-3)
    run = read_run(tmp_path)
    for sample in run.shown[0].samples:
        assert list(sample.rewards) == names
        assert sample.rewards["Channel"] == sample.rewards["redness"] != sample.rewards["Channel_2"]
        assert sample.reward == pytest.approx(sample.rewards["Channel"])
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "Channel_2" in card and "Channel" in card.replace("Channel_2", "")


def test_columns_of_rewards_that_share_a_name_are_kept_apart():
    def judge(prompts, images, log_extra, **_):
        log_extra("seen", [image.size for image in images])
        log_extra("twice", [0, 1])
        return [1.0] * len(images)

    images = mark_failed([Image.new("RGB", (8 * place, 8)) for place in (1, 2, 3)], [True, False, True])
    logged = {}
    for reward in with_names([judge, judge]):
        assert reward(prompts=["a", "b", "c"], images=images, log_extra=logged.__setitem__) == [1.0, None, 1.0]
    rows = [(8, 8), None, (24, 8)]  # one that failed was not seen
    assert logged["seen"] == logged["seen_2"] == rows and logged["twice"] == logged["twice_2"] == [0, None, 1]


def test_numbers_of_names_meet_no_other_name():
    assert distinct(["a", "a", "b", "a", "a_2", "a"]) == ["a", "a_2", "b", "a_3", "a_2_2", "a_4"]


def test_error_of_a_reward_that_shares_its_name_says_which(make_trainer):
    def broken(channel):
        def judge(images, **columns):
            raise KeyError(channel)

        return judge

    def judge(images, **columns):
        return [0.0] * len(images)

    with pytest.raises(KeyError) as raised:
        make_trainer(reward_funcs=[judge, broken(1)], max_steps=1).train()
    assert raised.value.__notes__ == ["Raised by the reward function 'judge_2'."]


def test_images_are_a_flat_list_aligned_with_the_completions(make_trainer, train):
    watch = Watcher()
    trainer = make_trainer(
        reward_funcs=watch, train_dataset=prompts_dataset(target=list("abcd")), max_steps=1, num_iterations=1
    )
    painted, paint = [], trainer._paint

    def kept(trajectories):
        images = paint(trajectories)
        painted.append((trajectories, images))
        return images

    trainer._paint = kept
    seen = train(trainer)
    (call,) = watch.calls
    ((trajectories, images),) = painted
    assert len(call["images"]) == len(call["prompts"]) == len(call["completions"]) == len(call["target"]) == 8
    assert all(isinstance(image, Image.Image) and image.size == (IMAGE_SIZE, IMAGE_SIZE) for image in call["images"])
    assert all(mine is theirs for mine, theirs in zip(images, call["images"], strict=True))
    decoded = trainer.processing_class.batch_decode([t.text_ids for t in trajectories], skip_special_tokens=True)
    assert call["completions"] == decoded
    assert len(set(call["target"])) == 2  # two groups, each column repeated with its prompt
    assert call["target"][:4] == [call["target"][0]] * 4
    # And the image that is trained on is the one that was scored.
    by_context = {}
    for batch in seen.batches:
        for image, advantage in zip(images_of([batch]), batch["advantages"], strict=True):
            (decoded,) = decode(trainer.unified, [image])
            by_context[decoded.tobytes()] = advantage.item()
    scores = torch.tensor([float(i % 3) for i in range(8)]).view(2, 4)
    expected = ((scores - scores.mean(1, True)) / (scores.std(1, keepdim=True) + 1e-4)).flatten()
    found = torch.tensor([by_context[image.tobytes()] for image in call["images"]])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("system_prompt", ["auto", "", "under the tree"])
def test_prompts_reach_the_model_in_its_own_format(make_trainer, conversational, system_prompt):
    watch = Watcher()
    dataset = prompts_dataset(CONVERSATION if conversational else ["a red cat", "a small tree"], copies=4)
    trainer = make_trainer(reward_funcs=watch, train_dataset=dataset, system_prompt=system_prompt, max_steps=1)
    contexts, paint = [], trainer._paint

    def kept(trajectories):
        contexts.extend(trajectory.prompt_ids for trajectory in trajectories)
        return paint(trajectories)

    trainer._paint = kept
    trainer.train()
    system = {"auto": "<|im_start|> think first <|im_end|> ", "": ""}.get(
        system_prompt, "<|im_start|> under the tree <|im_end|> "
    )
    texts = {trainer.processing_class.decode(ids) for ids in contexts}
    assert texts <= {
        f"{system}<|im_start|> {prompt} <|im_end|> <|im_start|>" for prompt in ("a red cat", "a small tree")
    }
    (call,) = watch.calls
    if conversational:  # as TRL has it: messages in, messages out
        assert all(completion[0]["role"] == "assistant" for completion in call["completions"])
        assert call["prompts"][0] in CONVERSATION
    else:
        assert all(isinstance(completion, str) for completion in call["completions"])


def test_system_prompt_of_the_data_stays(make_trainer):
    prompt = [{"role": "system", "content": "the big dog"}, {"role": "user", "content": "a red cat"}]
    trainer = make_trainer(train_dataset=prompts_dataset([prompt], copies=4))
    (ids,) = trainer._tokenize_prompts([prompt])[0]
    assert trainer.processing_class.decode(ids) == (
        "<|im_start|> the big dog <|im_end|> <|im_start|> a red cat <|im_end|> <|im_start|>"
    )


def test_trl_reward_async_reward_and_weights_beside_an_image_reward(make_trainer):
    async def patient(prompts, images, **_):
        return [0.25] * len(images)

    trainer = make_trainer(
        reward_funcs=[redness, think_format_reward, patient],
        reward_weights=[1.0, 0.5, 2.0],
        train_dataset=prompts_dataset(CONVERSATION, copies=4),
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["rewards/patient/mean"] == pytest.approx(0.25)
    assert log["rewards/think_format_reward/mean"] == 0.0
    assert log["reward"] == pytest.approx(log["rewards/redness/mean"] + 0.5, abs=1e-5)


@pytest.mark.parametrize("nothing", [None, float("nan"), float("inf")])
def test_sample_without_a_score_gets_no_advantage(make_trainer, train, nothing):
    def partial(images, **_):
        return [nothing if i in (1, 5) else float(i) for i in range(len(images))]

    trainer = make_trainer(reward_funcs=partial, max_steps=1)
    with pytest.warns(UserWarning, match="no score"):
        seen = train(trainer)
    advantages = advantages_of(seen.batches)
    assert (advantages == 0).sum() == 2
    # The baseline is the mean of the others: 0, 2, 3 and 4, 6, 7.
    others = torch.tensor([0.0, 2.0, 3.0])
    expected = (others - others.mean()) / (others.std() + 1e-4)
    torch.testing.assert_close(
        advantages[advantages != 0].sort().values, torch.cat([expected, expected]).sort().values
    )
    log = trainer.state.log_history[0]
    assert log["reward/frac_none"] == pytest.approx(0.25)
    assert log["reward"] == pytest.approx((0 + 2 + 3 + 4 + 6 + 7) / 6)


def test_partly_failing_second_reward_takes_the_sample_out(make_trainer, train):
    def judge(images, **_):
        return [None if i == 2 else 1.0 for i in range(len(images))]

    def count(images, **_):
        return [float(i) for i in range(len(images))]

    trainer = make_trainer(reward_funcs=[count, judge], max_steps=1)
    with pytest.warns(UserWarning, match="no score"):
        seen = train(trainer)
    assert (advantages_of(seen.batches) == 0).sum() == 1
    assert trainer.state.log_history[0]["reward/frac_none"] == pytest.approx(1 / 8)


def test_reward_that_does_not_apply_to_a_group_is_left_out_of_it():
    rewards = torch.tensor([[1.0, torch.nan], [2.0, torch.nan], [3.0, 0.5], [4.0, torch.nan]])
    masked, share = mask_failed_rewards(rewards, group_size=2)
    assert torch.equal(masked[:3].isnan(), rewards[:3].isnan())
    assert masked[3].isnan().all()
    assert share == 0.25


def test_all_scores_missing_trains_on_nothing_but_the_regulariser(make_trainer, train):
    trainer = make_trainer(reward_funcs=lambda images, **_: [None] * len(images), max_steps=1, max_grad_norm=0.0)
    with pytest.warns(UserWarning, match="no score"):
        seen = train(trainer)
    assert trainer.state.log_history[0]["reward/frac_none"] == 1.0
    assert all(gradient is None or gradient.abs().max() < 1e-8 for gradient in seen.gradients[0].values())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_error_of_a_reward_function_names_it(make_trainer, asynchronous):
    def fussy_judge(images, **_):
        raise ConnectionError("server is gone")

    async def fussy_judge_async(images, **_):
        raise ConnectionError("server is gone")

    trainer = make_trainer(reward_funcs=[redness, fussy_judge_async if asynchronous else fussy_judge])
    with pytest.raises(ConnectionError, match="server is gone") as caught:
        trainer.train()
    assert any("'fussy_judge" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ([1.0], ValueError, "'odd' returned 1 rewards, but 8 were expected"),
        (None, TypeError, "'odd' returned None, expected a list"),
        (0.5, TypeError, "'odd' returned 0.5, expected a list"),
    ],
)
def test_wrong_return_of_a_reward_function_names_it(make_trainer, returned, error, message):
    def odd(images, **_):
        return returned

    with pytest.raises(error, match=message):
        make_trainer(reward_funcs=odd).train()


def test_callable_objects_keep_their_name_and_may_return_arrays(make_trainer):
    class VLMJudge:
        def __call__(self, images, **_):
            return np.linspace(0, 1, len(images))

    trainer = make_trainer(reward_funcs=VLMJudge(), max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/VLMJudge/mean"] == pytest.approx(0.5)


def test_equal_scores_give_no_flow_objective(make_trainer):
    trainer = make_trainer(reward_funcs=lambda images, **_: [1.0] * len(images), image_learning_rate=0.1)
    trainer.train()
    log = trainer.state.log_history
    assert log[0]["flow/loss"] == log[1]["flow/loss"] == 0
    assert log[0]["frac_reward_zero_std"] == 1.0
