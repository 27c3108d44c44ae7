"""The scripts in examples/ as they are, but for names and numbers."""

from tests.helpers.paths import ROOT


def run_example(name: str, **replaced: str) -> dict:
    """Run a script, in which each of some texts was replaced by another; returns its variables."""
    script = (ROOT / "examples" / name).read_text(encoding="utf-8")
    for old, new in replaced.items():
        assert old in script
        script = script.replace(old, new)
    found = {"__name__": "example"}
    exec(compile(script, name, "exec"), found)
    return found
