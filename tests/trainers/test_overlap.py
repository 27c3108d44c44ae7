"""Rewards that are asked about images while others are painted: only the time differs."""

import asyncio
import functools
import signal
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.judge_server import ChatServer, Reply, images_of, yes
from tests.helpers.painting import trajectory
from tests.helpers.rounds import rounds_trainer
from tests.helpers.tiny_unified import IMAGE_SIZE, prompts_dataset, redness, tiny_bagel, weights
from trl_unigrpo.flow import flow_timesteps
from trl_unigrpo.flow.sampler import RolloutPlan
from trl_unigrpo.images import mark_failed
from trl_unigrpo.rewards import EditReward, EndpointReader, QuestionReward, ReadBackReward, VLMJudge, thinking_reward
from trl_unigrpo.rewards.remote.remote_reward import RemoteReward
from trl_unigrpo.sampling import decode, generation, paint, paint_and_decode
from trl_unigrpo.trainers.early_scores import AskedPart, EarlyScores, scores_early, seconds_of
from trl_unigrpo.trainers.scoring import with_names
from trl_unigrpo.trainers.trl_bridge import TRLChangedError, check_attributes, completions_of


IN_TWOS = {"image_batch_size": 2, "max_steps": 1, "num_iterations": 1}
NOWHERE = "http://127.0.0.1:9/v1"


def brightness(image):
    return float(np.asarray(image, dtype=np.float32).mean() / 255)


def apart(function):
    """Let a function be asked about parts of a batch."""
    function.per_image = True
    return function


def fails(image):
    """Three images of ten."""
    return int(np.asarray(image, dtype=np.int64).sum()) % 10 < 3


class WholeJudge(VLMJudge):
    """A judge that does something of its own with a whole batch."""

    async def __call__(self, *args, **kwargs):
        return await super().__call__(*args, **kwargs)


class WholeQuestions(QuestionReward):
    async def __call__(self, *args, **kwargs):
        return await super().__call__(*args, **kwargs)


def answer(body, attempt):
    """P(yes) is the image's brightness; some images have no answer, and one of two requests has to be repeated."""
    (image,) = images_of(body)
    if not attempt and int(np.asarray(image, dtype=np.int64).sum()) % 2:
        return Reply(status=500, headers={"retry-after-ms": "1"})
    return Reply(status=400, delay=0.01) if fails(image) else Reply(yes(brightness(image)).body, delay=0.01)


def judged(make_trainer, folder, url, early):
    """A run with an evaluation, whose judges score parts or, else, whole batches; and its functions' calls."""
    calls = []

    async def own(prompts, images, completion_ids, log_extra, log_metric, **columns):
        calls.append(len(images))
        log_extra("tokens", [len(ids) for ids in completion_ids])
        log_metric("own/constant", 0.5)
        return [None if fails(image) else brightness(image) for image in images]

    own.per_image = early
    judge = (VLMJudge if early else WholeJudge)("m", url, concurrency=3, image_format="png")
    asker = VLMJudge("m", url, image_format="png")
    questions = (QuestionReward if early else WholeQuestions)(asker, max_failed=0.5, name="questions")
    asked = [["Is it bright?", "Is it light?"], ["Is it white?"]]
    trainer = make_trainer(
        folder,
        reward_funcs=[redness, judge, questions, own],
        train_dataset=prompts_dataset(["a red cat", "a small tree"], copies=4, questions=asked),
        eval_dataset=prompts_dataset(["a red cat", "a small tree"], copies=1, questions=asked),
        image_batch_size=3,
        num_iterations=1,
        max_steps=2,
        per_device_eval_batch_size=8,
    )
    trainer.train()
    trainer.evaluate()
    return trainer, calls


def untimed(log):
    """Leave out of a log all that depends on the clock."""
    return {name: value for name, value in log.items() if "time" not in name and not name.endswith("per_second")}


