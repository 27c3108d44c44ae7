"""Sampling from a trained model, benchmarks, scores and statistics."""

from typing import TYPE_CHECKING

from ..guidance import Guidance
from ..lazy import lazy_names
from .generate import Sample, generate


if TYPE_CHECKING:
    from .benchmarks import load_benchmark
    from .benchmarks.geneval_prompts import geneval_dataset
    from .compare import compare_folders
    from .models import load_model
    from .runner import Options, run

_HOME_OF = {
    "Options": "runner",
    "compare_folders": "compare",
    "geneval_dataset": "benchmarks.geneval_prompts",
    "load_benchmark": "benchmarks",
    "load_model": "models",
    "run": "runner",
}

__all__ = [
    "Guidance",
    "Options",
    "Sample",
    "compare_folders",
    "generate",
    "geneval_dataset",
    "load_benchmark",
    "load_model",
    "run",
]

__getattr__, __dir__ = lazy_names(__name__, _HOME_OF)
