"""What importing costs, and which way imports point."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import trl_unigrpo


PACKAGE = Path(trl_unigrpo.__file__).parent

# Neither `import trl_unigrpo` nor the command line may load a heavy package or one that only an extra installs.
HEAVY = (
    *("accelerate", "datasets", "diffusers", "jinja2", "matplotlib", "numpy", "pandas", "peft", "PIL", "pyarrow"),
    *("safetensors", "torch", "transformers", "trl"),
    *("bitsandbytes", "onnxruntime", "openai", "rapidocr", "scipy", "torchvision"),
)

OPTIONAL = ("bitsandbytes", "onnxruntime", "openai", "rapidfuzz", "rapidocr", "scipy", "torchvision")


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("module", ["trl_unigrpo", "trl_unigrpo.cli"])
def test_import_loads_nothing_heavy(module):
    code = f"import {module}, json, sys; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    assert json.loads(run_python(code)) == []


def test_import_is_fast():
    code = "from time import perf_counter as now; start = now(); import trl_unigrpo; print(now() - start)"
    assert min(float(run_python(code)) for _ in range(5)) < 0.1


@pytest.mark.parametrize("name", trl_unigrpo.__all__)
def test_public_names_resolve(name):
    value = getattr(trl_unigrpo, name)
    assert isinstance(value, str) if name == "__version__" else value.__name__ == name
    assert name in dir(trl_unigrpo)


def test_public_names_need_no_extra():
    names = ", ".join(name for name in trl_unigrpo.__all__ if name != "__version__")
    # Other libraries import some of these packages where they find them: here they find none.
    run_python(f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r})); from trl_unigrpo import {names}")


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'UniGRPOTrainers'"):
        _ = trl_unigrpo.UniGRPOTrainers


def imported_modules(file):
    """Modules of this package that a file imports anywhere, `if TYPE_CHECKING` and functions included, as dotted paths
    below the package: "flow.transition", "models.bagel.modeling", "" for the package itself."""
    here = file.relative_to(PACKAGE).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            absolute = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [PACKAGE.name, *here[: -node.level]] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            absolute = [[*module, alias.name] for alias in node.names]
        else:
            continue
        found |= {".".join(parts[1:]) for parts in absolute if parts[0] == PACKAGE.name}
    return found


def python_files(place):
    path = PACKAGE / place
    return sorted(path.rglob("*.py")) if path.is_dir() else [path] * path.exists()


# Where a part may import from; anything else of the package is forbidden to it.
MAY_IMPORT = {
    "flow": {"flow"},
    "guidance.py": {"flow"},
    "image_objectives.py": {"flow", "rollout"},
    "models": {"estimate", "flow", "guidance", "messages", "models", "rollout"},
    "rollout.py": {"flow", "guidance", "models"},
    "unigrpo_config.py": {"flow"},
}
# Parts that may import everything but these.
MAY_NOT_IMPORT = {
    "rewards": {"models", "unigrpo_trainer", "sft_trainer", "refl_trainer", "rollout"},
    "evaluation": {"unigrpo_trainer", "sft_trainer", "refl_trainer", "monitoring", "paper"},
    "monitoring": {"unigrpo_trainer", "sft_trainer", "refl_trainer"},
}


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_point_one_way(part):
    for file in python_files(part):
        tops = {module.split(".")[0] for module in imported_modules(file)}
        extra = tops - MAY_IMPORT[part] - {"__about__", "__version__"}
        assert not extra, f"{file.relative_to(PACKAGE)} imports {sorted(extra)} of this package"


@pytest.mark.parametrize("part", MAY_NOT_IMPORT)
def test_independent_parts(part):
    for file in python_files(part):
        tops = {module.split(".")[0] for module in imported_modules(file)}
        names = {module.rsplit(".")[-1] for module in imported_modules(file)}
        assert not tops & MAY_NOT_IMPORT[part], f"{file.relative_to(PACKAGE)}: {sorted(tops & MAY_NOT_IMPORT[part])}"
        assert not names & {"UniGRPOTrainer", "UnifiedSFTTrainer"}, f"{file.relative_to(PACKAGE)} imports a trainer"


def test_the_import_reader_reads(tmp_path, monkeypatch):
    """The two tests above would pass if it found nothing."""
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "trl_unigrpo")
    file = tmp_path / "trl_unigrpo" / "models" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import os\nimport trl_unigrpo.rewards.judge\nfrom . import auto\nfrom ..flow.schedule import sde_window\n"
        "def f():\n    from trl_unigrpo import shapeworld\n    from .. import rollout as r\n"
    )
    assert imported_modules(file) == {
        "rewards.judge",
        "models.auto",
        "flow.schedule.sde_window",
        "shapeworld",
        "rollout",
    }


def test_only_shapeworld_knows_shapeworld():
    """The demo runs the production path: no part of it may know the built-in world."""
    places = ["flow", "models", "rollout.py", "unigrpo_trainer.py", "unigrpo_config.py", "sft_trainer.py"]
    places += ["refl.py", "refl_trainer.py"]
    files = [file for place in places for file in python_files(place)]
    assert files
    assert [str(file) for file in files if "shapeworld" in file.read_text(encoding="utf-8").lower()] == []
