"""Which weights belong to which expert: freezing, adapters, learning rates, clipping."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .models.unified import UnifiedModelMixin


EXPERTS = ("text", "image")


def expert_of(base: UnifiedModelMixin, name: str) -> str:
    """The expert, "text" or "image", that a parameter of this name belongs to."""
    return EXPERTS[base.is_image_parameter(name)]


def freeze_experts(base: UnifiedModelMixin, model: nn.Module, trains: Mapping[str, bool]) -> None:
    """Take the weights of the experts that are not trained out of training."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not trains[expert_of(base, name)]:
            parameter.requires_grad_(False)


def split_groups(
    base: UnifiedModelMixin,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    image_learning_rate: float,
) -> None:
    """Split each parameter group of a fresh optimizer by expert; the image expert's groups get their own learning rate."""
    image = {parameter for name, parameter in model.named_parameters() if base.is_image_parameter(name)}
    groups = []
    for group in optimizer.param_groups:
        for name, rate in zip(EXPERTS, (group["lr"], image_learning_rate), strict=True):
            parameters = [p for p in group["params"] if (p in image) == (name == "image")]
            if parameters:
                groups.append({**group, "params": parameters, "lr": rate, "name": name})
    optimizer.param_groups[:] = groups


def parameters_by_expert(base: UnifiedModelMixin, model: nn.Module) -> dict[str, list[Tensor]]:
    """The trained parameters of each expert that has any."""
    experts: dict[str, list[Tensor]] = {name: [] for name in EXPERTS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            experts[expert_of(base, name)].append(parameter)
    return {name: parameters for name, parameters in experts.items() if parameters}


def add_reference_adapter(model: nn.Module) -> None:
    """Keep a frozen copy, named "ref", of the adapter that a model comes with: the policy that training starts from."""
    if "ref" in model.peft_config:
        return
    active = model.active_adapter
    model.add_adapter("ref", model.peft_config[active])
    for name, parameter in model.named_parameters():
        if f".{active}." in name:
            model.get_parameter(name.replace(f".{active}.", ".ref.")).data.copy_(parameter.data)
        elif ".ref." in name:
            parameter.requires_grad_(False)
