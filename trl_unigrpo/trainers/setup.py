"""The steps around `GRPOTrainer.__init__`, whose order is load-bearing: here, and nowhere else."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.utils import is_peft_model
from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..flow.objectives import OBJECTIVES, constants, of_size
from ..models.adapters import (
    check_kind,
    check_own_adapters,
    keep_adapters_in_float32,
    merge_found_adapters,
    target_experts,
)
from ..models.contract import UnifiedModelMixin, check_contract
from ..models.experts import check_optimizer, check_trained, describe_trained, freeze_experts
from ..models.hub import hub_arguments
from ..models.quantization import keep_trainable_layout
from ..models.reference import adapters_do_nothing_yet, trained_weights
from ..models.registry import unified_model
from ..models.sources import check_edits
from ..models.tokenizer import never_sampled
from ..rewards.readback.read_back_reward import ReadBackReward
from ..sampling.rounds import check_sight
from ..sampling.self_reader import bring_readers, read_by_painter
from .arguments import (
    check_arguments,
    check_lengths,
    check_painted,
    check_round_lengths,
    default_config,
    find_tokenizer,
    load_for_training,
    of_revision,
    question_weak_adapters,
)
from .config_checks import check_generation
from .dataset_checks import check_special_tokens
from .prompt_checks import CheckedRows
from .reward_checks import distinct
from .sharding_config import check_sharded
from .trl_bridge import ReferencePolicy, check_attributes, check_trl, compute_head_in_float32, return_velocity
from .unigrpo_config import UniGRPOConfig
from .vllm_thinking import check_served


@dataclass
class Setup:
    """
    A run made ready.

    Attributes:
        model: as TRL gets it, loaded, adapted or not.
        base: the unified model in it.
        trains: expert ("text", "image") -> whether it is trained.
        objective: of the image expert.
        regularizer_weight: of this run's steps, see `constants`; 0 without regulariser.
        float32_head: whether log-probs are computed in float32 (`cast_lm_head_to_fp32`).
        masters: adapters that came with the model, as they were before TRL rounds those on a quantised base.
        edits: whether prompts show source images.
        stories: whether rows have all turns of the user; none of them keeps its image.
        readers: rewards that the model itself reads back for.
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
    float32_head: bool
    masters: dict[str, Tensor]
    beta: float
    edits: bool
    stories: bool
    readers: Sequence[ReadBackReward] = ()

    @property
    def regularized(self) -> bool:
        """True where the image expert is held near the reference model."""
        return self.trains["image"] and self.regularizer_weight > 0

    def weight_of(self, latents: Tensor) -> float:
        """Give the regulariser's weight for images with as many numbers as these latents (S, *latent)."""
        return of_size(self.args, self.regularizer_weight, latents)


def prepare_run(
    model: str | PreTrainedModel,
    args: UniGRPOConfig | None,
    reward_funcs: Sequence[Any],
    datasets: dict[str, Any],
    processing_class: PreTrainedTokenizerBase | None,
    quantization_config: Any,
    peft_config: PeftConfig | None,
    unsupported: dict[str, Any],
) -> Setup:
    """Check what a user handed over, before anything expensive, and make it what TRL's constructor takes."""
    check_trl()
    if isinstance(model, str):
        source = model
    else:
        check_contract(unified_model(model))
        check_own_adapters(model)
        source = model.config.name_or_path
    args = args or default_config(source)
    edits, stories = check_arguments(args, reward_funcs, datasets, processing_class, unsupported)
    for config in [peft_config] if peft_config is not None else getattr(model, "peft_config", {}).values():
        check_kind(config)
        question_weak_adapters(config, args)

    set_seed(args.seed)  # adapters start at random
    hub = hub_arguments(args.model_init_kwargs or {})
    if isinstance(model, str):
        model, args = load_for_training(source, args, quantization_config, peft_config)
        quantization_config = None
        check_contract(unified_model(model))
        if is_peft_model(model):  # the folder held adapters
            peft_config, source = None, model.config.name_or_path
            hub.pop("revision", None)  # of the adapters, not of what they were trained on
    base = unified_model(model)
    _try_out(base, args, edits, reads=bool(read_by_painter(reward_funcs)))
    if not is_peft_model(model):
        merge_found_adapters(base)
    args, beta, float32_head = copy.copy(args), args.beta, args.cast_lm_head_to_fp32
    args.beta, args.cast_lm_head_to_fp32 = 0.0, False
    epsilon, regularizer_weight = constants(args)
    setup = Setup(
        model=model,
        base=base,
        args=args,
        tokenizer=find_tokenizer(base, processing_class, source, **hub),
        quantization_config=quantization_config,
        peft_config=peft_config,
        trains={"text": args.text_weight > 0, "image": args.flow_weight > 0},
        objective=OBJECTIVES[args.image_objective](args, epsilon),
        regularizer_weight=regularizer_weight,
        float32_head=float32_head,
        masters=trained_weights(model) if is_peft_model(model) else {},
        beta=beta,
        edits=edits,
        stories=stories,
        readers=read_by_painter(reward_funcs),
    )
    check_special_tokens(datasets, setup.tokenizer)
    setup.peft_config = of_revision(target_experts(peft_config, base, setup.trains), hub.get("revision"))
    return setup


