"""Which weights belong to which expert: freezing, learning rates, clipping."""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .contract import UnifiedModelMixin
from .sharding import norm_of_slices, own_slice


EXPERTS = ("text", "image")


def expert_of(base: UnifiedModelMixin, name: str) -> str:
    """The expert, "text" or "image", that a parameter of this name belongs to."""
    return EXPERTS[base.is_image_parameter(name)]


def freeze_experts(base: UnifiedModelMixin, model: nn.Module, trains: Mapping[str, bool]) -> None:
    """
    Take the weights of the experts that are not trained out of training, and those of neither expert where a PEFT
    model has put them in: `bias="all"` means all that it finds.
    """
    outside = () if model is base else base.frozen_modules
    for name, parameter in model.named_parameters():
        part = name.removeprefix("base_model.model.").split(".")[0]
        if part in outside or not trains[expert_of(base, name)]:
            parameter.requires_grad_(False)


def split_groups(
    base: UnifiedModelMixin,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    image_learning_rate: float,
) -> None:
    """Split each parameter group of a fresh optimizer by expert; the image expert's get their own learning rate."""
    image = {parameter for name, parameter in model.named_parameters() if base.is_image_parameter(name)}
    groups = []
    for group in optimizer.param_groups:
        for name, rate in zip(EXPERTS, (group["lr"], image_learning_rate), strict=True):
            parameters = [p for p in group["params"] if (p in image) == (name == "image")]
            if parameters:
                groups.append({**group, "params": parameters, "lr": rate, "name": name})
    optimizer.param_groups[:] = groups


def rates_by_expert(base: UnifiedModelMixin, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Give the learning rate of each expert that the optimizer steps, whoever made its groups."""
    experts, rates = parameters_by_expert(base, model), {}
    for name, parameters in experts.items():
        own = set(parameters)
        for group in optimizer.param_groups:
            if not own.isdisjoint(group["params"]):
                rates[name] = group["lr"]
    return rates


def check_optimizer(base: UnifiedModelMixin, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """
    Raise ValueError if the user's own optimizer steps none of an expert's trained weights, and warn of the settings
    that it does not know.
    """
    if optimizer is None:
        return
    stepped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameters in parameters_by_expert(base, model).items():
        if stepped.isdisjoint(parameters):
            raise ValueError(
                f"optimizers: the {type(optimizer).__name__} holds none of the {len(parameters)} trained weights of "
                f"the {name} expert. Make it of them, after adapters were added (get_peft_model), or leave it to the "
                "trainer."
            )
    warnings.warn(
        f"optimizers: your {type(optimizer).__name__} keeps its own settings. learning_rate, image_learning_rate and "
        "adam_epsilon are not used; the flow's gradients are about 1e-9, which torch's eps of 1e-8 drowns."
    )


def check_trained(base: UnifiedModelMixin, model: nn.Module, trains: Mapping[str, bool]) -> None:
    """Raise ValueError if an expert that is to be trained has no weights to train."""
    trained = parameters_by_expert(base, model)
    for name, weight in zip(EXPERTS, ("text_weight", "flow_weight"), strict=True):
        if trains[name] and name not in trained:
            raise ValueError(
                f"{weight} is above 0, but the {name} expert has no trainable weights. Set {weight}=0, leave the "
                "peft_config's target_modules unset, or load the adapter with is_trainable=True."
            )


def parameters_by_expert(base: UnifiedModelMixin, model: nn.Module) -> dict[str, list[Tensor]]:
    """The trained parameters of each expert that has any."""
    experts: dict[str, list[Tensor]] = {name: [] for name in EXPERTS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            experts[expert_of(base, name)].append(parameter)
    return {name: parameters for name, parameters in experts.items() if parameters}


def describe_trained(base: UnifiedModelMixin, model: nn.Module) -> str:
    """Say in a line how much of each expert is trained."""
    experts = parameters_by_expert(base, model)
    counts = [
        f"{sum(p.numel() for p in of):,} numbers of the {name} expert ({len(of)} tensors)"
        for name, of in experts.items()
    ]
    return f"Trained: {', '.join(counts)}."


def clip_by_expert(base: UnifiedModelMixin, model: nn.Module, max_norm: float) -> dict[str, Tensor]:
    """
    Scale the gradients of each expert to a norm of at most `max_norm`, over all processes that have slices of them;
    returns the norms before.

    One norm for both would be the text's: the image's gradients are orders of magnitude smaller.
    """
    norms = {}
    for name, parameters in parameters_by_expert(base, model).items():
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norms[name] = norm = norm_of_slices(gradients)
        if gradients:
            # On slices: torch's own `clip_grad_norm_` asks at every step again how each of them is spread.
            slices = [own_slice(gradient) for gradient in gradients]
            torch._foreach_mul_(slices, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norms
