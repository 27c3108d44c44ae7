"""The reward server: what it refuses, what it says about it, and that it lives on."""

import base64
import functools
import io
import json
import logging
import select
import socket
import struct
import subprocess
import sys
import zlib

import httpx2
import pytest
from typer.testing import CliRunner

from tests.helpers.paths import ROOT
from tests.helpers.served_rewards import alone, redness, short
from tests.helpers.serving import SERVED, TOKEN, score, serving, some_images
from trl_unigrpo import __version__
from trl_unigrpo.cli import app
from trl_unigrpo.rewards import RemoteReward
from trl_unigrpo.rewards.remote.server import (
    Limits,
    is_async,
    load_reward,
    load_rewards,
    reward_name,
    serve,
)
from trl_unigrpo.rewards.remote.wire import safe_text, to_png


LIMITS = Limits(max_images=4, max_body=100_000, max_pixels=64 * 64)


@pytest.fixture(scope="module")
def url():
    with serving(redness, short, alone, limits=LIMITS) as address:
        yield address


def encoded(image):
    return base64.b64encode(to_png(image)).decode()


def request(number=1, **changes):
    images = [encoded(image) for image in some_images(number)]
    return {"prompts": ["a"] * number, "images": images, **changes}


def post(url, content, name="redness", **arguments):
    content = json.dumps(content) if isinstance(content, dict) else content
    return httpx2.post(f"{url}/score/{name}", content=content, trust_env=False, timeout=20, **arguments)


def lives(url):
    return post(url, request()).json() == {"scores": redness(None, None, some_images(1))}


def bare_png(width, height):
    """The header of a PNG and nothing of its pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def as_jpeg(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def test_health_and_names(url):
    assert httpx2.get(f"{url}/health", trust_env=False).json() == {"status": "ok", "version": __version__}
    assert httpx2.get(f"{url}/rewards", trust_env=False).json() == {"rewards": ["redness", "short", "alone"]}
    assert httpx2.get(f"{url}/else", trust_env=False).status_code == 404
    assert httpx2.get(f"{url}/score/redness", trust_env=False).status_code == 405


def test_wrong_name(url):
    answer = post(url, request(), name="blueness")
    assert answer.status_code == 404
    assert answer.json() == {"error": "No reward 'blueness' here, only: redness, short, alone."}


# More than it takes


def test_too_many_images(url):
    assert post(url, request(4)).status_code == 200
    answer = post(url, request(5))
    assert answer.status_code == 413
    assert answer.json() == {"error": "5 images, expected at most 4. Lower batch_size."}


@pytest.mark.parametrize("times", [1, 1.5, 10])
@pytest.mark.parametrize("chunked", [False, True])
def test_too_large_a_request(url, times, chunked):
    """Whole where the sender is close to the limit; far beyond it, the server may hang up on who is still sending."""
    body = b" " * int(LIMITS.max_body * times + 1)
    content = (body[i : i + 1000] for i in range(0, len(body), 1000)) if chunked else body
    try:
        answer = post(url, content)
    except httpx2.TransportError:
        assert times == 10
    else:
        assert answer.status_code == 413
        assert answer.json() == {"error": "The request is longer than 100000 bytes. Lower batch_size."}
    assert lives(url)


def send_slowly(url, size):
    """Bytes of a body that were sent before the server answered, and the first line of its answer."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(f"POST /score/redness HTTP/1.1\r\nHost: {host}\r\nContent-Length: {size}\r\n\r\n".encode())
        sent = 0
        while sent < size and not select.select([connection], [], [], 0.02)[0]:
            sent += connection.send(b" " * min(10_000, size - sent))
        return sent, connection.recv(1000).split(b"\r\n")[0]


@pytest.mark.parametrize(("size", "token", "status"), [(150_000, None, 413), (90_000, TOKEN, 401)])
def test_sender_of_a_refused_request_may_finish(size, token, status):
    """One that is cut off in the middle sees a broken connection, and tries again what can't heal."""
    with serving(redness, token=token, limits=LIMITS) as address:
        sent, answer = send_slowly(address, size)
    assert sent == size
    assert f" {status} ".encode() in answer


def test_sender_without_an_end_is_cut_off(url):
    sent, answer = send_slowly(url, 10 * LIMITS.max_body)
    assert 2 * LIMITS.max_body < sent < 10 * LIMITS.max_body
    assert b" 413 " in answer


