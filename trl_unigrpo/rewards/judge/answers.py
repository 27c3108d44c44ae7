"""Reading a judge's answers: bodies of OpenAI's chat protocol, checked against a schema.

Whatever comes in, each function returns a number in its range or raises [`NoAnswer`], with the true reason.
"""

import math
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .prompts import MIN_ANSWER_SHARE, THINKS_FIRST, answer_word, no_answer_word


class NoAnswer(ValueError):
    """An answer that can't be read as what was asked for."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Token(_Strict):
    token: str
    logprob: Annotated[float, Field(le=1e-3)]  # rounding may lift a certain token above 0; NaN fails the comparison


class _Position(_Strict):
    top_logprobs: list[_Token] | None = None


class _LogProbs(_Strict):
    content: list[_Position] | None = None


class _Message(_Strict):
    content: str | None = None
    refusal: str | None = None


class _Choice(_Strict):
    finish_reason: Any = None
    message: _Message | None = None
    logprobs: Any = None  # of no matter to a verdict


class _Answer(_Strict):
    choices: Annotated[list[_Choice], Field(min_length=1)]


AT_LIMIT = ("length", "max_tokens", "model_length")
ENDINGS = (None, "stop", "eos", "eos_token", "end_turn", "stop_sequence", *AT_LIMIT)
"""Each `finish_reason` of an answer that is whole, or as long as it may be. Any other says that something failed."""

MAX_TOTAL = 1.05
"""Most that the probabilities of one token may add up to: 1, and what rounding adds."""

_MORE_TOKENS = "A higher limit: options={'max_tokens': 2000}."
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
        NoAnswer: if it has no log-probs, or none that can be, or yes and no together are not more probable than
            `MIN_ANSWER_SHARE`.
    """
    choice = _choice(body)
    logprobs = _checked(_LogProbs, choice.logprobs or {})
    if not logprobs.content:
        _check_text(choice)
        raise NoAnswer(
            "the answer has no log-probs: this endpoint or model does not give them. Use mode='score', which does "
            "without."
        )
    tops = [(top.token, math.exp(min(top.logprob, 0.0))) for top in logprobs.content[0].top_logprobs or ()]
    no_alternatives = NoAnswer(
        "the first token comes without alternatives, so that nothing is known of the other word: this endpoint does "
        "not give top_logprobs. Use mode='score', which does without."
    )
    if not tops:
        raise no_alternatives
    total = sum(p for _, p in tops)
    if not 0 < total <= MAX_TOTAL:
        raise NoAnswer(
            f"the probabilities of the first token add up to {total:.3g}, expected at most 1: this endpoint fills in "
            "log-probs that it does not know. Use mode='score', which does without."
        )
    mass = {"yes": 0.0, "no": 0.0}
    for token, p in tops:
        if word := answer_word(token):
            mass[word] += p
    share = mass["yes"] + mass["no"]
    if share <= MIN_ANSWER_SHARE:
        remedy = f"{THINKS_FIRST} One that hesitates or refuses needs other words in its template."
        raise NoAnswer(f"{no_answer_word(tops, share)} {remedy}")
    if len(tops) == 1:
        raise no_alternatives
    return mass["yes"] / share


def verdict_score(body: Any, low: float, high: float) -> float:
    """
    Read the score of a [`Verdict`], mapped from [low, high] to [0, 1].

    Args:
        body: an answer's JSON, requested with `VERDICT_FORMAT`.

    Raises:
        NoAnswer: if its text is no verdict, or the score is out of range.
    """
    choice = _choice(body)
    text = _check_text(choice)
    try:
        verdict = Verdict.model_validate_json(text)
    except ValidationError as error:
        if "</think>" in text or text.lstrip().startswith("<think"):
            reason = f"it is a thinking. {THINKS_FIRST}"
        elif choice.finish_reason in AT_LIMIT:
            reason = f"it was cut off at its limit of tokens. {_MORE_TOKENS}"
        else:
            reason = f"{_what(error)}. Does the endpoint follow response_format, or did the model refuse?"
        raise NoAnswer(f"the text is no verdict: {reason} It says {text!r}.") from None
    if not low <= verdict.score <= high:
        raise NoAnswer(f"the score {verdict.score:g} is not between {low:g} and {high:g}.")
    return (verdict.score - low) / (high - low)


def upstream_error(body: Any) -> str | None:
    """Read what an answer says about a failure behind the endpoint; None if it reports none."""
    choices = body.get("choices") if isinstance(body, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    for part in (body, first):
        if isinstance(part, dict) and (error := part.get("error")):
            return str((isinstance(error, dict) and error.get("message")) or error)
    ending = first.get("finish_reason") if isinstance(first, dict) else None
    return f"finish_reason={ending!r}" if ending in ("error", "abort") else None


def _choice(body: Any) -> _Choice:
    """Return the answer itself; NoAnswer if the endpoint or the model says that there is none."""
    if error := upstream_error(body):
        raise NoAnswer(f"the endpoint passes on a failure: {error}.")
    choice: _Choice = _checked(_Answer, body).choices[0]
    if choice.message is not None and choice.message.refusal:
        raise NoAnswer(f"the model refused: {choice.message.refusal!r}.")
    if "filter" in str(choice.finish_reason).lower():
        raise NoAnswer(f"a content filter stopped the answer (finish_reason={choice.finish_reason!r}).")
    if isinstance(choice.finish_reason, str):
        choice.finish_reason = choice.finish_reason.lower()
    if choice.finish_reason not in ENDINGS:
        raise NoAnswer(f"the answer did not come to its end (finish_reason={choice.finish_reason!r}).")
    return choice


def _check_text(choice: _Choice) -> str:
    """Return the answer's text; NoAnswer if it has none."""
    text = choice.message.content if choice.message is not None else None
    if text:
        return text
    if choice.finish_reason in AT_LIMIT:
        raise NoAnswer(f"the answer reached its limit of tokens before its text began. {THINKS_FIRST} {_MORE_TOKENS}")
    raise NoAnswer("the answer is empty.")


def _checked(schema: Any, body: Any) -> Any:
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        raise NoAnswer(f"the answer is not in OpenAI's format: {_what(error)}.") from None


def _what(error: ValidationError) -> str:
    """Name the first fault, without the input."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}"
