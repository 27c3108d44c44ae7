import subprocess
import sys
from importlib.metadata import version
from time import perf_counter

from typer.testing import CliRunner

from trl_unigrpo import __version__
from trl_unigrpo.cli import app


def test_help_answers_in_under_a_second():
    def seconds():
        start = perf_counter()
        subprocess.run([sys.executable, "-m", "trl_unigrpo.cli", "--help"], check=True, capture_output=True)
        return perf_counter() - start

    assert min(seconds() for _ in range(3)) < 1.0


def test_version():
    assert CliRunner().invoke(app, ["--version"]).output.strip() == __version__
    output = CliRunner().invoke(app, ["version"]).output
    assert f"trl-unigrpo {__version__}" in output and f"\ntrl {version('trl')}\n" in output


def test_unknown_command_is_refused():
    result = CliRunner().invoke(app, ["traim"])
    assert result.exit_code == 2 and "traim" in result.output
