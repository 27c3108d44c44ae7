"""Prompts to questions: the client against a server on this machine, and the file that grows line by line."""

import asyncio
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from datasets import load_dataset
from typer.testing import CliRunner

from tests.helpers.judge_server import endless_server
from trl_unigrpo.cli import app
from trl_unigrpo.cli.prompt_files import read_rows
from trl_unigrpo.rewards.questions.decompose import (
    decompose_rows,
    failures_file,
    prompt_hash,
)
from trl_unigrpo.rewards.questions.llm_decomposer import DecompositionError, LLMDecomposer
from trl_unigrpo.rewards.questions.question import Question, read_questions


def item(text, group="semantic", parents=(), expected="yes"):
    return {"text": text, "expected": expected, "group": group, "parents": list(parents)}


GOOD = {
    "questions": [item("Is there a cat?"), item("Is it black?", parents=[0]), item("Is it sharp?", "quality", [0, 1])]
}


class Endpoint:
    """
    Speaks the chat protocol on a port of its own.

    `answers` maps a word of the prompt to what is said, the last one again and again: a dictionary or text as the
    model's message, a number as an HTTP status, bytes as the whole body. Prompts without such a word get `GOOD`.
    """

    def __init__(self):
        endpoint = self
        self.answers, self.requests, self.busy, self.busiest = {}, [], 0, 0
        self.lock, self.gate = threading.Lock(), None

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with endpoint.lock:
                    endpoint.requests.append((self.path, self.headers.get("authorization"), request))
                    endpoint.busy += 1
                    endpoint.busiest = max(endpoint.busiest, endpoint.busy)
                    answer = endpoint.answer(json.loads(request["messages"][-1]["content"]))
                if endpoint.gate is not None:
                    endpoint.gate.wait(timeout=5)
                with endpoint.lock:
                    endpoint.busy -= 1
                status, body = endpoint.respond(answer, request)
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, prompt):
        for word, answers in self.answers.items():
            if word in prompt:
                return answers.pop(0) if len(answers) > 1 else answers[0]
        return GOOD

    @staticmethod
    def respond(answer, request):
        if isinstance(answer, bytes):
            return 200, answer
        if isinstance(answer, int):
            error = {"error": {"message": f"no, {answer}; the key was sk-secret-key", "code": answer}}
            return answer, json.dumps(error).encode()
        content = answer if isinstance(answer, str) else json.dumps(answer)
        message = {"role": "assistant", "content": content}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        body = {"id": "x", "object": "chat.completion", "created": 0, "model": request["model"], "choices": [choice]}
        return 200, json.dumps(body).encode()

    def prompts(self):
        return [json.loads(request["messages"][-1]["content"]) for _, _, request in self.requests]


@pytest.fixture
def endpoint(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


def ask(endpoint, prompt, **options):
    async def main():
        async with LLMDecomposer("m", endpoint.url, **{"max_retries": 0, **options}) as decomposer:
            return await decomposer({"prompt": prompt})

    return asyncio.run(main())


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def decompose(endpoint, rows, output, **options):
    async def main():
        async with LLMDecomposer("m", endpoint.url, max_retries=0) as decomposer:
            return await decompose_rows(rows, decomposer, output, **options)

    return asyncio.run(main())


def invoke(*arguments):
    return CliRunner().invoke(app, ["decompose", *map(str, arguments)])


# The model behind an endpoint


def test_request_and_answer(endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-key")
    conversation = [{"role": "system", "content": "x"}, {"role": "user", "content": 'a "black" cat\nIgnore this.'}]
    assert ask(endpoint, conversation) == read_questions(GOOD["questions"])
    ((path, authorization, request),) = endpoint.requests
    assert path == "/v1/chat/completions" and authorization == "Bearer sk-secret-key"
    assert request["model"] == "m" and request["messages"][1]["content"] == '"a \\"black\\" cat\\nIgnore this."'
    assert "quality" in request["messages"][0]["content"]
    schema = request["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ["questions"] and schema["additionalProperties"] is False


@pytest.mark.parametrize(
    "garbage",
    [
        "I'd rather not.",
        {"questions": []},
        {"questions": [{"text": "Is there a cat?"}]},
        {"questions": [item("Is there a cat?", "style")]},
        {"questions": [item(" "), item("Is it sharp?", "quality")]},
        {"questions": [item("Is there a cat?", parents=[7]), item("Is it sharp?", "quality")]},
        {"questions": [item("Is there a cat?", parents=[1]), item("Is it sharp?", "quality", [0])]},
        {"questions": [item("Is there a cat?")]},
        b'{"nothing": "here"}',
        b'{"choices": []}',
        b"<html>busy</html>",
    ],
    ids=["text", "none", "no keys", "group", "empty", "parent", "circle", "no quality", "body", "no choice", "html"],
)
def test_garbage_is_asked_again_and_then_refused(endpoint, garbage):
    endpoint.answers = {"cat": [garbage, GOOD], "dog": [garbage]}
    assert ask(endpoint, "a cat", attempts=2) == read_questions(GOOD["questions"])
    with pytest.raises(DecompositionError, match="no answer of 2 was of use: ") as caught:
        ask(endpoint, "a dog", attempts=2)
    if isinstance(garbage, bytes):
        assert "speak OpenAI's protocol?" in str(caught.value)
    assert endpoint.prompts() == ["a cat"] * 2 + ["a dog"] * 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"finish_reason": "error", "error": {"message": "upstream is gone"}},
            "passes on a failure: upstream is gone",
        ),
        ({"finish_reason": "error"}, "passes on a failure: finish_reason='error'"),
        ({"finish_reason": "content_filter"}, "content filter"),
        ({"finish_reason": "length"}, "length limit"),
        ({"message": {"role": "assistant", "content": None, "refusal": "I won't."}}, "refused: \"I won't"),
        ({"message": {"role": "assistant", "content": None}}, "The answer is empty"),
    ],
)
def test_questions_beside_a_failure_are_none(endpoint, changes, reason):
    _, body = Endpoint.respond(GOOD, {"model": "m"})
    whole = json.loads(body)
    whole["choices"][0] |= changes
    endpoint.answers = {"cat": [json.dumps(whole).encode()]}
    with pytest.raises(DecompositionError, match=reason):
        ask(endpoint, "a cat", attempts=1)


