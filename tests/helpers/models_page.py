"""The code of docs/models.md, as a reader would run it, and the model that it defines."""

import functools
import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from tests.helpers.paths import ROOT


def code_blocks() -> list[str]:
    """The page's blocks of Python, from top to bottom."""
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    return [part.split("```")[0] for part in page.split("```python\n")[1:]]


@functools.cache
def toy_module() -> ModuleType:
    """The models and the tokenizer, as a file that is imported: once, as it registers a class."""
    file = Path(tempfile.mkdtemp()) / "toy_painter.py"
    (packed,) = [
        block.split("\n\n\ncontract_tests")[0] for block in code_blocks() if "class PackedToyPainter" in block
    ]
    file.write_text("\n\n".join([*code_blocks()[:2], packed]), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("toy_painter", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_painter"] = module
    spec.loader.exec_module(module)
    return module