def test_scores_metrics_columns_and_weights_are_those_without_overlap(make_trainer, tmp_path, monkeypatch):
    """To the bit: with retries, images that the judge gives no score, and images that are not numbers."""
    decode = generation.decode

    def overflowing(*args):
        images = decode(*args)
        return mark_failed(images, [int(np.asarray(i, dtype=np.int64).sum()) % 5 < 4 for i in images])

    monkeypatch.setattr(generation, "decode", overflowing)
    with ChatServer(answer) as server:
        early, calls = judged(make_trainer, tmp_path / "early", server.url, True)
    with ChatServer(answer) as other:
        whole, whole_calls = judged(make_trainer, tmp_path / "whole", other.url, False)
    assert len(server.requests) == len(other.requests)
    assert sum(calls) == sum(whole_calls) and (max(calls), len(whole_calls)) == (3, 3)
    failed = [value for log in whole.state.log_history for name, value in log.items() if "not_finite" in name]
    assert max(failed) > 0  # the test has all that it says
    assert 0 < max(log.get("VLMJudge/failed", 0) for log in early.state.log_history) < 1
    assert "time/reward_ahead" in early.state.log_history[0] and "time/reward_ahead" not in whole.state.log_history[0]
    assert "eval_time/reward_ahead" in early.state.log_history[-1]
    for one, other in zip(early.state.log_history, whole.state.log_history, strict=True):
        named = {name.replace("WholeJudge", "VLMJudge"): value for name, value in untimed(other).items()}
        assert untimed(one) == pytest.approx(named, rel=0, abs=0, nan_ok=True)
    assert {"tokens", "questions answers"} == set(early._logs["extra"])
    assert early._logs["extra"] == whole._logs["extra"] and early._logs["completion"] == whole._logs["completion"]
    assert repr(early._book.rewards) == repr(whole._book.rewards)
    before, after = weights(whole.model), weights(early.model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_parts_are_asked_with_what_the_batch_is_asked_with(make_trainer):
    calls = {"whole": [], "part": []}

    def keep(kind, images, columns):
        calls[kind].append({"images": images, **columns})
        return [0.5 * i for i in range(len(images))]

    async def whole(images, **columns):
        return keep("whole", images, columns)

    @apart
    async def part(images, **columns):
        return keep("part", images, columns)

    dataset = prompts_dataset([[{"role": "user", "content": "a red cat"}]], copies=8, target=["t"])
    make_trainer(reward_funcs=[whole, part], train_dataset=dataset, **IN_TWOS).train()
    ((at_once,), parts) = calls.values()
    assert [len(call["images"]) for call in parts] == [2, 2, 2, 2]
    for name, expected in at_once.items():
        found = [call[name] for call in parts]
        if name in ("log_extra", "log_metric"):
            continue
        if name == "trainer_state":
            assert all(state is expected for state in found)
        else:
            joined = [value for values in found for value in values]
            assert len(joined) == 8 and all(one is other for one, other in zip(joined, expected, strict=True)), name
    assert all(call.keys() == at_once.keys() for call in parts)


def test_images_are_judged_while_others_are_painted(make_trainer, monkeypatch):
    """The first chunks are judged before the last is decoded, and the judge gets no more at a time than it takes."""
    decode, decoded = generation.decode, []

    def slow(*args):
        time.sleep(0.15)
        decoded.append(len(server.requests))
        return decode(*args)

    monkeypatch.setattr(generation, "decode", slow)
    with ChatServer(lambda body, attempt: Reply(yes(0.5).body, delay=0.4)) as server:
        trainer = make_trainer(reward_funcs=VLMJudge("m", server.url, concurrency=3), **IN_TWOS)
        trainer.train()
    assert decoded[0] == 0 < decoded[2] and len(server.requests) == 8
    assert server.most == 3  # of two chunks
    log = trainer.state.log_history[0]
    # Eight requests, three at a time, take 1.2 s, of which .45 and more pass while the other chunks are painted.
    ahead, waited = log["time/reward_ahead"], log["time/reward"]
    assert ahead > 0.4 and 0.4 < waited < 1.1 < ahead + waited and ahead < log["time/paint"]


@pytest.mark.parametrize("kind", ["VLMJudge", "EndpointReader", "RemoteReward"])
def test_concurrent_calls_share_the_limit_of_requests(kind):
    image = Image.new("RGB", (8, 8))
    body = {"scores": [0.5]} if kind == "RemoteReward" else yes(0.5).body
    with ChatServer(lambda _, attempt: Reply(body, delay=0.05)) as server:
        if kind == "RemoteReward":
            ask = RemoteReward(server.url.removesuffix("/v1"), "r", concurrency=2, batch_size=1)
        elif kind == "VLMJudge":
            ask = VLMJudge("m", server.url, concurrency=2)
        else:
            reader = EndpointReader("m", server.url, concurrency=2)
            ask = ReadBackReward(reader).answers

        async def together():
            return await asyncio.gather(*(ask(prompts=["a cat"] * 2, images=[image] * 2) for _ in range(3)))

        found = asyncio.run(together())
    assert (len(server.requests), server.most) == (6, 2)
    assert kind == "EndpointReader" or found == [[0.5, 0.5]] * 3


class Waiting:
    """A judge that never answers, and counts whom it kept waiting."""

    per_image = True

    def __init__(self):
        self.__name__, self.asked, self.cancelled = "waiting", 0, 0

    async def __call__(self, images, **_):
        self.asked += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def all_cancelled(judge, asked):
    for _ in range(100):
        if judge.cancelled == judge.asked == asked:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("error", [RuntimeError("the painter broke"), KeyboardInterrupt()])
def test_an_error_in_painting_ends_the_judging(make_trainer, monkeypatch, error):
    judge, decode, chunks = Waiting(), generation.decode, []

    def breaks(*args):
        chunks.append(args)
        if len(chunks) == 3:
            time.sleep(0.1)  # the judge is asked by now
            raise error
        return decode(*args)

    trainer = make_trainer(reward_funcs=[redness, judge], **IN_TWOS)
    with monkeypatch.context() as patch:
        patch.setattr(generation, "decode", breaks)
        with pytest.raises(type(error)):
            trainer.train()
    assert all_cancelled(judge, asked=2)
    judge.per_image = False  # what was asked is forgotten
    trainer.reward_funcs = with_names([redness, redness])
    trainer.train()
    assert trainer.state.global_step == 1


def test_ctrl_c_while_judges_are_waited_for_ends_the_run(make_trainer):
    judge = Waiting()
    trainer = make_trainer(reward_funcs=judge, **IN_TWOS)

    def interrupt():
        while judge.asked < 4 or "reward" not in trainer._phases._running:
            time.sleep(0.02)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    signal.signal(signal.SIGINT, before)
    assert all_cancelled(judge, asked=4)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (ConnectionError("server is gone"), ConnectionError, "server is gone"),
        ([1.0], ValueError, "Got 1 values for 2 images"),
        (0.5, TypeError, "'odd' returned 0.5, expected a list"),
    ],
)
def test_a_part_that_fails_raises_as_a_batch_does(make_trainer, returned, error, message):
    waiting, parts = Waiting(), []

    @apart
    async def odd(images, **_):
        parts.append(images)
        if len(parts) < 3:
            return [0.5] * len(images)
        if isinstance(returned, Exception):
            raise returned
        return returned

    with pytest.raises(error, match=message) as raised:
        make_trainer(reward_funcs=[odd, waiting], **IN_TWOS).train()
    assert raised.value.__notes__ == ["Raised by the reward function 'odd'."]
    assert all_cancelled(waiting, asked=4)


