"""The version of this package, and of those it builds on: what a record of a run, or a report of a bug, needs."""

from importlib.metadata import PackageNotFoundError, version


__version__ = "0.1.0.dev0"


PACKAGES = ("torch", "trl", "transformers", "diffusers", "peft", "accelerate", "datasets")
"""Those whose version changes what training does."""


def versions(*more: str) -> dict[str, str]:
    """Package -> version, "not installed" where it isn't; of this package, of `PACKAGES` and of `more`."""
    found = {"trl-unigrpo": __version__}
    for package in (*PACKAGES, *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
