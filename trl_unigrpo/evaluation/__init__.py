"""Sampling from a trained model, benchmarks, scores and statistics."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names


if TYPE_CHECKING:
    from ..flow.guidance import Guidance
    from ..sampling import Sample, generate
    from .benchmarks import load_benchmark
    from .benchmarks.geneval_prompts import geneval_dataset
    from .compare import compare_folders
    from .models import load_model
    from .runner import Options, run

_HOME_OF = {
    "Guidance": "..flow.guidance",
    "Options": "runner",
    "Sample": "..sampling",
    "compare_folders": "compare",
    "generate": "..sampling",
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
