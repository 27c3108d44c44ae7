"""The client of served rewards, against real servers: the scores are the local ones, and a failure is no score."""

import asyncio
import json
import pickle
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from tests.helpers.judge_server import endless_server
from tests.helpers.served_rewards import calm, patchy, redness
from tests.helpers.serving import SERVED, TOKEN, score, scripted, serving, serving_process, some_images
from trl_unigrpo.rewards import RemoteReward
from trl_unigrpo.rewards.common import DeadRewardError, to_rgb
from trl_unigrpo.rewards.remote import remote_reward as remote
from trl_unigrpo.rewards.remote.wire import PNG_MODES, from_png, to_png


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)


@pytest.fixture(scope="module")
def url():
    with serving(redness, calm, patchy) as address:
        yield address


# The scores


@pytest.mark.parametrize("name", ["redness", "calm"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_keep_the_order_of_the_images(url, name, batch_size):
    images = some_images(10)
    reward = RemoteReward(url, name, batch_size=batch_size)
    assert score(reward, images) == redness(None, None, images)


@pytest.mark.parametrize("mode", [*PNG_MODES, "CMYK", "HSV"])
def test_pixels_survive_the_wire(mode):
    colors = some_images(1, 16)[0]
    if mode == "I;16":
        image = Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (16, 16), dtype=np.uint16))
    elif mode == "RGBA":
        image = Image.merge("RGBA", (*colors.split(), colors.getchannel("G")))
    elif mode == "LA":
        image = Image.merge("LA", colors.split()[:2])
    else:
        image = colors.convert(mode)
    assert image.mode == mode
    there = from_png(to_png(image), max_pixels=256)
    expected = image if mode in PNG_MODES else to_rgb(image)
    assert there.mode == expected.mode
    assert there.tobytes() == expected.tobytes()
    assert there.convert("RGB").tobytes() == expected.convert("RGB").tobytes()  # the palette, too


def test_none_nan_and_infinity_are_no_scores(url):
    metrics = {}
    scores = score(RemoteReward(url, "patchy"), some_images(5), log_metric=metrics.__setitem__)
    assert scores == [None, None, None, 0.5, float(np.float32(0.1))]
    assert metrics == {"patchy/failed": 3 / 5}


def test_no_images_are_no_requests(url):
    assert score(RemoteReward(url, "redness"), []) == []


def test_rewards_get_what_was_sent():
    calls = []

    def listen(**arguments):
        calls.append(arguments)
        return [0.0] * len(arguments["images"])

    prompts = ["a", [{"role": "user", "content": "é\u2028 \U0001f408"}], "c"]
    completions = ["x", [{"role": "assistant", "content": "y"}], "z"]
    columns = {
        "target": ["α", None, 'quo"te'],
        "questions": [[{"text": "?", "weight": 0.1 + 0.2}], [], [{"parents": [1, [2]]}]],
        "count": [2**53 + 1, -1, 0],
        "flag": [True, False, None],
        "completion_ids": [[1, 2], [], [3]],
    }
    stays = {
        "trainer_state": object(),
        "log_extra": print,
        "log_metric": lambda name, value: None,
        "environments": print,
    }
    images = some_images(3)
    with serving(listen) as address:
        reward = RemoteReward(address, "listen", batch_size=2, concurrency=1)
        asyncio.run(reward(prompts=prompts, completions=completions, images=images, **columns, **stays))
        score(RemoteReward(address, "listen", columns=["count"]), images, **columns)
    first, second, restricted = calls
    sent = {"prompts": prompts, "completions": completions, **columns}
    assert {key: first[key] + second[key] for key in sent} == sent
    assert set(first) == {"images", *sent}
    assert [image.tobytes() for image in first["images"] + second["images"]] == [image.tobytes() for image in images]
    assert restricted["count"] == columns["count"] and restricted["completions"] is None
    assert set(restricted) == {"prompts", "completions", "images", "count"}


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"reference": some_images(2)}, TypeError, "reference can't be sent as JSON.*columns="),
        ({"weight": [1.0, float("nan")]}, TypeError, "weight can't be sent as JSON"),
        ({"count": np.arange(2)}, TypeError, "count can't be sent as JSON.*int64"),
        ({"target": ["a"]}, ValueError, "target has 1 values for 2 images"),
    ],
)
def test_columns_that_cannot_be_sent(url, columns, error, message):
    with pytest.raises(error, match=message):
        score(RemoteReward(url, "redness"), some_images(2), **columns)
    reward = RemoteReward(url, "redness", columns=[])
    assert score(reward, some_images(2), **columns) == redness(None, None, some_images(2))


