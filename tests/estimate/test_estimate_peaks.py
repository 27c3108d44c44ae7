"""Peaks of memory by phase against a real run on a CPU, every allocation tracked."""

import weakref
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trl_unigrpo.estimate import Workload, estimate_memory
from trl_unigrpo.models.bagel import BagelConfig
from trl_unigrpo.sampling import generation
from trl_unigrpo.trainers.dry_run import random_trainer


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that are alive, and the most there were, since `peak` was last set."""

    def __init__(self, held):
        super().__init__()
        self._known = set()
        self.now = self.peak = 0
        for tensor in held:
            self._add(tensor)

    def _add(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, key, size):
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
        self.peak = max(self.peak, self.now)
        return out


def measured_peaks(trainer, monkeypatch) -> dict[str, int]:
    """Bytes at the peak of each phase of two generations, optimizer state in place from the first on."""
    model, peaks = trainer.unified, {}
    held = [x for part in (trainer.model, model.codec.vae) for x in (*part.parameters(), *part.buffers())]
    held += (model.kept_reference or {}).values()
    live = LiveBytes(held)

    @contextmanager
    def phase(name):
        live.peak = live.now
        yield
        peaks[name] = max(peaks.get(name, 0), live.peak)

    def watch(owner, method, name):
        original = getattr(owner, method)

        def watched(*args, **kwargs):
            with phase(name):
                return original(*args, **kwargs)

        monkeypatch.setattr(owner, method, watched)

    watch(generation, "sample_latents", "denoising")
    watch(trainer, "_velocities", "reference pass")
    watch(trainer.accelerator, "backward", "update")
    with live:
        trainer.train()
    return peaks


@pytest.mark.parametrize(
    ("ranks", "half", "checkpointing"),
    [
        ((8, 8), True, True),
        pytest.param((8, 8), True, False, marks=pytest.mark.slow),
        pytest.param((8, 8), False, False, marks=pytest.mark.slow),
        pytest.param(None, False, True, marks=pytest.mark.slow),
    ],
)
def test_peaks_are_those_of_a_run(tmp_path, monkeypatch, ranks, half, checkpointing):

    config = BagelConfig(
        llm_config={  # the proportions of the released layers
            "vocab_size": 64,
            "hidden_size": 448,
            "intermediate_size": 2368,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
        vae_config={
            "in_channels": 3,
            "out_ch": 3,
            "ch": 32,
            "ch_mult": [1, 1],
            "num_res_blocks": 1,
            "z_channels": 4,
            "scale_factor": 0.3611,
            "shift_factor": 0.1159,
        },
        max_latent_size=16,
    )
    load = Workload(
        config,
        image_size=64,
        prompt_length=12,
        completion_length=12,
        num_generations=2,
        num_inference_steps=6,
        num_iterations=1,
        micro_batch_size=2,
        lora_ranks=ranks,
        half=half,
        gradient_checkpointing=checkpointing,
    )
    trainer = random_trainer(load, torch.device("cpu"), str(tmp_path))
    trainer.args.max_steps = 2
    measured, estimated = measured_peaks(trainer, monkeypatch), estimate_memory(load)
    # An estimate that is too low would promise what does not fit.
    assert 0.97 < estimated.peaks["update"] / measured["update"] < 1.15
    assert 0.97 < estimated.peaks["denoising"] / measured["denoising"] < 1.1
    assert 0.97 < estimated.peaks["reference pass"] / measured["reference pass"] < 1.2
