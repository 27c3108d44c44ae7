"""A run whose model is spread over processes by FSDP2, through accelerate."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from trl import GRPOTrainer

from ..models.contract import OUTSIDE_FORWARD, UnifiedModelMixin
from ..models.sharding import call_through, layer_classes
from .engines import asks_for


@contextmanager
def sharding_on_cpus(args: Any) -> Iterator[None]:
    """Let accelerate spread a model over CPU processes, which it does over GPUs alone, while it sets itself up."""
    state = PartialState()
    if asks_for(args, "fsdp") and state.distributed_type is DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU  # becomes FSDP
    yield


class ShardedRun(GRPOTrainer):
    """The hooks of `GRPOTrainer` that FSDP2 needs; without it they do nothing."""

    unified: UnifiedModelMixin
    _kept_slices = False

    def create_accelerator_and_postprocess(self) -> None:
        with sharding_on_cpus(self.args):
            super().create_accelerator_and_postprocess()
        if not self.is_fsdp_enabled:
            return
        plugin = self.accelerator.state.fsdp_plugin
        plugin.auto_wrap_policy = plugin.auto_wrap_policy or transformer_auto_wrap_policy
        if plugin.mixed_precision_policy is not None:
            # States, times and outputs stay as they are: FSDP would round those inside of dataclasses too.
            plugin.mixed_precision_policy = replace(
                plugin.mixed_precision_policy, output_dtype=None, cast_forward_inputs=False, reduce_dtype=torch.float32
            )

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_fsdp_enabled:
            self.unified._no_split_modules = layer_classes(self.unified)
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled:
            call_through(self.model, self.unified, OUTSIDE_FORWARD)
            self._keep_slices()
        return prepared

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._keep_slices()
        super()._load_from_checkpoint(*args, **kwargs)

    def _keep_slices(self) -> None:
        """Keep the reference model from here on in slices, as the model is: here are its weights as they came."""
        base = self.unified
        if self.is_fsdp_enabled and not self._kept_slices and base.kept_reference is not None:
            base.keep_reference()
        self._kept_slices = True
