"""The cost of importing, and the public names."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import trl_unigrpo


# Neither `import trl_unigrpo` nor the command line may load a heavy package or one that only an extra installs.
HEAVY = (
    *("accelerate", "datasets", "diffusers", "jinja2", "matplotlib", "numpy", "pandas", "peft", "PIL", "pyarrow"),
    *("safetensors", "torch", "transformers", "trl"),
    *("bitsandbytes", "onnxruntime", "openai", "rapidocr", "scipy", "torchvision"),
)

OPTIONAL = ("bitsandbytes", "onnxruntime", "openai", "rapidfuzz", "rapidocr", "scipy", "torchvision")


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


HELP = "from trl_unigrpo.cli import app; app(['--help'], standalone_mode=False)"


@pytest.mark.parametrize(
    "code", ["import trl_unigrpo", "import trl_unigrpo.cli", HELP], ids=["package", "cli", "help"]
)
def test_nothing_heavy_is_loaded(code):
    answer = run_python(f"{code}\nimport json, sys; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))")
    assert json.loads(answer.splitlines()[-1]) == []


def test_import_loads_the_standard_library_and_little_of_its_own():
    code = "import sys; old = {*sys.modules}; import trl_unigrpo; print(*({*sys.modules} - old))"
    new = run_python(code).split()
    assert {name.split(".")[0] for name in new} <= {"trl_unigrpo", *sys.stdlib_module_names}
    own = sorted(name for name in new if name.startswith("trl_unigrpo"))
    assert own == ["trl_unigrpo", "trl_unigrpo.__about__", "trl_unigrpo.lazy"]


@pytest.mark.parametrize("name", trl_unigrpo.__all__)
def test_public_names_resolve(name):
    value = getattr(trl_unigrpo, name)
    assert isinstance(value, str) if name == "__version__" else value.__name__ == name
    assert name in dir(trl_unigrpo)


def test_no_module_imports_an_extra_at_its_top():
    files = Path(trl_unigrpo.__file__).parent.rglob("*.py")
    tops = [node for file in files for node in ast.parse(file.read_text("utf-8")).body]
    found = {alias.name for node in tops if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in tops if isinstance(node, ast.ImportFrom) and not node.level}
    assert "torch" in found
    assert {name.split(".")[0] for name in found} & set(OPTIONAL) == set()


@pytest.mark.slow  # ten seconds of imports; the test above reads what these could import
def test_public_names_need_no_extra():
    names = ", ".join(name for name in trl_unigrpo.__all__ if name != "__version__")
    # Other libraries import some of these packages where they find them: here they find none.
    run_python(f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r})); from trl_unigrpo import {names}")


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'UniGRPOTrainers'"):
        _ = trl_unigrpo.UniGRPOTrainers
