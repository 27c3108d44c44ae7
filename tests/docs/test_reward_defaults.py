"""The defaults that the page of rewards states."""

import ast
import asyncio
import inspect
import re

import pytest
from PIL import Image

from tests.helpers.paths import ROOT
from tests.helpers.tiny_llava import tiny_llava
from trl_unigrpo.rewards import EndpointReader, LocalReader, LocalVLMJudge, QuestionReward, VLMJudge
from trl_unigrpo.rewards.common import Breaker, DeadRewardError


PAGE = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")


def test_judges_defaults_are_those_of_the_page():
    defaults = {name: p.default for name, p in inspect.signature(VLMJudge).parameters.items()}
    table = PAGE.split("#### Settings\n")[1].strip().split("\n\n")[0]
    stated = {
        "max_side": 768,
        "concurrency": 32,
        "timeout": 60,
        "max_retries": 6,
        "max_dead_batches": 3,
    }
    assert {name: defaults[name] for name in stated} == stated
    for name, value in stated.items():
        (row,) = [line for line in table.splitlines() if re.match(rf"\|.*`{name}`", line)]
        assert re.search(rf"\b{value}\b", row), row


def test_readers_defaults_are_those_of_the_page():
    table = PAGE.split("#### Settings of readers\n")[1].strip().split("\n\n")[0]
    of = {kind: inspect.signature(kind).parameters for kind in (LocalReader, EndpointReader, LocalVLMJudge, VLMJudge)}
    for reader in (LocalReader, EndpointReader):
        settings = {name: of[reader][name].default for name in ("instruction", "system_prompt", "max_side")}
        assert settings == {"instruction": "", "system_prompt": "", "max_side": 768}
    for reader, judge, row in ((LocalReader, LocalVLMJudge, 3), (EndpointReader, VLMJudge, 4)):
        names = re.findall(r"`(\w+)`", table.splitlines()[2 + row].split(" | ")[0])
        assert len(names) >= 5
        assert {name: of[reader][name].default for name in names} == {name: of[judge][name].default for name in names}


def test_examples_of_reading_back_run(tmp_path, capsys):
    for part in tiny_llava():
        part.save_pretrained(tmp_path)
    examples = PAGE.split("### ReadBackReward\n")[1].split("```python\n")[1:3]
    names = {}
    for example in examples:
        code = example.split("```")[0].replace("Qwen/Qwen3-VL-8B-Instruct", str(tmp_path))
        exec(code.replace("bfloat16", "float32"), names)
    scores = ast.literal_eval(capsys.readouterr().out)
    assert len(scores) == 2 and scores[0] != scores[1] and max(scores) < 0
    assert isinstance(names["reward"].reader, EndpointReader)


def test_third_dead_batch_in_a_row_stops_a_run():
    breaker = Breaker("judge")
    for scores in ([None], [None], [1.0], [None, None], [None]):
        breaker.observe(scores)
    with pytest.raises(DeadRewardError, match="judge scored no image in 3 batches in a row. Last error: no server"):
        breaker.observe([None], "no server")


@pytest.mark.parametrize(("failed", "expected"), [(1, 1.0), (2, None)])
def test_a_quarter_of_the_questions_may_fail(failed, expected):
    class Judge:
        async def ask(self, pairs):
            return [None] * failed + [1.0] * (len(pairs) - failed)

    reward = QuestionReward(Judge())
    questions = [[{"text": f"Is it {i}?"} for i in range(4)]]
    assert asyncio.run(reward(["p"], images=[Image.new("RGB", (8, 8))], questions=questions)) == [expected]
