"""Reading a judge's answers: bodies of OpenAI's chat protocol, checked against a schema.

Whatever comes in, each function returns a number in its range or raises [`NoAnswer`].
"""

import math
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .prompts import answer_word


class NoAnswer(ValueError):
    """An answer that can't be read as what was asked for."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Token(_Strict):
    token: str
    logprob: Annotated[float, Field(le=1e-3)]  # rounding may lift a certain token above 0; NaN fails the comparison


class _Position(_Strict):
    top_logprobs: list[_Token]


class _LogProbs(_Strict):
    content: Annotated[list[_Position], Field(min_length=1)]


class _ChoiceWithLogProbs(_Strict):
    logprobs: _LogProbs | None = None


class _AnswerWithLogProbs(_Strict):
    choices: Annotated[list[_ChoiceWithLogProbs], Field(min_length=1)]


class _Message(_Strict):
    content: str


class _ChoiceWithText(_Strict):
    message: _Message


class _AnswerWithText(_Strict):
    choices: Annotated[list[_ChoiceWithText], Field(min_length=1)]


_DESCRIPTION = 'What a judge answers in mode "score"; the reason comes first, so that the score follows from it.'


class Verdict(BaseModel):
    """A judge's answer in mode "score"; the reason comes first, so that the score follows from it."""

    # The description travels with the schema: other words would be another request, which no cache knows.
    model_config = ConfigDict(strict=True, extra="forbid", json_schema_extra={"description": _DESCRIPTION})

    reason: str
    score: Annotated[float, Field(allow_inf_nan=False)]


VERDICT_FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "verdict", "strict": True, "schema": Verdict.model_json_schema()},
}


def yes_probability(body: Any) -> float:
    """
    Compute P(yes) / (P(yes) + P(no)) among the most probable first tokens, all spellings of each word added up.

    Args:
        body: an answer's JSON, requested with `logprobs` and `top_logprobs`.

    Raises:
        NoAnswer: if it has no log-probs, or neither word is among them.
    """
    logprobs = _checked(_AnswerWithLogProbs, body).choices[0].logprobs
    if logprobs is None:
        raise NoAnswer(
            "the answer has no log-probs: this endpoint or model does not give them. Use mode='score', which does "
            "without."
        )
    mass = {"yes": 0.0, "no": 0.0}
    tops = logprobs.content[0].top_logprobs
    for top in tops:
        if word := answer_word(top.token):
            mass[word] += math.exp(min(top.logprob, 0.0))
    total = mass["yes"] + mass["no"]
    if total == 0:
        likely = ", ".join(repr(top.token) for top in sorted(tops, key=lambda top: -top.logprob)[:3]) or "no token"
        raise NoAnswer(
            f"the answer begins with {likely}, neither yes nor no. A model that thinks first must be told not to: "
            "options={'extra_body': {'chat_template_kwargs': {'enable_thinking': False}}}."
        )
    return mass["yes"] / total


def verdict_score(body: Any, low: float, high: float) -> float:
    """
    Read the score of a [`Verdict`], mapped from [low, high] to [0, 1].

    Args:
        body: an answer's JSON, requested with `VERDICT_FORMAT`.

    Raises:
        NoAnswer: if its text is no verdict, or the score is out of range.
    """
    text = _checked(_AnswerWithText, body).choices[0].message.content
    try:
        verdict = Verdict.model_validate_json(text)
    except ValidationError as error:
        raise NoAnswer(f"the text is no verdict: {_what(error)}. Does the endpoint follow response_format?") from None
    if not low <= verdict.score <= high:
        raise NoAnswer(f"the score {verdict.score:g} is not between {low:g} and {high:g}.")
    return (verdict.score - low) / (high - low)


def _checked(schema: Any, body: Any) -> Any:
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        raise NoAnswer(f"the answer is not in OpenAI's format: {_what(error)}.") from None


def _what(error: ValidationError) -> str:
    """Name the first fault, without the input."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}"
