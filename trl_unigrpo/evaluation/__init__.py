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
    from .refining import Look, Refinement, refine
    from .runner import Options, run

_HOME_OF = {
    "Guidance": "..flow.guidance",
    "Look": "refining",
    "Options": "runner",
    "Refinement": "refining",
    "Sample": "..sampling",
    "compare_folders": "compare",
    "generate": "..sampling",
    "geneval_dataset": "benchmarks.geneval_prompts",
    "load_benchmark": "benchmarks",
    "load_model": "models",
    "refine": "refining",
    "run": "runner",
}

__all__ = [
    "Guidance",
    "Look",
    "Options",
    "Refinement",
    "Sample",
    "compare_folders",
    "generate",
    "geneval_dataset",
    "load_benchmark",
    "load_model",
    "refine",
    "run",
]

__getattr__, __dir__ = lazy_names(__name__, _HOME_OF)