def test_several_rounds_are_judged_as_wholes(tmp_path):
    calls = []

    @apart
    async def judge(images, **_):
        calls.append(len(images))
        return [brightness(image) for image in images]

    trainer = rounds_trainer(tmp_path, reward_funcs=judge, **IN_TWOS)
    trainer.train()
    assert len(calls) == 2 and calls[0] == 8  # each round's new images at once
    assert "time/reward_ahead" not in trainer.state.log_history[0]


class LocalAsker:
    """A judge in this process."""

    async def ask(self, pairs):
        return [0.5] * len(pairs)


async def of_batch(images, **_):
    return [0.0] * len(images)


VLM = VLMJudge("m", NOWHERE)


@pytest.mark.parametrize(
    ("function", "early"),
    [
        (VLM, True),
        (VLMJudge("m", NOWHERE, mode="pairwise", reference="best"), True),
        (VLMJudge("m", NOWHERE, mode="pairwise", reference=lambda prompts, images: images), False),
        (WholeJudge("m", NOWHERE), False),
        (RemoteReward("http://127.0.0.1:9", "r"), True),
        (QuestionReward(VLM), True),
        (EditReward(VLM), True),
        (QuestionReward(LocalAsker()), False),
        (WholeQuestions(VLM), False),
        (ReadBackReward(EndpointReader("m", NOWHERE)), True),
        (ReadBackReward(), False),
        (thinking_reward(VLM), True),
        (functools.partial(VLM, extra=1), False),
        (of_batch, False),
        (apart(functools.partial(of_batch)), True),
        (Waiting(), True),
        (apart(lambda images, **_: [0.0]), False),  # a synchronous one would hold up the others
        (torch.nn.Linear(1, 1), False),
    ],
)
def test_which_functions_are_asked_early(function, early):
    assert scores_early(function) is early
    (named,) = with_names([function])
    assert (getattr(named, "early", None) is not None) is early


