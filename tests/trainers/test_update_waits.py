"""The host's waits for the device in an update, and its gathers from other processes."""

from collections import Counter

import pytest
import torch

from tests.helpers.cuda_eyes import GPU, CudaEyes, moved_to_gpu, place_of_call
from tests.helpers.tiny_unified import OneByOne, broken, build_trainer


@pytest.fixture(params=[True, False], ids=["packed", "one by one"])
def update(request, tmp_path, monkeypatch):
    """A trainer after two updates on the CPU, then moved, and the micro-batch that it is to train on next."""
    model = None if request.param else broken(OneByOne)
    trainer = build_trainer(tmp_path, model=model, sde_window_size=2, sde_window_range=(0, 3))
    compute_loss, batches = trainer._compute_loss, []
    monkeypatch.setattr(trainer, "_compute_loss", lambda m, inputs: batches.append(inputs) or compute_loss(m, inputs))
    trainer.train()
    trainer.model.train().to(GPU)
    monkeypatch.setattr(type(trainer.accelerator), "device", torch.device(GPU))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="": False)  # which "meta" may not be asked for
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.float32)
    return trainer, batches[-1], request.param


def on_gpu(batch):
    """A micro-batch as a GPU's rollout leaves it: times stay on the CPU."""
    trajectories = batch["trajectories"]
    for t in trajectories:
        for _, image in t.painted():
            image.latents = moved_to_gpu(image.latents)
            for name in ("x", "x_next", "velocity"):
                setattr(image.steps, name, moved_to_gpu(getattr(image.steps, name)))
    texts = {name: value for name, value in batch.items() if name != "trajectories"}
    return {**moved_to_gpu(texts), "trajectories": trajectories}


@pytest.mark.parametrize("first_pass", [True, False])
def test_waits_of_an_update(update, monkeypatch, first_pass):
    trainer, batch, packed = update
    texts = torch.stack(
        [torch.cat([batch[f"{part}_{of}"] for part in ("prompt", "completion")], 1) for of in ("ids", "mask")]
    )
    batch = on_gpu(batch)
    kept = moved_to_gpu(trainer._kept.state())
    assert kept.keys() == {"old", "reference"}
    trainer._kept.restore({policy: kept[policy] for policy in kept if policy != "old" or not first_pass})
    gathers, gather = Counter(), trainer.accelerator.gather
    monkeypatch.setattr(trainer.accelerator, "gather", lambda x: gathers.update([place_of_call()]) or gather(x))
    with CudaEyes(known=[texts]) as eyes:
        loss = trainer._compute_loss(trainer.model, batch)
        of_loss = eyes.ours
        loss.backward()
        assert eyes.ours == of_loss
        trainer._clip_grad_norm(trainer.model)
    of_update, of_gathers = eyes.ours - of_loss, [place for place in gathers.elements() if place.startswith("ours")]
    assert not eyes.mixed
    assert sum(of_loss.values()) <= (12 if packed else 28), of_loss
    assert sum(of_update.values()) <= 1, of_update  # both norms
    assert len(of_gathers) <= (1 if packed else 2), of_gathers  # all metrics of a part of the steps
