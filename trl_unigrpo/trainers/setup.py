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
from ..models.adapters import add_reference_adapter, keep_adapters_in_float32, target_experts, trained_weights
from ..models.contract import UnifiedModelMixin, check_contract
from ..models.experts import check_trained, freeze_experts
from ..models.quantization import keep_trainable_layout
from ..models.registry import unified_model
from ..models.tokenizer import never_sampled
from .arguments import check_arguments, check_lengths, default_config, find_tokenizer, load_for_training
from .dataset_checks import check_special_tokens
from .trl_bridge import check_attributes, check_trl, return_velocity
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
    if isinstance(model, str):
        source, adapted = model, peft_config is not None
    else:
        check_contract(unified_model(model))
        source, adapted = model.config.name_or_path, peft_config is not None or is_peft_model(model)
    args = args or default_config(source)
    check_arguments(args, reward_funcs, datasets, processing_class, unsupported)

    set_seed(args.seed)  # adapters start at random
    if isinstance(model, str):
        model, args = load_for_training(source, args, quantization_config, peft_config)
        quantization_config = None
        check_contract(unified_model(model))
    base = unified_model(model)
    check_lengths(args, base)
    num_latent_dims = math.prod(base.latent_shape((args.image_size, args.image_size)))
    if args.beta != 0 and not adapted:
        raise ValueError(f"beta={args.beta}: the text KL needs adapters to switch off. Pass a peft_config, or beta=0.")

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
        masters={},
    )
    check_special_tokens(datasets, setup.tokenizer)
    _keep_reference(setup, adapted)
    setup.masters = trained_weights(model) if is_peft_model(model) else {}
    setup.peft_config = target_experts(peft_config, base, setup.trains)
    return setup


def _keep_reference(setup: Setup, adapted: bool) -> None:
    """Keep what training starts from, where switching adapters off would not give it back."""
    if not adapted:
        freeze_experts(setup.base, setup.model, setup.trains)
    setup.base.keep_reference(None)  # of an earlier run
    if setup.regularized and not adapted:
        setup.base.keep_reference(copy.deepcopy(setup.base))
    elif setup.regularized and is_peft_model(setup.model) and setup.args.beta == 0:
        add_reference_adapter(setup.model)  # with beta, TRL adds it itself


def finish_run(trainer: Any, setup: Setup) -> None:
    """Check what TRL's constructor made, and bring it to what this trainer needs."""
    check_attributes(trainer)
    base, model = setup.base, trainer.model
    if not base.packs_velocities:
        _check_one_by_one(trainer, setup)
    freeze_experts(base, model, setup.trains)
    check_trained(base, model, setup.trains)
    base.check_trained_weights()
    keep_adapters_in_float32(model, setup.masters)
    keep_trainable_layout(model)
    return_velocity(base)
    if base.kept_reference is not None:
        base.kept_reference.to(trainer.accelerator.device)
    trainer.generation_config.suppress_tokens = never_sampled(base, setup.tokenizer, trainer.eos_token_ids)


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