def test_answer_that_never_ends_is_ended_by_the_whole_time():
    async def main(url):
        async with LLMDecomposer("m", f"{url}/v1", timeout=0.3, max_retries=0) as decomposer:
            await decomposer({"prompt": "a cat"})

    with endless_server() as url, pytest.raises(DecompositionError, match="no whole answer within 0.3 s"):
        asyncio.run(main(url))


def test_endpoint_on_this_machine_is_not_asked_through_a_proxy(endpoint, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert ask(endpoint, "a cat") == read_questions(GOOD["questions"])


def test_without_quality_the_group_is_neither_asked_for_nor_needed(endpoint):
    endpoint.answers = {"cat": [{"questions": [item("Is there a cat?")]}]}
    assert ask(endpoint, "a cat", quality=False) == (Question("Is there a cat?"),)
    assert '"quality"' not in endpoint.requests[0][2]["messages"][0]["content"]


def test_failing_endpoint_is_asked_again_by_the_client(endpoint):
    endpoint.answers = {"cat": [500, 429, GOOD]}
    assert ask(endpoint, "a cat", max_retries=2, attempts=1) == read_questions(GOOD["questions"])
    endpoint.answers = {"cat": [500]}
    with pytest.raises(DecompositionError, match="InternalServerError"):
        ask(endpoint, "a cat", max_retries=1)
    assert len(endpoint.requests) == 3 + 2  # such failures don't take up `attempts`


def test_key_is_in_no_error(endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-key")
    endpoint.answers = {"cat": [401], "dog": ["sk-secret-key"]}
    for prompt, reason in (("a cat", "no, 401; the key was"), ("a dog", "no answer of 3 was of use")):
        with pytest.raises(DecompositionError, match=reason) as caught:
            ask(endpoint, prompt)
        assert "sk-secret-key" not in str(caught.value) and caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": ""}, "model is empty"),
        ({}, "There is no endpoint: pass base_url, .*OPENAI_API_KEY"),
        ({"base_url": "localhost:8000"}, "base_url='localhost:8000': expected http://"),
        ({"base_url": "http://localhost", "attempts": 0}, "attempts=0"),
        ({"base_url": "http://localhost", "timeout": 0}, "timeout=0"),
    ],
)
def test_wrong_arguments_are_refused(endpoint, arguments, message):
    with pytest.raises(ValueError, match=message):
        LLMDecomposer(**{"model": "m", **arguments})


# The file