def test_column_that_is_missing(url):
    with pytest.raises(ValueError, match="redness reads the column 'target', which the dataset does not have"):
        score(RemoteReward(url, "redness", columns=["target"]), some_images(2), other=[1, 2])


def test_images_of_a_wrong_kind_or_number(url):
    with pytest.raises(TypeError, match="type ndarray, expected a PIL image"):
        score(RemoteReward(url, "redness"), [np.zeros((8, 8, 3))])
    with pytest.raises(ValueError, match="Got 1 images for 2 prompts"):
        asyncio.run(RemoteReward(url, "redness")(prompts=["a", "b"], images=some_images(1)))


# Requests at once


def test_concurrency_of_the_client_and_turns_on_the_server():
    inside, most, meeting = {"together": 0, "in_turn": 0}, {}, asyncio.Barrier(3)

    def enter(name):
        inside[name] += 1
        most[name] = max(most.get(name, 0), inside[name])

    async def together(images, **columns):
        enter("together")
        await asyncio.wait_for(meeting.wait(), 10)  # ends when three are here
        inside["together"] -= 1
        return [0.0] * len(images)

    def in_turn(images, **columns):
        enter("in_turn")
        time.sleep(0.02)
        inside["in_turn"] -= 1
        return [0.0] * len(images)

    with serving(together, in_turn) as address:
        for name in inside:
            assert score(RemoteReward(address, name, batch_size=1, concurrency=3), some_images(9)) == [0.0] * 9
    assert most == {"together": 3, "in_turn": 1}


def test_request_whose_caller_gave_up_is_not_scored():
    scored, release = [], threading.Event()

    def patient(prompts, images, **columns):
        scored.extend(prompts)
        release.wait(10)
        return [0.0] * len(images)

    with serving(patient) as address:
        # The second request waits for the first, until both have waited too long.
        reward = RemoteReward(address, "patient", batch_size=1, timeout=0.5, max_retries=0)
        assert score(reward, some_images(2)) == [None, None]
        release.set()
        assert score(RemoteReward(address, "patient"), some_images(3)) == [0.0] * 3
    assert len(scored) == 1 + 3


# Failures


def test_failed_request_costs_the_scores_of_its_own_images_alone(caplog):
    def moody(prompts, images, **columns):
        if "prompt 3" in prompts:
            raise RuntimeError("not this one")
        return redness(prompts, None, images)

    images = some_images(6)
    with serving(moody) as address:
        metrics = {}
        reward = RemoteReward(address, "moody", batch_size=2, max_retries=1)
        scores = score(reward, images, log_metric=metrics.__setitem__)
    local = redness(None, None, images)
    assert scores == [*local[:2], None, None, *local[4:]]
    assert metrics == {"moody/failed": 2 / 6}
    (record,) = [record for record in caplog.records if record.name == remote.__name__]
    assert "moody: 1 of 3 requests failed" in record.message
    assert "answered 500: moody raised RuntimeError: not this one" in record.message


def test_dead_reward_stops_the_run_and_says_why():
    def broken(images, **columns):
        raise RuntimeError("no weights")

    with serving(broken) as address:
        reward = RemoteReward(address, "broken", max_retries=0, max_dead_batches=3)
        assert score(reward, some_images(2)) == score(reward, some_images(2)) == [None, None]
        with pytest.raises(DeadRewardError, match="broken scored no image in 3 batches.*RuntimeError: no weights"):
            score(reward, some_images(2))


def test_wrong_name_names_the_right_ones(url, caplog):
    assert score(RemoteReward(url, "blueness"), some_images(1)) == [None]
    assert "404: No reward 'blueness' here, only: redness, calm, patchy." in caplog.text


@pytest.mark.parametrize("answer", [(429, ""), (500, ""), (503, "busy"), None])
def test_what_may_heal_is_asked_again(answer):
    with scripted(answer, answer, (200, '{"scores": [0.25]}')) as (address, requests):
        assert score(RemoteReward(address, "far/off"), some_images(1)) == [0.25]
    assert requests == ["/score/far%2Foff"] * 3


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_what_cannot_heal_is_asked_once(status):
    with scripted((status, '{"error": "no"}')) as (address, requests):
        assert score(RemoteReward(address, "far"), some_images(1)) == [None]
    assert len(requests) == 1


@pytest.mark.parametrize("max_retries", [0, 2])
def test_retries_end(max_retries):
    with scripted((503, "")) as (address, requests):
        assert score(RemoteReward(address, "far", max_retries=max_retries), some_images(1)) == [None]
    assert len(requests) == max_retries + 1


