"""Trainers over a random tiny BAGEL; nothing here touches the network."""

import os


os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")

import pytest
import torch
from tiny_unified import Recorder, build_trainer
from transformers.utils import logging


logging.disable_progress_bar()


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny tensors gain nothing from threads, and sums come out the same everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_trainer(tmp_path):
    """Function that builds a trainer; see `build_trainer`."""

    def make(output_dir=None, **arguments):
        return build_trainer(output_dir or tmp_path, **arguments)

    return make


@pytest.fixture
def train():
    """Function that trains and returns what the optimizer saw."""

    def run(trainer):
        recorder = Recorder().attach(trainer)
        trainer.train()
        return recorder

    return run