def test_rows_keep_their_columns_and_reach_a_dataset(endpoint, tmp_path):
    output = tmp_path / "out.jsonl"
    rows = [{"prompt": f"a cat, {i}", "seed": i} for i in range(5)]
    report = decompose(endpoint, rows, output)
    assert (report.written, report.skipped, report.repeated, report.failed, report.left) == (5, 0, 0, 0, 0)
    assert not failures_file(output).exists()
    dataset = load_dataset("json", data_files=str(output), split="train", cache_dir=str(tmp_path))
    found = {row["prompt"]: row for row in dataset}
    assert set(found) == {row["prompt"] for row in rows}
    for row in rows:
        assert found[row["prompt"]]["seed"] == row["seed"]
        assert found[row["prompt"]]["prompt_hash"] == prompt_hash(row["prompt"])
        assert read_questions(found[row["prompt"]]["questions"]) == read_questions(GOOD["questions"])


def test_later_run_asks_only_what_is_missing(endpoint, tmp_path):
    output = tmp_path / "out.jsonl"
    endpoint.answers = {"dog": ["?"]}
    first = decompose(endpoint, [{"prompt": "a cat"}, {"prompt": "a dog"}], output)
    assert (first.written, first.failed) == (1, 1)
    (failure,) = lines(failures_file(output))
    assert failure["prompt"] == "a dog" and "no answer of 3 was of use" in failure["error"]
    endpoint.answers, endpoint.requests = {}, []
    rows = [{"prompt": p} for p in ("a cat", "a dog", "a fox", "a fox")]
    second = decompose(endpoint, rows, output)
    assert (second.written, second.skipped, second.repeated, second.failed) == (2, 1, 1, 0)
    assert sorted(endpoint.prompts()) == ["a dog", "a fox"]
    assert [row["prompt"] for row in lines(output)] in (["a cat", "a dog", "a fox"], ["a cat", "a fox", "a dog"])
    assert not failures_file(output).exists()


@pytest.mark.parametrize("rest", [1, 20, 60])
def test_line_that_a_run_was_killed_in_is_written_anew(endpoint, tmp_path, rest):
    output = tmp_path / "out.jsonl"
    decompose(endpoint, [{"prompt": "a cat"}, {"prompt": "a dog"}], output, concurrency=1)
    whole = output.read_bytes()
    start = whole.index(b"\n") + 1
    output.write_bytes(whole[: start + rest])
    report = decompose(endpoint, [{"prompt": "a cat"}, {"prompt": "a dog"}], output)
    assert (report.written, report.skipped) == (1, 1)
    assert output.read_bytes() == whole


@pytest.mark.parametrize(
    "text", ["a red cat", "prompt\na red cat\n", '{"prompt": "a red cat"}\n', '{"prompt_hash": 3}\n']
)
def test_file_of_something_else_stays_as_it_is(endpoint, tmp_path, text):
    output = tmp_path / "prompts.csv"
    output.write_text(text)
    with pytest.raises(ValueError, match="prompts.csv"):
        decompose(endpoint, [{"prompt": "a cat"}], output)
    assert output.read_text() == text and endpoint.requests == []


def test_lines_are_on_disk_before_the_last_answer(endpoint, tmp_path):
    output, seen = tmp_path / "out.jsonl", []
    decompose(
        endpoint,
        [{"prompt": f"a cat, {i}"} for i in range(3)],
        output,
        concurrency=1,
        on_row=lambda done, total: seen.append((done, total, len(lines(output)))),
    )
    assert seen == [(0, 3, 0), (1, 3, 1), (2, 3, 2), (3, 3, 3)]


def test_prompts_are_asked_together_but_not_more_than_allowed(endpoint, tmp_path):
    endpoint.gate = threading.Barrier(4)  # opens when four requests wait at it
    report = decompose(endpoint, [{"prompt": f"a cat, {i}"} for i in range(8)], tmp_path / "out.jsonl", concurrency=4)
    assert report.written == 8 and endpoint.busiest == 4


def test_endpoint_that_is_gone_is_given_up(endpoint, tmp_path):
    endpoint.answers = {"cat": [404]}
    rows = [{"prompt": f"a cat, {i}"} for i in range(30)]
    report = decompose(endpoint, rows, tmp_path / "out.jsonl", concurrency=1, max_failures_in_a_row=5)
    assert (report.failed, report.left, len(endpoint.requests)) == (5, 25, 5)


def test_failures_that_are_not_in_a_row_stop_nothing(endpoint, tmp_path):
    endpoint.answers = {"dog": [404]}
    rows = [{"prompt": f"a {'dog' if i % 2 else 'cat'}, {i}"} for i in range(12)]
    report = decompose(endpoint, rows, tmp_path / "out.jsonl", concurrency=1, max_failures_in_a_row=2)
    assert (report.written, report.failed, report.left) == (6, 6, 0)


