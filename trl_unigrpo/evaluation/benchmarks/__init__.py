"""The benchmarks: own prompts, and loaders for files that the user has."""

from importlib import import_module
from pathlib import Path

from ..benchmark import Benchmark


BUILT_IN = {"geneval": "load_geneval", "shapeworld": "load_shapeworld"}
FROM_FILES = {
    "dpg": "load_dpg",
    "tiif": "load_tiif",
    "wise": "load_wise",
    "geneval2": "load_geneval2",
    "gedit": "load_gedit",
    "imgedit": "load_imgedit",
    "prompts": "load_own_prompts",
}
"""Benchmark, which is also the name of its module -> the function in it that loads the benchmark."""


def load_benchmark(
    name: str, data: str | Path | None = None, num_prompts: int | None = None, seed: int | None = None
) -> Benchmark:
    """
    Load a benchmark by its name.

    Args:
        data: its file or folder, for one of `FROM_FILES`.
        num_prompts, seed: of ShapeWorld, whose prompts are drawn.

    Raises:
        OSError, ValueError: for an unknown name, and for data that is missing, not expected or unreadable.
    """
    if name not in (*BUILT_IN, *FROM_FILES):
        raise ValueError(f"benchmark={name!r}: expected one of {', '.join((*BUILT_IN, *FROM_FILES))}.")
    if (data is None) != (name in BUILT_IN):
        raise ValueError(
            f"The benchmark {name!r} needs data: the path of its file or folder."
            if data is None
            else f"The benchmark {name!r} is built in and takes no data, got {str(data)!r}."
        )
    load = getattr(import_module(f"{__name__}.{name}"), {**BUILT_IN, **FROM_FILES}[name])
    if name == "shapeworld":
        return load(num_prompts, seed)
    return load() if data is None else load(data)
