"""Set up for every test: nothing touches the network, and one thread computes."""

import gc
import importlib.metadata
import os
from functools import cache


os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

import pytest


pytest.register_assert_rewrite("tests.helpers")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny tensors gain nothing from threads, and sums come out the same everywhere."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def frozen_heap():
    """Leave what is imported out of garbage collection: every trainer collects, and would walk all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def packages_read_once():
    """Accelerate asks dozens of times a run whether a package is installed, and parses its metadata each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.metadata, "metadata", cache(importlib.metadata.metadata))
        yield


@pytest.fixture
def make_trainer(tmp_path):
    """Function that builds a trainer over a random tiny BAGEL; see `build_trainer`."""
    from tests.helpers.tiny_unified import build_trainer

    def make(output_dir=None, **arguments):
        return build_trainer(output_dir or tmp_path, **arguments)

    return make


@pytest.fixture
def train():
    """Function that trains and returns what the optimizer saw."""
    from tests.helpers.tiny_unified import Recorder

    def run(trainer):
        recorder = Recorder().attach(trainer)
        trainer.train()
        return recorder

    return run
