"""The steps around `GRPOTrainer.__init__`, whose order is load-bearing: here, and nowhere else."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate.utils import is_peft_model
from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..flow import scale_with_latents
from ..flow.objectives import OBJECTIVES
from ..models.adapters import check_kind, keep_adapters_in_float32, merge_found_adapters, target_experts
from ..models.contract import UnifiedModelMixin, check_contract
from ..models.experts import check_trained, describe_trained, freeze_experts
from ..models.quantization import keep_trainable_layout
from ..models.reference import adapters_do_nothing_yet, trained_weights
from ..models.registry import unified_model
from ..models.tokenizer import never_sampled
from .arguments import (
    check_arguments,
    check_lengths,
    default_config,
    find_tokenizer,
    load_for_training,
    question_weak_adapters,
)
from .trl_bridge import ReferencePolicy, check_attributes, check_trl, return_velocity
from .unigrpo_config import UniGRPOConfig


@dataclass
class Setup:
    """
    A run made ready.

    Attributes:
        model: as TRL gets it, loaded, adapted or not.
        base: the unified model in it.
        trains: expert ("text", "image") -> whether it is trained.
        objective: of the image expert.
        regularizer_weight: at the latent size of this run; 0 without regulariser.
        masters: adapters that came with the model, as they were before TRL rounds those on a quantised base.
        beta: weight of the text KL. TRL's constructor gets 0, or it would make a reference of its own: an adapter
            named "ref", or a model that it loads again.
    """

    model: PreTrainedModel
    base: UnifiedModelMixin
    args: UniGRPOConfig
    tokenizer: PreTrainedTokenizerBase
    quantization_config: Any
    peft_config: PeftConfig | None
    trains: dict[str, bool]
    objective: Any
    regularizer_weight: float
    masters: dict[str, Tensor]
    beta: float

    @property
    def regularized(self) -> bool:
        """True where the image expert is held near the reference model."""
        return self.trains["image"] and self.regularizer_weight > 0


def prepare_run(
    model: str | PreTrainedModel,
    args: UniGRPOConfig | None,
    reward_funcs: Callable | list[Callable],
    datasets: dict[str, Any],
    processing_class: PreTrainedTokenizerBase | None,
    quantization_config: Any,
    peft_config: PeftConfig | None,
    unsupported: dict[str, Any],
) -> Setup:
    """Check what a user handed over, before anything expensive, and make it what TRL's constructor takes."""
    check_trl()
    adapters = [peft_config] if peft_config is not None else []
    if not isinstance(model, str) and is_peft_model(model):
        adapters += model.peft_config.values()
    for config in adapters:
        check_kind(config)
    if isinstance(model, str):
        source = model
    else:
        check_contract(unified_model(model))
        source = model.config.name_or_path
    args = args or default_config(source)
    check_arguments(args, reward_funcs, datasets, processing_class, unsupported)
    for config in adapters:
        question_weak_adapters(config, args)

    set_seed(args.seed)  # adapters start at random
    if isinstance(model, str):
        model, args = load_for_training(source, args, quantization_config, peft_config)
        quantization_config = None
        check_contract(unified_model(model))
    base = unified_model(model)
    check_lengths(args, base)
    num_latent_dims = math.prod(base.latent_shape((args.image_size, args.image_size)))
    if not is_peft_model(model):
        merge_found_adapters(base)
    beta, args = args.beta, copy.copy(args)
    args.beta = 0.0

    scale = scale_with_latents if args.scale_with_latents else (lambda value, _: value)
    setup = Setup(
        model=model,
        base=base,
        args=args,
        tokenizer=find_tokenizer(base, processing_class, source),
        quantization_config=quantization_config,
        peft_config=peft_config,
        trains={"text": args.text_weight > 0, "image": args.flow_weight > 0},
        # The clip range is never None: the configuration chooses.
        objective=OBJECTIVES[args.image_objective](args, scale(args.flow_epsilon or 0.0, num_latent_dims)),
        regularizer_weight=0.0
        if args.flow_regularizer == "none"
        else scale(args.flow_regularizer_weight, num_latent_dims),
        masters=trained_weights(model) if is_peft_model(model) else {},
        beta=beta,
    )
    setup.peft_config = target_experts(peft_config, base, setup.trains)
    return setup


def finish_run(trainer: Any, setup: Setup) -> None:
    """Check what TRL's constructor made, and bring it to what this trainer needs."""
    check_attributes(trainer)
    base, model = setup.base, trainer.model
    if not base.packs_velocities:
        _check_one_by_one(trainer, setup)
    freeze_experts(base, model, setup.trains)
    check_trained(base, model, setup.trains)
    keep_adapters_in_float32(model, setup.masters)
    keep_trainable_layout(model)
    return_velocity(base)
    _keep_reference(trainer, setup)
    if trainer.accelerator.is_main_process:
        print(describe_trained(base, model), flush=True)
    trainer.generation_config.suppress_tokens = never_sampled(base, setup.tokenizer, trainer.eos_token_ids)


def _keep_reference(trainer: Any, setup: Setup) -> None:
    """Keep what training starts from, where switching adapters off would not give it back."""
    base, model = setup.base, trainer.model
    inside = {*base.parameters()}
    outside = [name for name, p in model.named_parameters() if p.requires_grad and p not in inside]
    if outside:
        raise ValueError(f"Weights outside of the unified model are trained: {outside[0]!r}. It paints without them.")
    base.release_reference()  # of an earlier run
    if (setup.regularized or setup.beta != 0) and not adapters_do_nothing_yet(base):
        base.keep_reference()
    trainer.beta = trainer.args.beta = setup.beta
    if setup.beta != 0:
        trainer.ref_model = ReferencePolicy(base, model)


def _check_one_by_one(trainer: Any, setup: Setup) -> None:
    """Raise ValueError for what a model that computes its velocities one by one can't do."""
    name = type(setup.base).__name__
    if trainer.accelerator.num_processes > 1:
        raise ValueError(f"{name} computes its velocities one by one, which several processes don't support yet.")
    if setup.objective.pools_steps and setup.trains["image"]:
        raise ValueError(
            f"image_objective={setup.args.image_objective!r} needs all velocities of an image at once, but {name} "
            "computes them one by one. Use 'awm', which has a ratio of its own for each."
        )
