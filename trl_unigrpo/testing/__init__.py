"""The contract's test kit: run it on a model of your own, with pytest or without (docs/models.md)."""

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..models.contract import check_contract
from ..models.registry import unified_model
from ..models.tokenizer import prepare_tokenizer, read_tokenizer
from .case import Case, ContractError
from .image_checks import IMAGE_CHECKS
from .text_checks import TEXT_CHECKS
from .weight_checks import WEIGHT_CHECKS


__all__ = ["CHECKS", "Case", "ContractError", "contract_case", "contract_tests"]

EXAMPLE_PROMPTS = ("a red circle on the left", "a blue square")
EXAMPLE_THINKINGS = ("a circle", "blue square on the right")

CHECKS = (*TEXT_CHECKS, *IMAGE_CHECKS, *WEIGHT_CHECKS)
"""All checks, in the order in which a new model best makes them pass."""


def contract_case(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    image_size: tuple[int, int] = (64, 64),
    *,
    prompts: Sequence[str] = EXAMPLE_PROMPTS,
    thinkings: Sequence[str] = EXAMPLE_THINKINGS,
    impossible_size: tuple[int, int] | None = None,
    separates_context: bool = True,
    tolerance: float = 1e-4,
) -> Case:
    """
    Make what a check of `CHECKS` is called with; arguments as in [`contract_tests`].

    Raises:
        TypeError: naming each method that the model lacks.
    """
    base = unified_model(model)
    check_contract(base)
    if base is not model:
        raise TypeError("The model has adapters, which the checks add themselves: pass it without.")
    tokenizer = tokenizer or base.tokenizer or read_tokenizer(base.config.name_or_path)
    return Case(
        model=copy.deepcopy(model).eval(),
        tokenizer=prepare_tokenizer(tokenizer, base.chat_template),
        image_size=image_size,
        prompts=prompts,
        thinkings=thinkings,
        impossible_size=impossible_size,
        separates_context=separates_context,
        tolerance=tolerance,
    )


def contract_tests(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    image_size: tuple[int, int] = (64, 64),
    *,
    skip: Collection[str] = (),
    **asked: Any,
) -> list[str]:
    """
    Try every promise of the contract on a unified model; returns the names of the checks, all of them passed.

    Each check works on a copy, so take a small model with random weights, none of them zero.

    Args:
        model: a unified model, out of any wrapper.
        tokenizer: by default the model's own, or that of the folder that it came from.
        image_size: (height, width) in pixels of the images that are tried.
        skip: names of checks to leave out.
        asked: `prompts` and `thinkings`, two texts each, of words that the tokenizer knows and different lengths;
            `impossible_size`, (height, width) that the model can't paint; `separates_context=False` for a model whose
            velocities compute their context again; `tolerance`, the relative difference allowed to rounding, 1e-4.

    Raises:
        TypeError: naming each method that the model lacks.
        ContractError: naming each promise that is broken, and the method.

    Example:

    ```python
    from trl_unigrpo.testing import contract_tests

    contract_tests(model, tokenizer, image_size=(8, 8))
    ```
    """
    unknown = sorted(set(skip) - {check.__name__ for check in CHECKS})
    if unknown:
        raise ValueError(f"skip={unknown}: there are no such checks. There are {[c.__name__ for c in CHECKS]}.")
    checks = [check for check in CHECKS if check.__name__ not in skip]
    broken = []
    for check in checks:
        with torch.random.fork_rng():
            found = _broken(check, contract_case(model, tokenizer, image_size, **asked))
        broken += [f"- {check.__name__}: {found}\n  Promise: {check.__doc__}"] if found else []
    if broken:
        name = type(model).__name__
        raise ContractError(f"{name} breaks {len(broken)} of {len(checks)} promises:\n" + "\n".join(broken))
    return [check.__name__ for check in checks]


def _broken(check: Callable[[Case], None], case: Case) -> str:
    """Run a check, and say what it has found; nothing if the promise is kept."""
    try:
        check(case)
    except ContractError as error:
        return str(error)
    except Exception as error:  # whatever a model raises is a promise broken
        return f"{type(error).__name__}: {error}"
    return ""