def test_parts_come_back_in_the_order_of_the_batch():
    """Images of several sizes are painted by size; one failed, and one part logs no column."""
    images = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(5)]
    mark_failed(images[1:2], [False])
    logged = {"columns": {}, "metrics": []}

    @apart
    async def reward(images, log_extra, log_metric, **_):
        scores = [image.getpixel((0, 0))[0] / 40 for image in images]
        log_metric("mean", sum(scores) / len(scores))
        if 0 in scores:
            log_extra("red", scores)
        return scores

    async def run():
        early, loop = EarlyScores(reward, list), asyncio.get_running_loop()
        for places in ([3, 4], [1], [0, 2]):
            early.begin(loop, places, {"images": [images[i] for i in places], "prompts": [""] * len(places)})
        logs = {
            "log_extra": logged["columns"].__setitem__,
            "log_metric": lambda *metric: logged["metrics"].append(metric),
        }
        return await early.collect(images=[images[i] for i in (0, 2, 3, 4)], prompts=[""] * 4, **logs)

    assert asyncio.run(run()) == [0.0, 2.0, 3.0, 4.0]
    assert logged == {"columns": {"red": [0.0, 2.0, None, None]}, "metrics": [("mean", 3.5), ("mean", 1.0)]}


def test_seconds_in_which_something_was_asked():
    spans = ((2.0, 3.0), (0.0, 1.0), (2.5, 2.75), (2.5, 3.5), (4.0, 9.0))
    parts = [AskedPart([0], began=began, ended=ended) for began, ended in spans]
    assert seconds_of(parts, until=6.0) == 1.0 + 1.5 + 2.0
    assert seconds_of(parts, until=3.25) == 1.0 + 1.25
    assert seconds_of([], until=6.0) == 0.0


def test_what_is_needed_of_trl_is_checked(make_trainer):
    trainer = make_trainer(reward_funcs=of_batch)
    check_attributes(trainer)
    del trainer.async_loop
    with pytest.raises(TRLChangedError, match="no attribute async_loop"):
        check_attributes(trainer)
    assert completions_of(([[1]], [[2]], None, ["text"], None, {})) == ["text"]
    with pytest.raises(TRLChangedError, match="completion for each prompt"):
        completions_of(([[1]], [[2]], None, {}, ["text"]))


# Painting in chunks


SIZE = (IMAGE_SIZE, IMAGE_SIZE)


def test_chunks_are_the_images_of_paint():
    """Of two sizes, each chunk of one, in whatever order they come."""
    model = tiny_bagel()
    sizes = [None, (4, 8), None, (4, 8), None]
    rows = [trajectory([1, 8 + i], [9, 10, 2], size=size) for i, size in enumerate(sizes)]
    windows = torch.tensor([[0, 1], [1, 2], [2, 3], [0, 3], [0, 1]])
    plan = RolloutPlan(flow_timesteps(5), SIZE, windows=windows, batch_size=2)

    def generators():
        return [torch.Generator().manual_seed(i) for i in range(5)]

    expected, shown = paint(model, rows, plan, generators()), []
    images, seen = paint_and_decode(model, rows, plan, generators(), lambda *chunk: shown.append(chunk))
    places = {id(row): place for place, row in enumerate(rows)}
    chunks = [[places[id(row)] for row in some] for some, _ in shown]
    assert chunks == [[0, 2], [4], [1, 3]]
    assert all(images_ == [seen[i] for i in chunk] for chunk, (_, images_) in zip(chunks, shown, strict=True))
    assert [image.size for image in images] == [size or SIZE for size in sizes]
    for one, other in zip(images, expected, strict=True):
        assert torch.equal(one.latents, other.latents) and torch.equal(one.steps.t, other.steps.t)
    for one, other in zip(seen, decode(model, expected, 2), strict=True):
        assert one.tobytes() == other.tobytes()


def test_a_chunk_is_shown_before_the_next_is_painted():
    events, model = [], tiny_bagel()
    predict = model.predict_velocity

    def noted(context, latents, *args, **kwargs):
        events.append(len(latents))
        return predict(context, latents, *args, **kwargs)

    model.predict_velocity = noted
    rows = [trajectory([1, 8 + i], [9, 2]) for i in range(3)]
    plan = RolloutPlan(flow_timesteps(2), SIZE, batch_size=2)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    paint_and_decode(model, rows, plan, generators, lambda some, _: events.append(len(some) * ["shown"]))
    assert events == [2, 2, ["shown", "shown"], 1, 1, ["shown"]]
