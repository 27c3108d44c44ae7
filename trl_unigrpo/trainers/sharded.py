"""A run whose model is spread over processes by FSDP2, through accelerate."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.constants import FSDP_MODEL_NAME
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import GenerationMixin
from trl import GRPOTrainer

from ..models.contract import OUTSIDE_FORWARD, UnifiedModelMixin
from ..models.registry import unified_model
from ..models.sharding import (
    buffers_spread,
    call_through,
    layer_classes,
    weights_gathered,
    whole_weights_in_place,
)
from .engines import asks_for
from .trl_bridge import unwrap_model_for_generation


def prepare_accelerate(args: Any) -> None:
    """
    Have accelerate, before it sets itself up, spread a model over CPUs too, and gradients after each micro-batch. By
    itself it spreads models over GPUs alone, and holds whole gradients until the last.
    """
    if asks_for(args, "fsdp") is None:
        return
    state, config = PartialState(), args.accelerator_config
    accumulation = {"sync_each_batch": True, **(config.gradient_accumulation_kwargs or {})}
    args.accelerator_config = replace(config, gradient_accumulation_kwargs=accumulation)  # transformers writes into it
    if state.distributed_type is DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU  # becomes FSDP


class ShardedRun(GRPOTrainer):
    """The hooks of `GRPOTrainer` that FSDP2 needs; without it they do nothing."""

    args: Any
    _cutting: ExitStack
    _sliced = False  # whether FSDP has cut the model

    @property
    def unified(self) -> UnifiedModelMixin:
        """The unified model, out of any wrapper."""
        return unified_model(self.accelerator.unwrap_model(self.model))

    def create_accelerator_and_postprocess(self) -> None:
        prepare_accelerate(self.args)
        super().create_accelerator_and_postprocess()
        if not self.is_fsdp_enabled:
            if asks_for(self.args, "fsdp") is not None:
                raise ValueError("FSDP was asked for, but there is one process: start it with `accelerate launch`.")
            return
        plugin = self._plugin
        plugin.auto_wrap_policy = plugin.auto_wrap_policy or transformer_auto_wrap_policy
        if plugin.mixed_precision_policy is not None:
            # States, times and outputs stay as they are: FSDP would round those inside of dataclasses too.
            plugin.mixed_precision_policy = replace(
                plugin.mixed_precision_policy, output_dtype=None, cast_forward_inputs=False, reduce_dtype=torch.float32
            )

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_fsdp_enabled:
            return super()._prepare_for_training(*args, **kwargs)
        base = self.unified
        # Nothing writes into what a layer returns.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        base._no_split_modules = [*base.gathered_layers] or layer_classes(base)  # where accelerate looks for them
        with ExitStack() as self._cutting:
            if self._plugin.cpu_ram_efficient_loading and not self._sliced:
                self._cutting.enter_context(buffers_spread(base))
            prepared = super()._prepare_for_training(*args, **kwargs)
            self._slice_once()
        return prepared

    @property
    def _plugin(self) -> Any:
        """accelerate's settings of FSDP."""
        return self.accelerator.state.fsdp_plugin

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._slice_once()
        folder = Path(resume_from_checkpoint)
        if self.is_fsdp_enabled and not [*folder.glob(f"{FSDP_MODEL_NAME}*")]:
            raise ValueError(
                f"{folder} has no {FSDP_MODEL_NAME}*, which FSDP2 writes. Resume it as it was written, or "
                f"begin from its weights: model='{folder}', and no resume_from_checkpoint."
            )
        # A model's own form of a checkpoint is of whole weights; beside it are the slices.
        if self.is_fsdp_enabled or not self.unified.load_checkpoint(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _slice_once(self) -> None:
        """Call [`_keep_slices`] when the model has been cut, before a checkpoint is loaded into it."""
        if self.is_fsdp_enabled and not self._sliced:
            self._sliced = True
            self._cutting.close()
            self._keep_slices()

    def _keep_slices(self) -> None:
        """Make the model that has been cut ready, and keep copies of its weights as they are kept now, in slices."""
        call_through(self.model, self.unified, OUTSIDE_FORWARD)
        for model in (module for module in self.unified.modules() if isinstance(module, GenerationMixin)):
            # Where each token gathers, processes go on together until the texts of all of them have ended.
            model._is_fsdp_managed_module = not self.args.gather_for_rollout
        if self.unified.kept_reference is not None:
            self.unified.keep_reference("cpu" if self.args.reference_on_cpu else None)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.is_fsdp_enabled and not self._sliced:
            raise ValueError(
                "evaluate() before train(): under FSDP2 a model is spread when training begins. Set "
                "eval_on_start=True, or evaluate in one process."
            )
        return super().evaluate(*args, **kwargs)

    # Files

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write whole weights, from slices too. Checkpoints of sharded state dicts are not told to."""
        super().save_model(output_dir, _internal_call)
        if self._sliced and not _internal_call and "SHARDED" in str(self._plugin.state_dict_type):
            self._save(output_dir, self.accelerator.get_state_dict(self.model))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        whole = state_dict if self._sliced and self.args.should_save else None
        with nullcontext() if whole is None else whole_weights_in_place(self.model, whole):
            super()._save(output_dir, state_dict)
            if self.args.should_save:
                self.unified.save_adapters(output_dir or self.args.output_dir)

    # The rollout

    @contextmanager
    def _sampling_model(self) -> Iterator[UnifiedModelMixin]:
        """Give the model as images are sampled from it: unwrapped, in the run's precision."""
        how = {"gradient_checkpointing_kwargs": self.args.gradient_checkpointing_kwargs}
        with (
            unwrap_model_for_generation(self.model_wrapped, self.accelerator, **how) as model,
            self.accelerator.autocast(),
        ):
            yield unified_model(model)

    def _gathered(self) -> AbstractContextManager[None]:
        """
        Hold all weights in each process, where they are spread and the configuration wants it: then one may think and
        paint while another one has ended. Weights that are put in their place meanwhile are gathered at first use.
        """
        if not (self._sliced and self.args.gather_for_rollout):
            return nullcontext()
        return weights_gathered(self.model, self._plugin.reshard_after_forward)
