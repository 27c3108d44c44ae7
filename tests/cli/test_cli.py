from importlib.metadata import version

from typer.testing import CliRunner

from trl_unigrpo import __version__
from trl_unigrpo.cli import app


def test_version():
    assert CliRunner().invoke(app, ["--version"]).output.strip() == __version__
    output = CliRunner().invoke(app, ["version"]).output
    assert f"trl-unigrpo {__version__}" in output and f"\ntrl {version('trl')}\n" in output


def test_unknown_command_is_refused():
    result = CliRunner().invoke(app, ["traim"])
    assert result.exit_code == 2 and "traim" in result.output