def test_request_of_exactly_the_limit(url):
    text = json.dumps(request())
    assert post(url, text + " " * (LIMITS.max_body - len(text))).status_code == 200


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((64, 65), "images[0] is 64 x 65 pixels, expected at most 4096 of them."),
        ((9000, 9000), "images[0] is 9000 x 9000 pixels, expected at most 4096 of them."),
        ((2**31 - 1, 2**31 - 1), "images[0] has far more pixels than the 4096 allowed."),
    ],
)
def test_too_many_pixels_are_refused_by_the_header(url, size, message):
    """There is nothing to decode in these: decoding first would find them broken instead."""
    answer = post(url, request(images=[base64.b64encode(bare_png(*size)).decode()]))
    assert (answer.status_code, answer.json()["error"]) == (413, message)
    assert lives(url)


def test_image_of_exactly_the_limit(url):
    assert post(url, request(images=[encoded(some_images(1, 64)[0])])).status_code == 200


def test_client_gets_no_scores_for_what_is_too_much(url, caplog):
    assert score(RemoteReward(url, "redness", batch_size=5), some_images(5)) == [None] * 5
    assert "413: 5 images, expected at most 4. Lower batch_size." in caplog.text
    caplog.clear()
    assert score(RemoteReward(url, "redness"), some_images(1, 65)) == [None]
    assert "413: images[0] is 65 x 65 pixels" in caplog.text
    assert score(RemoteReward(url, "redness", batch_size=4), some_images(5)) == redness(None, None, some_images(5))


@pytest.mark.parametrize("name", ["max_images", "max_body", "max_pixels"])
def test_limits_are_positive(name):
    with pytest.raises(ValueError, match=f"{name}=0: expected at least 1"):
        Limits(**{name: 0})


# What it can't read


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "body: Invalid JSON"),
        ('{"prompts": [', "body: Invalid JSON"),
        ("[1]", "body: Input should be an object"),
        ({"prompts": ["a"]}, "images: Field required"),
        (request(prompts="a"), "prompts: Input should be a valid array"),
        (request(target=["a"]), "target: Extra inputs"),
        (request(columns={"target": "a"}), "columns.target: Input should be a valid array"),
        (request(prompts=["a", "b"]), "prompts has 2 values for 1 images"),
        (request(completions=[]), "completions has 0 values for 1 images"),
        (request(columns={"target": []}), "target has 0 values for 1 images"),
        (request(images=["*" * 40]), "images[0] is no base64."),
        (request(images=[""]), "images[0] is no readable PNG."),
        (request(images=[encoded(some_images(1)[0])[:120]]), "images[0] is no readable PNG."),
        (request(images=[base64.b64encode(bare_png(8, 8)).decode()]), "images[0] is no readable PNG."),
        (request(images=[base64.b64encode(as_jpeg(some_images(1)[0])).decode()]), "images[0] is no readable PNG."),
    ],
)
def test_malformed_requests(url, content, message):
    answer = post(url, content)
    assert answer.status_code == 422
    assert message in answer.json()["error"]
    assert len(answer.text) < 200  # and nothing of the image
    assert lives(url)


# Tokens


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"bearer  {TOKEN}"]
)
def test_everything_but_health_wants_the_token(header):
    headers = {} if header is None else {"Authorization": header}
    with serving(redness, token=TOKEN) as address:
        for answer in (
            post(address, request(), headers=headers),
            post(address, request(), name="blueness", headers=headers),
            post(address, "not even JSON", headers=headers),
            post(address, b" " * 3_000_000, headers=headers),
            httpx2.get(f"{address}/rewards", headers=headers, trust_env=False),
        ):
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert answer.json() == {"error": "Wrong or missing token."}
        assert httpx2.get(f"{address}/health", trust_env=False).status_code == 200
        assert post(address, request(), headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "gpu-node"])
def test_other_machines_need_a_token(host):
    with pytest.raises(ValueError, match=f"host='{host}' lets other machines call.*--token-env"):
        serve([f"{SERVED}:redness"], host=host)


# Rewards that fail


