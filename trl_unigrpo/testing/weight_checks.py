"""Check whose a model's weights are, its adapters, its reference model, and that it can be saved.

A check gets a [`Case`] with a model of its own, and raises [`ContractError`] where the promise in its docstring is
broken.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from ..models.adapters import target_experts
from ..models.registry import load_unified_model
from .case import Case, expect


def weights_belong_to_an_expert(case: Case) -> None:
    """`is_image_parameter` splits the weights in two sets, both not empty, and knows a name behind any wrapper's."""
    names = [name for name, _ in case.model.named_parameters() if name.split(".")[0] not in case.model.frozen_modules]
    kinds = {bool(case.model.is_image_parameter(name)) for name in names}
    expect(kinds == {True, False}, "is_image_parameter", f"gives {sorted(kinds)} alone: one expert has no weights.")
    for name in names:
        alike = {bool(case.model.is_image_parameter(start + name)) for start in ("", "module.", "base_model.model.")}
        expect(len(alike) == 1, "is_image_parameter", f"takes {name!r} and the same behind a wrapper's for different.")


def _adapt(case: Case, experts: str) -> Any:
    """Give the model adapters that change something from the start."""
    trains = {name: experts in (name, "both") for name in ("text", "image")}
    config = target_experts(LoraConfig(r=2, init_lora_weights=False), case.model, trains)
    assert config is not None
    torch.manual_seed(1)
    return get_peft_model(case.model, config)


@contextmanager
def _adapted(case: Case, experts: str) -> Iterator[Any]:
    adapted = _adapt(case, experts)
    try:
        yield adapted
    finally:
        adapted.unload()


def adapters_go_to_their_expert(case: Case) -> None:
    """`default_lora_targets` names linear layers of the expert that it is asked for, and PEFT can wrap them."""
    hidden, velocity = case.outputs()
    for experts, kinds in {"text": {False}, "image": {True}, "both": {False, True}}.items():
        with _adapted(case, experts) as adapted:
            names = [name for name, p in adapted.named_parameters() if p.requires_grad]
            found = {bool(case.model.is_image_parameter(name)) for name in names}
            wrong = f"for experts={experts!r} matches weights of which `is_image_parameter` says {sorted(found)}."
            expect(found == kinds, "default_lora_targets", wrong)
            own = case.outputs()
        if experts == "text":
            expect(not torch.equal(own[0], hidden), "default_lora_targets", '("text") leaves the text as it was.')
        if experts == "image":
            expect(torch.equal(own[0], hidden), "default_lora_targets", '("image") changes the text.')
            expect(not torch.equal(own[1], velocity), "default_lora_targets", '("image") leaves velocities alone.')


def reference_is_the_model_without_adapters(case: Case) -> None:
    """`reference()` of an adapted model gives the start back (on a CPU to the bit), and leaves what is trained."""
    before = case.outputs()
    adapted = _adapt(case, "both")
    own, trained = case.outputs(), {name: p.requires_grad for name, p in adapted.named_parameters()}
    with case.model.reference() as reference:
        start = all(map(_same_on(case), case.outputs(reference), before))
        expect(start, "reference", "of an adapted model is not where it started.")
    expect(_equal(case.outputs(), own), "reference", "leaves another model behind.")
    after = {name: p.requires_grad for name, p in adapted.named_parameters()}
    expect(after == trained, "reference", "changes which weights are trained.")


def reference_is_the_start_that_was_kept(case: Case) -> None:
    """Weights that are kept as the reference give the start back to the bit while the model is trained."""
    model, before = case.model, case.outputs()
    model.keep_reference()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    with model.reference() as reference:
        expect(_equal(case.outputs(reference), before), "reference", "with kept weights is not where it started.")
    changed = [not torch.equal(a, b) for a, b in zip(case.outputs(), before, strict=True)]
    expect(all(changed), "parameters", "can all be changed, and an output stays as it was.")


def _same_on(case: Case) -> Callable[[Tensor, Tensor], bool]:
    """Compare to the bit on a CPU; a GPU's sums differ in their last bits."""
    return torch.equal if case.model.device.type == "cpu" else case.same


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def saved_model_loads(case: Case) -> None:
    """`save_pretrained` writes a folder that the package's loader reads: the same model comes back."""
    before = case.outputs()
    with tempfile.TemporaryDirectory() as folder:
        case.model.save_pretrained(folder)
        try:
            loaded = load_unified_model(folder, dtype=case.model.dtype)
        except ValueError as error:
            expect(False, "save_pretrained", f"wrote a folder that does not load. Is the class registered? {error}")
        else:
            loaded = loaded.to(case.model.device).eval()
            same = all(case.same(a, b) for a, b in zip(case.outputs(loaded), before, strict=True))
            expect(same, "from_pretrained", "gives another model than was saved.")


WEIGHT_CHECKS = (
    weights_belong_to_an_expert,
    adapters_go_to_their_expert,
    reference_is_the_model_without_adapters,
    reference_is_the_start_that_was_kept,
    saved_model_loads,
)
