"""The scripts of `examples/`, run as they are but for names and sizes."""

from tests.helpers.paths import ROOT


def run_example(name: str, changes: dict[str, str]) -> dict:
    """Run a script with some of its text replaced, each of which it has; returns its names."""
    script = (ROOT / "examples" / name).read_text(encoding="utf-8")
    for old, new in changes.items():
        assert old in script, old
        script = script.replace(old, new)
    found = {"__name__": "example"}
    exec(compile(script, name, "exec"), found)
    return found