def test_reward_that_raises_shows_neither_keys_nor_images(monkeypatch, caplog):
    monkeypatch.setenv("SOME_API_KEY", "sk-0123456789")

    def broken(images, **columns):
        raise RuntimeError(f"with sk-0123456789 and {TOKEN}: {encoded(images[0])} {to_png(images[0])!r}")

    image = some_images(1, 32)[0]
    with serving(broken, token=TOKEN) as address:
        content = request(images=[encoded(image)])
        with caplog.at_level(logging.DEBUG):
            answer = post(address, content, name="broken", headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert error.startswith("broken raised RuntimeError: with *** and ***: [data]")
    assert "Traceback" not in error and ".py" not in error
    # The log tells the place, for whoever mends it.
    assert "Traceback" in caplog.text and "in broken" in caplog.text
    for text in (error, caplog.text):
        assert "sk-0123456789" not in text and TOKEN not in text
        assert encoded(image)[50:100] not in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "ValueError: returned 1 scores for 2 images, expected one per image."),
        ("alone", "TypeError: returned a float, expected a list with a number, or None, per image."),
    ],
)
def test_rewards_that_return_something_else(url, name, message):
    answer = post(url, request(2), name=name)
    assert (answer.status_code, answer.json()["error"]) == (500, f"{name} raised {message}")


def test_safe_text(monkeypatch):
    monkeypatch.setenv("DB_PASSWORD", "hunter22")
    monkeypatch.setenv("SHORT_TOKEN", "false")
    text = "hunter22 false my-token " + "x" * 199 + " " + "y" * 200
    assert safe_text(text, "my-token", limit=1000) == "*** false *** " + "x" * 199 + " [data]"
    assert safe_text("a b " * 100, limit=8) == "a b a b  ..."


# What is served


@pytest.mark.parametrize(
    ("path", "name", "asynchronous"),
    [
        (f"{SERVED}:redness", "redness", False),
        (f"{SERVED}:calm", "calm", True),
        (f"{SERVED}:ByClass", "ByClass", False),
        (f"{SERVED}:by_instance", "NeedsArguments", False),
        (f"{SERVED}:AsyncObject", "named", True),
        (f"{SERVED}:awaited", "named", True),
        (f"{SERVED}:awaited.__call__", "__call__", True),
        ("trl_unigrpo.shapeworld:shapeworld_reward", "shapeworld_reward", False),
    ],
)
def test_what_can_be_served(path, name, asynchronous):
    reward = load_reward(path)
    for form in (reward, functools.partial(reward, target=1)):
        assert (reward_name(form), is_async(form)) == (name, asynchronous)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([SERVED], f"'{SERVED}' names no reward. Write it as module:NAME"),
        ([f"{SERVED}:"], "names no reward"),
        (["no_such_module:reward"], "can't be imported .No module named 'no_such_module'"),
        ([f"{SERVED}:blueness"], "can't be imported .*has no attribute 'blueness'"),
        ([f"{SERVED}:number"], f"'{SERVED}:number' is a int, expected a function or a callable"),
        ([f"{SERVED}:np"], "is a module, expected"),
        ([f"{SERVED}:NeedsArguments"], "a class that can't be made without arguments .*'size'"),
        ([f"{SERVED}:text_only"], "can't be called as a reward .*unexpected keyword argument 'prompts'"),
        ([f"{SERVED}:redness", f"{SERVED}:redness"], "is called 'redness', as another reward is"),
        ([], "No reward to serve"),
    ],
)
def test_what_can_not_be_served(paths, message):
    with pytest.raises(ValueError, match=message):
        load_rewards(paths)


def test_command_line_says_what_is_wrong(monkeypatch):
    monkeypatch.delenv("REWARDS_TOKEN", raising=False)
    for arguments, message in (
        ([f"{SERVED}:number"], "is a int, expected a function"),
        ([f"{SERVED}:redness", "--host", "0.0.0.0"], "host='0.0.0.0' lets other machines"),
        ([f"{SERVED}:redness", "--token-env", "REWARDS_TOKEN"], "variable REWARDS_TOKEN should hold a token"),
    ):
        result = CliRunner().invoke(app, ["serve-rewards", *arguments])
        assert result.exit_code == 1
        assert result.output.startswith("trl-unigrpo serve-rewards: ") and message in result.output


def test_command_line_without_the_extra():
    code = "import sys; sys.modules['uvicorn'] = None; from trl_unigrpo.cli import app; app()"
    result = subprocess.run(
        [sys.executable, "-c", code, "serve-rewards", f"{SERVED}:redness"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "Serving rewards needs uvicorn: pip install 'trl-unigrpo[serve]'" in result.stderr