def _try_out(base: UnifiedModelMixin, args: UniGRPOConfig, edits: bool, reads: bool) -> None:
    """Find out whether the model can be trained with these arguments; whether it can edit and read, where it is to."""
    if args.use_vllm:
        check_served(base, edits, args.vllm_mode)
    check_lengths(args, base)
    check_round_lengths(args, base)
    check_sight(base, args.most_rounds)
    if edits:
        check_edits(base)
    if reads:
        base.read_back([], [])  # raises if it can't
    if args.compile_layers:
        base.compile_layers()
    base.try_out(args.device)
    check_painted(args, base)


def finish_run(trainer: Any, setup: Setup) -> None:
    """Check what TRL's constructor made, and bring it to what this trainer needs."""
    check_attributes(trainer)
    trainer.args.allow_stop = trainer.args.allow_stop and not setup.stories
    base, model = setup.base, trainer.model
    if not base.packs_velocities:
        _check_one_by_one(trainer, setup)
    _check_processes(trainer, setup)
    check_sharded(base, trainer.is_fsdp_enabled, bool(setup.readers), setup.stories)
    freeze_experts(base, model, setup.trains)
    check_trained(base, model, setup.trains)
    base.check_trained_weights()
    keep_adapters_in_float32(model, setup.masters)
    keep_trainable_layout(model)
    if not trainer.use_vllm:
        check_generation(base.generation_config, trainer.generation_kwargs)
    if setup.float32_head:
        trainer.args.cast_lm_head_to_fp32 = True
        compute_head_in_float32(base, trainer.temperature)
    return_velocity(base)
    _keep_reference(trainer, setup)
    bring_readers(setup.readers, base, setup.tokenizer, trainer.accelerator.autocast)
    if trainer.accelerator.is_main_process:
        print(describe_trained(base, model), flush=True)
    check_optimizer(base, model, trainer.optimizer)
    trainer.data_collator = CheckedRows(trainer.data_collator)
    trainer.reward_func_names = distinct(trainer.reward_func_names)
    _sample_as_trained(trainer, never_sampled(base, setup.tokenizer, trainer.eos_token_ids) or ())


def _sample_as_trained(trainer: Any, never: Sequence[int]) -> None:
    """Let nobody sample the tokens that no thinking may hold."""
    if trainer.use_vllm:
        trainer.generation_config = None
        trainer.vllm_generation.sample_as_trained(never, trainer.eos_token_ids)
        return
    sampling = trainer.generation_config
    sampling.suppress_tokens = sorted({*never, *(sampling.suppress_tokens or ())}) or None


def _check_processes(trainer: Any, setup: Setup) -> None:
    """Raise ValueError where one process may have an image to train and another one none: it would wait forever."""
    args, processes = trainer.args, trainer.accelerator.num_processes
    if processes == 1 or args.trains_round(0):
        return
    if args.allow_stop:
        raise ValueError(
            f"train_rounds={args.train_rounds} with allow_stop=True on {processes} processes: where all of one "
            "process keep their images, it has none to train. Train round 1 too, or set allow_stop=False."
        )
    if setup.stories:
        raise ValueError(
            f"train_rounds={args.train_rounds} with a column 'turns' on {processes} processes: where all stories of "
            "one process end before, it has no image to train. Train round 1 too."
        )


def _keep_reference(trainer: Any, setup: Setup) -> None:
    """Keep what training starts from, where switching adapters off would not give it back."""
    base, model = setup.base, trainer.model
    inside = {*base.parameters()}
    outside = [name for name, p in model.named_parameters() if p.requires_grad and p not in inside]
    if outside:
        raise ValueError(f"Weights outside of the unified model are trained: {outside[0]!r}. It paints without them.")
    base.release_reference()  # of an earlier run
    judged = any(reward.judge == "reference" for reward in setup.readers)
    if (setup.regularized or setup.beta != 0 or judged) and not adapters_do_nothing_yet(base):
        base.keep_reference()
    trainer.beta = trainer.args.beta = setup.beta
    if setup.beta != 0:
        trainer.ref_model = ReferencePolicy(base, model)


def _check_one_by_one(trainer: Any, setup: Setup) -> None:
    """Raise ValueError for what a model that computes its velocities one by one can't do."""
    name = type(setup.base).__name__
    if trainer.accelerator.num_processes > 1 and trainer.args.ddp_find_unused_parameters:
        raise ValueError(
            f"ddp_find_unused_parameters=True: {name} computes its velocities past the one forward that DDP looks at, "
            "which would call all of the painter's weights unused. Leave it at False: weights that nothing uses are "
            "no matter."
        )
    if setup.objective.pools_steps and setup.trains["image"]:
        raise ValueError(
            f"image_objective={setup.args.image_objective!r} needs all velocities of an image at once, but {name} "
            "computes them one by one. Use 'awm', which has a ratio of its own for each."
        )
