"""The reader behind an endpoint, against a server that computes its prompt's log-probs with a random LLaVA."""

import asyncio
import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.judge_server import ChatServer, Reply, chat, images_of
from tests.helpers.tiny_llava import IMAGE_SIZE, tiny_llava
from trl_unigrpo.rewards import EndpointReader, LocalReader, ReadBackReward
from trl_unigrpo.rewards.judge.answers import NoAnswer
from trl_unigrpo.rewards.readback.endpoint_reader import to_reading
from trl_unigrpo.rewards.readback.reading import cut, spelled


def some_image(seed=0, size=(IMAGE_SIZE, IMAGE_SIZE)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PROMPTS = ["a red cat", "the blue dog is there", "a picture", "dog"]
IMAGES = [some_image(0), some_image(1, (60, 40)), some_image(2, (20, 70)), some_image(3)]


class VLLM:
    """
    Answers as `vllm serve` does: with the log-prob of each token of the prompt that is asked for, by the model.

    Args:
        context: most tokens that it takes.
    """

    def __init__(self, model, processor, context=1000):
        self.model, self.processor, self.context = model, processor, context

    def __call__(self, body, attempt):
        messages = copy.deepcopy(body["messages"])
        (user,) = [message for message in messages if message["role"] == "user"]
        (image,) = images_of({"messages": [user]})
        user["content"][0] = {"type": "image", "image": image}
        for message in messages:
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
        inputs = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=body.get("add_generation_prompt", True),
            continue_final_message=body.get("continue_final_message", False),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.dtype)
        ids = inputs["input_ids"][0]
        if len(ids) >= self.context:
            error = f"This model's maximum context length is {self.context} tokens, your request has {len(ids)}."
            return Reply({"error": {"message": error, "code": 400}}, 400)
        with torch.no_grad():
            log_probs = self.model(**inputs).logits[0].log_softmax(-1)
        rows = [None]
        for place, token in enumerate(ids.tolist()[1:]):
            word = self.processor.tokenizer.decode([token])
            told = {"logprob": log_probs[place, token].item(), "rank": 1, "decoded_token": word}
            rows.append({str(token): told})
        asked = body.get("prompt_logprobs") is not None
        return Reply({**chat("yes"), "prompt_logprobs": rows if asked else None})


def reading(url, **settings):
    return EndpointReader("m", url, **{"image_format": "png", "max_side": None, "max_retries": 0, **settings})


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize("settings", [{}, {"instruction": "is there a dog ?", "system_prompt": "answer"}])
def test_readings_are_those_of_the_model_in_this_process(merges, settings):
    model, processor = tiny_llava(merges=merges)
    with ChatServer(VLLM(model, processor)) as server:
        found = reading(server.url, **settings).read(IMAGES, PROMPTS)
    expected = LocalReader(model, processor, device="cpu", **settings).read(IMAGES, PROMPTS)
    for row, other in zip(found, expected, strict=True):
        assert row.tokens == other.tokens
        assert row.log_probs == pytest.approx(other.log_probs, abs=1e-9)
    assert len({row.score for row in found}) == 4
    (_, body) = server.requests[0]
    assert (body["max_tokens"], body["temperature"], body["model"]) == (1, 0, "m")


def test_prompts_that_can_not_be_read_are_no_scores(llava):
    """16 tokens of an image, 5 of the template, and vLLM wants room for one more."""
    with ChatServer(VLLM(*llava, context=16 + 5 + 5)) as server:
        reward = ReadBackReward(reading(server.url))
        scores = reward([*PROMPTS[:3], " "], images=IMAGES)
    assert [score is None for score in scores] == [False, True, False, True]
    assert "maximum context length is 26 tokens" in reward.last_error
    assert len(server.requests) == 3


def test_options_reach_the_endpoint(llava):
    options = {"max_tokens": None, "max_completion_tokens": 1, "extra_body": {"priority": 3}}
    with ChatServer(VLLM(*llava)) as server:
        assert reading(server.url, options=options).read(IMAGES[:1], PROMPTS[:1])[0] is not None
    (_, body) = server.requests[0]
    assert "max_tokens" not in body and body["max_completion_tokens"] == 1
    assert (body["priority"], body["prompt_logprobs"], body["continue_final_message"]) == (3, 0, True)


def test_it_can_be_asked_where_a_loop_runs(llava):
    async def ask(reader):
        return reader.read(IMAGES[:1], PROMPTS[:1])

    with ChatServer(VLLM(*llava)) as server:
        assert asyncio.run(ask(reading(server.url)))[0].tokens == ["a", " red", " cat"]


# Endpoints that don't do it


def test_endpoint_without_prompt_log_probs_is_told_with_a_remedy():
    with ChatServer(lambda body, attempt: Reply(chat("yes"))) as server:
        reward = ReadBackReward(reading(server.url))
        assert reward(PROMPTS, images=IMAGES) == [None] * 4
    assert "The endpoint gives no log-probs of its prompt. vLLM does (`vllm serve MODEL`)" in reward.last_error


