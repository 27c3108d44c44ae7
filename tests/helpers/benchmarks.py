"""The scripts in benchmarks/, as modules."""

import importlib.util
import sys

from tests.helpers.paths import ROOT


def load(name: str):
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)  # as where a script runs, for those that import one another
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module