def test_pauses_double_and_the_server_may_ask_for_more(monkeypatch):
    pauses, sleep = [], asyncio.sleep

    async def record(seconds):
        if threading.current_thread() is not threading.main_thread():
            return await sleep(seconds)  # of a server
        pauses.append(seconds)

    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.5)
    monkeypatch.setattr(remote.asyncio, "sleep", record)
    answers = [(503, "")] * 3 + [(429, "", {"retry-after": "30"}), (429, "", {"retry-after": "1e9"})]
    answers += [(429, "", {"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}), (200, '{"scores": [1]}')]
    with scripted(*answers) as (address, _):
        assert score(RemoteReward(address, "far", max_retries=6), some_images(1)) == [1.0]
    expected = [0.5, 1.0, 2.0, 30.0, 60.0, 16.0]
    assert [pause == pytest.approx(wait, rel=0.25) for pause, wait in zip(pauses, expected, strict=True)] == [True] * 6
    assert pauses[3:5] == [30.0, 60.0]


def test_random_numbers_of_the_run_stay_where_they_were():
    random.seed(0)
    before = random.getstate()
    with scripted((503, ""), (200, '{"scores": [1]}')) as (address, _):
        score(RemoteReward(address, "far"), some_images(1))
    assert random.getstate() == before


@pytest.mark.parametrize(
    "body",
    [
        "",
        "<html>Welcome</html>",
        "[0.5, 0.5]",
        '"scores"',
        '{"score": [0.5, 0.5]}',
        '{"error": "upstream is gone", "scores": [0.5, 0.5]}',
        '{"scores": 0.5}',
        '{"scores": [0.5]}',
        '{"scores": [0.5, 0.5, 0.5]}',
        '{"scores": ["0.5", "1"]}',
        '{"scores": [true, false]}',
        '{"scores": {"0": 1, "1": 2}}',
        '{"scores": [1' + "0" * 400 + ", 1]}",
        "[" * 100_000,
    ],
)
def test_garbage_is_no_score(body, caplog):
    with scripted((200, body)) as (address, requests):
        assert score(RemoteReward(address, "far"), some_images(2)) == [None, None]
    assert len(requests) == 1
    assert "expected 2 scores" in caplog.text or len(body) > 400  # those break the reading of JSON or numbers
    assert len(caplog.text) < 1000


def test_nan_in_an_answer_is_no_score():
    with scripted((200, '{"scores": [NaN, 0.5, null, -Infinity, 2]}')) as (address, _):
        assert score(RemoteReward(address, "far"), some_images(5)) == [None, 0.5, None, None, 2.0]


def test_server_killed_and_started_again():
    images = some_images(4)
    with serving_process(f"{SERVED}:redness") as (process, address):
        reward = RemoteReward(address, max_retries=0, batch_size=2)
        assert score(reward, images) == redness(None, None, images)
        process.kill()
        process.wait()
        assert score(reward, images) == [None] * 4
    with serving_process(f"{SERVED}:redness", port=int(address.rsplit(":")[-1])):
        assert score(reward, images) == redness(None, None, images)


def test_sigterm_finishes_what_is_running():
    with serving_process(f"{SERVED}:slow") as (process, address):
        reward = RemoteReward(address, max_retries=0)
        answers = []
        thread = threading.Thread(target=lambda: answers.append(score(reward, some_images(2))))
        thread.start()
        assert process.stdout.readline() == "scoring\n"
        process.send_signal(signal.SIGTERM)
        thread.join(20)
        assert process.wait(20) in (0, -signal.SIGTERM)
    assert answers == [[1.0, 1.0]]


# Tokens


def test_token(monkeypatch, caplog):
    with serving(redness, token=TOKEN) as address:
        monkeypatch.setenv("MY_REWARDS", TOKEN)
        reward = RemoteReward(address, token_env="MY_REWARDS", check=True)
        assert score(reward, some_images(2)) == redness(None, None, some_images(2))
        assert TOKEN not in str(vars(reward)) and TOKEN.encode() not in pickle.dumps(reward)

        assert score(RemoteReward(address, "redness"), some_images(2)) == [None, None]
        assert "answered 401: Wrong or missing token." in caplog.text
        with pytest.raises(PermissionError, match="wants a token: pass token_env"):
            RemoteReward(address)

        wrong = "another-token-altogether"
        monkeypatch.setenv("MY_REWARDS", wrong)
        assert score(RemoteReward(address, "redness", token_env="MY_REWARDS"), some_images(2)) == [None, None]
        with pytest.raises(PermissionError, match="it is not the one in MY_REWARDS"):
            RemoteReward(address, token_env="MY_REWARDS", check=True)
    assert TOKEN not in caplog.text and wrong not in caplog.text


@pytest.mark.parametrize(
    "value", [None, "", "short", "with a space inside", "with-a-line-break\n", "not-ascii-ßßßßßßß"]
)
def test_token_that_can_not_be_one(monkeypatch, value):
    monkeypatch.delenv("MY_REWARDS", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_REWARDS", value)
    with pytest.raises(ValueError, match="variable MY_REWARDS should hold a token of at least 16") as caught:
        RemoteReward("http://127.0.0.1:1", "far", token_env="MY_REWARDS")
    assert not value or value not in str(caught.value)


def test_token_that_a_server_sends_back_is_not_shown(monkeypatch, caplog):
    monkeypatch.setenv("MY_REWARDS", TOKEN)
    with scripted((403, f"You sent Bearer {TOKEN}")) as (address, _):
        reward = RemoteReward(address, "far", token_env="MY_REWARDS", max_dead_batches=1)
        with pytest.raises(DeadRewardError, match="answered 403: You sent Bearer") as caught:
            score(reward, some_images(1))
    assert TOKEN not in str(caught.value) and TOKEN not in caplog.text


# The constructor


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"concurrency": 0}, "concurrency=0: expected at least 1"),
        ({"max_retries": -1}, "max_retries=-1: expected at least 0"),
        ({"timeout": 0}, "timeout=0: expected a positive"),
        ({"max_dead_batches": 0}, "max_dead_batches=0"),
        ({"url": "127.0.0.1:8000"}, "url='127.0.0.1:8000': expected an address such as"),
        ({"url": "http://host:8000?a=b"}, "expected an address such as"),
        ({"url": "http://host:port"}, "url is no address"),
    ],
)
def test_arguments_that_can_not_be_right(arguments, message):
    with pytest.raises(ValueError, match=message):
        RemoteReward(**{"url": "http://127.0.0.1:8000", "name": "far", **arguments})