def test_server_that_closes_the_last_message(llava):
    def closing(body, attempt):
        body["messages"].append({"role": "user", "content": body["messages"][0]["content"]})
        body["messages"][0] = {"role": "user", "content": "is there a dog ?"}
        return whole(body, attempt)

    whole = VLLM(*llava)
    with ChatServer(lambda body, attempt: whole({**body, "continue_final_message": False}, attempt)) as server:
        found = reading(server.url, options={"extra_body": {"add_generation_prompt": True}})
        assert found.read(IMAGES[:1], PROMPTS[:1]) == [None]
    assert "does not end with 'a red cat', but with" in found.last_error
    assert "`continue_final_message`" in found.last_error


def test_failing_server_is_asked_again_and_keys_stay_out_of_the_reason(llava, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "very-secret")
    whole = VLLM(*llava)

    def busy(body, attempt):
        return whole(body, attempt) if attempt else Reply({"error": "busy very-secret"}, 503, {"retry-after-ms": "1"})

    with ChatServer(busy) as server:
        assert reading(server.url, max_retries=1).read(IMAGES[:1], PROMPTS[:1])[0] is not None
        broken = reading(server.url)
        assert broken.read(IMAGES[1:2], PROMPTS[1:2]) == [None]
    assert "503" in broken.last_error and "very-secret" not in broken.last_error


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (None, "gives no log-probs of its prompt"),
        ([None], "gives no log-probs of its prompt"),
        ([None, {}, None], "gives no log-probs of its prompt"),
        ([None, {"5": 0.5}], "not in vLLM's form"),
        ([None, {"5": {"logprob": None, "decoded_token": "dog"}}], "not in vLLM's form"),
        ([None, {"5": {"logprob": -9999.0, "decoded_token": "dog"}}], "from -9999.0 to -9999.0"),
        ([None, {"5": {"logprob": math.nan, "decoded_token": "dog"}}], "from nan to nan"),
        ([None, {"5": {"logprob": 0.5, "decoded_token": "dog"}}], "from 0.5 to 0.5"),
        ([None, {"5": {"logprob": -1.0, "decoded_token": "cat"}}], "does not end with 'dog', but with 'cat'"),
    ],
)
def test_answers_that_are_none(rows, reason):
    with pytest.raises(NoAnswer, match=reason):
        to_reading({**chat("yes"), "prompt_logprobs": rows}, "dog")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": ""}, "model is empty"),
        ({"image_format": "gif"}, "image_format='gif': expected 'jpeg' or 'png'"),
        ({"concurrency": 0}, "concurrency=0: expected at least 1"),
        ({"timeout": 0}, "timeout=0: expected seconds above 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        EndpointReader(**{"model": "m", "base_url": "http://localhost:8000/v1", **arguments})


# Which tokens are the prompt's: decoded one by one, as vLLM gives them


BROKEN = "\ufffd"


@pytest.mark.parametrize(
    ("text", "tokens", "first", "pieces"),
    [
        ("a red cat", ["user", ":", "a", " red", " cat"], 2, ["a", " red", " cat"]),
        ("a red cat", ["user", ":", "a", "red", "cat"], 2, ["a", " red", " cat"]),  # SentencePiece drops the space
        ("a red cat", ["user", ":a", " red", " cat"], 1, ["a", " red", " cat"]),  # merged with the template
        ("a a", ["a", "a", "\n", "a", " a"], 3, ["a", " a"]),
        ("one\n\ntwo", ["\n", "one", "\n", "\n", "two"], 1, ["one", "", "", "\n\ntwo"]),
        ("a 日 b", [":", "a", " " + BROKEN, BROKEN, " b"], 1, ["a", "", "", " 日 b"]),  # each a part of its bytes
        ("日b", [":", BROKEN, BROKEN, "b"], 1, ["", "", "日b"]),
        ("b日", [":", "b", BROKEN, BROKEN, BROKEN], 1, ["b", "", "", "日"]),
        ("b日本", [":", "b", "", "日", "", "", "本"], 1, ["b", "", "日", "", "", "本"]),  # vLLM's newer form
        ("日", ["\n", "", "", "日"], 1, ["", "", "日"]),
        ("cat", [":", "dog"], None, None),
        ("a cat", ["cat"], None, None),
    ],
)
def test_tokens_that_spell_a_prompt(text, tokens, first, pieces):
    assert spelled(text, tokens) == first
    if first is not None:
        assert cut(text, tokens[first:]) == pieces


def test_prompts_of_characters_in_pieces_are_found_at_once():
    """As many ways to cut it as there are, each token is looked at once."""
    text = "👨‍👩‍👧‍👦" * 40
    assert spelled(text, [":", *[BROKEN] * len(text.encode())]) == 1
