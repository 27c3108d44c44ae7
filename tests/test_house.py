"""The house: which way imports point, and how large its rooms are."""

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

import trl_unigrpo


PACKAGE = Path(trl_unigrpo.__file__).parent

# From the ground up. An import may only point down: to a line above its own, or into its own entry.
LAYERS = (
    ("__about__", "image_sizes", "images", "lazy", "messages", "seeding", "statistics"),
    ("flow",),
    ("trajectory",),
    ("models", "rewards"),
    ("sampling",),
    ("shapeworld", "estimate"),
    ("monitoring",),
    ("reporting",),
    ("trainers", "evaluation"),
    ("testing", "experiments"),
    ("cli",),
    ("__init__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def files(package=None):
    return sorted((package or PACKAGE).rglob("*.py"))


def module_of(file, package=None):
    """Dotted path below the package: "flow.transition", "flow" for its `__init__`, "__init__" for the package's."""
    parts = file.relative_to(package or PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


@cache
def modules(package):
    return {module_of(file, package) for file in files(package)}


@cache
def imports_of(file, package=None):
    """Modules of the package that a file imports anywhere, functions and `if TYPE_CHECKING` included."""
    package = package or PACKAGE
    here = file.relative_to(package).with_suffix("").parts
    known = modules(package)
    found = set()
    for node in ast.walk(python(file)):
        if isinstance(node, ast.Import):
            absolute = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [package.name, *here[: -node.level]] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            absolute = [[*module, alias.name] for alias in node.names]
        else:
            continue
        for name, *parts in absolute:
            if name != package.name:
                continue
            while parts and ".".join(parts) not in known:
                parts = parts[:-1]
            found.add(".".join(parts) or "__init__")
    return found - {module_of(file, package)}


def top(module):
    return module.split(".")[0]


def upward(package=None):
    """Imports that do not point down."""
    return [
        f"{module_of(file, package)} -> {imported}"
        for file in files(package)
        for imported in sorted(imports_of(file, package))
        if top(imported) != top(module_of(file, package))
        and LEVEL[top(imported)] >= LEVEL[top(module_of(file, package))]
    ]


def circles(package=None):
    """Groups of modules that import one another, in however many steps."""
    graph = {module_of(file, package): imports_of(file, package) for file in files(package)}

    def reached(start):
        seen, todo = set(), [start]
        while todo:
            for module in graph.get(todo.pop(), ()):
                if module not in seen:
                    seen.add(module)
                    todo.append(module)
        return seen

    reach = {module: reached(module) for module in graph}
    return sorted({tuple(sorted(m for m in reach[a] if a in reach[m])) for a in graph if a in reach[a]})


def test_imports_point_down():
    assert upward() == []


def test_no_import_circles():
    assert circles() == []


def test_the_import_reader_reads(tmp_path):
    """The tests above would pass if it found nothing."""
    package = tmp_path / "trl_unigrpo"
    for name, text in {
        "__init__": "",
        "flow/__init__": "from .schedule import shift\n",
        "flow/schedule": "def shift():\n    from ..models import auto\n",
        "models/__init__": "",
        "models/auto": "import os\nimport trl_unigrpo.flow.schedule\nfrom .. import sampling as s\n",
        "sampling": "",
    }.items():
        file = package / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert imports_of(package / "models/auto.py", package) == {"flow.schedule", "sampling"}
    assert upward(package) == ["flow.schedule -> models.auto", "models.auto -> sampling"]
    assert circles(package) == [("flow.schedule", "models.auto")]


def test_only_shapeworld_knows_shapeworld():
    """The demo runs the production path: no part of it may know the built-in world."""
    places = [file for part in ("flow", "models", "sampling", "trainers") for file in files(PACKAGE / part)]
    places.append(PACKAGE / "trajectory.py")
    assert [str(file) for file in places if file.exists() and "shapeworld" in file.read_text().lower()] == []


@cache
def python(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def long_functions(package=None, limit=60):
    """Functions of more lines, docstring included."""
    return [
        f"{module_of(file, package)}.{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for file in files(package)
        for node in functions(python(file))
        if node.end_lineno - node.lineno + 1 > limit
    ]


def long_files(package=None, limit=450):
    lines = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in files(package)}
    return [f"{module_of(file, package)}: {number} lines" for file, number in lines.items() if number > limit]


def public_api(package=None):
    """Names that a package's `__init__` offers."""
    names = set()
    for file in files(package):
        if file.name == "__init__.py":
            for node in ast.walk(python(file)):
                if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                    names |= set(ast.literal_eval(node.value))
    return names


def many_parameters(package=None, limit=9):
    """Functions of more parameters, `self` aside, that are neither public names nor their methods."""
    public, found = public_api(package), []
    for file in files(package):
        tree = python(file)
        exempt = {node for node in tree.body if getattr(node, "name", "") in public}
        exempt |= {part for node in exempt if isinstance(node, ast.ClassDef) for part in node.body}
        for node in functions(tree):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            number = len([name for name in names if name not in ("self", "cls")])
            if number > limit and node not in exempt:
                found.append(f"{module_of(file, package)}.{node.name}: {number} parameters")
    return found


def defined_privately(tree):
    """Private names that a module defines: functions, classes, variables, and attributes of `self` or of a class."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def private_access(package=None):
    """Uses of a private name of another module of the package."""
    trees = {file: python(file) for file in files(package)}
    private = {file: defined_privately(tree) for file, tree in trees.items()}
    found = []
    for file, tree in trees.items():
        others = set().union(*(names for other, names in private.items() if other != file))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                used = [alias.name for alias in node.names if node.level]
            elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") not in ("self", "cls"):
                used = [node.attr]
            else:
                continue
            found += [
                f"{module_of(file, package)}: {name}" for name in used if name in others and name not in private[file]
            ]
    return sorted(found)


def doubled_names(package=None):
    """Public functions, classes and constants that two modules define; `logger` and `main` are everybody's own."""
    homes = defaultdict(set)
    for file in files(package):
        for node in python(file).body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                homes[node.name].add(module_of(file, package))
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                for target in getattr(node, "targets", [getattr(node, "target", None)]):
                    homes[getattr(target, "id", "_")].add(module_of(file, package))
    return {
        name: sorted(at)
        for name, at in sorted(homes.items())
        if len(at) > 1 and not name.startswith("_") and name not in ("logger", "main")
    }


MEASURES = (long_functions, long_files, many_parameters, private_access, doubled_names)


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.__name__)
def test_rooms_are_small(measure):
    assert not measure()


def test_the_measures_measure(tmp_path):
    package = tmp_path / "trl_unigrpo"
    package.mkdir()
    (package / "__init__.py").write_text('__all__ = ["shown"]\n')
    (package / "a.py").write_text(
        "def one(a, b, c, d, e, f, g, h, i, j):\n" + "    pass\n" * 60 + "def shown(a, b, c, d, e, f, g, h, i, j):\n"
        "    return a._hidden, a._other\n" + "\n" * 400
    )
    (package / "b.py").write_text("from .a import _own\n\n_hidden = 1\n\n\ndef one(self):\n    self._other = 2\n")
    assert long_functions(package) == ["a.one: 61 lines"]
    assert long_files(package) == ["a: 463 lines"]
    assert many_parameters(package) == ["a.one: 10 parameters"]
    assert private_access(package) == ["a: _hidden", "a: _other"]
    assert doubled_names(package) == {"one": ["a", "b"]}


if __name__ == "__main__":
    for measure in (upward, circles, *MEASURES):
        found = measure()
        print(f"{measure.__name__}: {len(found)}")
        for item in found.items() if isinstance(found, dict) else found:
            print("   ", item)