def test_rows_without_a_prompt_fail_alone(endpoint, tmp_path):
    output = tmp_path / "out.jsonl"
    rows = [{"prompt": None}, {"text": "x"}, {"prompt": " "}, {"prompt": [{"role": "system", "content": "x"}]}]
    report = decompose(endpoint, [*rows, {"prompt": "a cat", "x": float("nan")}, {"prompt": "a fox"}], output)
    assert (report.written, report.failed) == (1, 5)
    failures = lines(failures_file(output))
    assert sorted(failure["row"] for failure in failures) == [1, 2, 3, 4, 5]
    reasons = " ".join(failure["error"] for failure in failures)
    for reason in (
        "the row has: prompt",
        "the row has: text",
        "The prompt is empty",
        "no message of the user",
        "not JSON compliant",
    ):
        assert reason in reasons


# The command


def test_command(endpoint, tmp_path):
    source, output = tmp_path / "prompts.csv", tmp_path / "out.jsonl"
    source.write_text("prompt,seed\na cat,1\na dog,2\n")
    endpoint.answers = {"dog": ["?"]}
    arguments = ("--input", source, "--output", output, "--model", "m", "--base-url", endpoint.url)
    result = invoke(*arguments, "--attempts", 1)
    assert result.exit_code == 1
    assert "1 decomposed, 0 there already, 0 repeated, 1 failed, 0 not tried" in result.output
    assert "out.failures.jsonl says why" in result.output
    endpoint.answers = {}
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert {row["prompt"]: row["seed"] for row in lines(output)} == {"a cat": 1, "a dog": 2}


def test_command_by_geneval_s_rule_needs_no_model(tmp_path):
    source, output = tmp_path / "metadata.jsonl", tmp_path / "out.jsonl"
    rows = [
        {"tag": "position", "include": [{"class": "cow"}, {"class": "cup", "position": ["above", 0]}], "prompt": "p"},
        {"tag": "broken", "include": [], "prompt": "q"},
    ]
    source.write_text("\n".join(map(json.dumps, rows)))
    result = invoke("--input", source, "--output", output, "--geneval")
    assert result.exit_code == 1 and "1 decomposed" in result.output
    (row,) = lines(output)
    assert row["tag"] == "position" and row["questions"][2]["text"] == "Is the cup in the image above the cow?"
    (failure,) = lines(failures_file(output))
    assert failure["row"] == 2 and "no object in 'include'" in failure["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--input", "nowhere.csv", "--model", "m"), "'nowhere.csv': no such file"),
        (("--input", "nowhere.jsonl", "--model", "m"), "nowhere.jsonl"),
        (("--input", "{prompts}"), "Pass a model that decomposes the prompts, or geneval"),
        (
            ("--input", "{prompts}", "--model", "m", "--geneval"),
            "Pass a model that decomposes the prompts, or geneval",
        ),
        (("--input", "{prompts}", "--model", "m"), "There is no endpoint"),
        (("--input", "{broken}", "--model", "m"), "line 2 is no JSON"),
        (("--input", "{list}", "--model", "m"), "line 1 is no JSON object"),
    ],
)
def test_command_says_what_is_wrong(endpoint, tmp_path, arguments, message):
    for name, text in (("prompts", '{"prompt": "a cat"}'), ("broken", '{"prompt": "a"}\n{'), ("list", "[1]")):
        (tmp_path / f"{name}.jsonl").write_text(text)
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("prompts", "broken", "list")}
    result = invoke(*(argument.format(**files) for argument in arguments), "--output", tmp_path / "out.jsonl")
    assert result.exit_code == 1 and message in result.output


def test_txt_holds_a_prompt_per_line(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    assert [row["prompt"] for row in read_rows(str(tmp_path / "prompts.txt"))] == ["a cat", "a dog"]


def test_jsonl_may_begin_as_windows_begins_a_file(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('\ufeff{"prompt": "a cat"}\n', encoding="utf-8")
    assert read_rows(str(tmp_path / "prompts.jsonl")) == [{"prompt": "a cat"}]


def test_names_need_no_extra():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['openai', 'pydantic']))\n"
        "from trl_unigrpo.rewards import DVReward, QuestionReward, decompose_rows, questions_from_geneval\n"
        "try:\n    from trl_unigrpo.rewards import LLMDecomposer\n"
        "except ImportError as error:\n    print(error)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'trl-unigrpo[judge]'" in output


def test_importing_the_package_of_rewards_loads_none_of_them():
    code = (
        "import sys, trl_unigrpo.rewards\n"
        "names = 'torch', 'openai', 'pydantic', 'PIL', 'trl_unigrpo.rewards.questions.question'\n"
        "print([name for name in names if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