def test_password_in_the_address_is_refused_and_not_shown():
    with pytest.raises(ValueError, match="pass the token by token_env") as caught:
        RemoteReward("http://me:pass-word@host:8000", "far")
    assert "pass-word" not in str(caught.value)


def test_checks_at_construction(url):
    assert RemoteReward(url, "calm", check=True).__name__ == "calm"
    with pytest.raises(ValueError, match="name='calmness': .* serves redness, calm, patchy"):
        RemoteReward(url, "calmness", check=True)
    with pytest.raises(ValueError, match="name=None: .* serves redness, calm, patchy"):
        RemoteReward(url)
    nobody = "http://127.0.0.1:9"
    assert RemoteReward(nobody, "far").__name__ == "far"  # nobody was asked
    with pytest.raises(ConnectionError, match="No reward server answers at http://127.0.0.1:9 .*serve-rewards"):
        RemoteReward(nobody, "far", check=True)
    with scripted() as (address, _), pytest.raises(ConnectionError, match="answers 501 and 501, but not as a reward"):
        RemoteReward(address, "far", check=True)


def test_greeting_that_never_ends_is_ended_by_the_whole_time(monkeypatch):
    monkeypatch.setattr(remote, "CHECK_SECONDS", 0.3)
    with endless_server() as address:
        for wait in (lambda: RemoteReward(address), lambda: RemoteReward(address, "far", check=True)):
            with pytest.raises(ConnectionError, match="did not answer within 0.3 s"):
                wait()

        async def in_a_loop():
            return RemoteReward(address)

        with pytest.raises(ConnectionError, match="did not answer within 0.3 s"):
            asyncio.run(in_a_loop())
        assert score(RemoteReward(address, "far", timeout=0.3, max_retries=0), some_images(1)) == [None]


def test_proxy_that_leads_nowhere_is_named(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://me:secret-word@127.0.0.1:9")
    monkeypatch.delenv("http_proxy", raising=False)
    with pytest.raises(ConnectionError, match="through the proxy in HTTP_PROXY") as caught:
        RemoteReward("http://gpu-node.example:8000")
    assert "secret-word" not in str(caught.value)


def test_proxy_of_the_environment_is_not_for_this_machine(url, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert score(RemoteReward(url, "redness", check=True, max_retries=0), some_images(1)) == redness(
        None, None, some_images(1)
    )


def test_importing_rewards_loads_no_package_of_theirs():
    packages = ("PIL", "httpx2", "pydantic", "starlette", "torch", "uvicorn")
    code = f"import trl_unigrpo.rewards, json, sys; print(json.dumps([m for m in {packages} if m in sys.modules]))"
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) == []
