"""The grid as the page needs it: which systems there are, in which order, and which runs make it whole."""

from __future__ import annotations

from .systems import DIRECT, GROUPS, SYSTEMS


GROUP_SYSTEMS: dict[str, tuple[str, ...]] = {
    group: tuple(name for name, of in SYSTEMS.items() if of.group == group and not of.hidden) for group in GROUPS
} | {"hidden": tuple(name for name, of in SYSTEMS.items() if of.hidden)}
"""Group -> systems. Those of "hidden", whatever group a run names, only are others' starts and stand in no table."""

WITHOUT_THINKING = tuple(name for name, of in SYSTEMS.items() if of.modes == DIRECT)
"""Trained and evaluated from the prompt alone. The base and the fine-tuned ones are evaluated both ways."""

ORDER = tuple(name for names in GROUP_SYSTEMS.values() for name in names)


def full_grid() -> dict[str, tuple[int, ...]]:
    """List system -> the seeds of the full grid. The base is not trained: one run of it stands for all seeds."""
    return {name: SYSTEMS[name].seeds for name in ORDER}


def position(system: str) -> tuple[int, str]:
    """Give a key that sorts systems as the page shows them; unknown ones last, by name."""
    return (ORDER.index(system) if system in ORDER else len(ORDER), system)


def main_mode(system: str) -> str:
    """Name the evaluation by which a system is judged: its own way to paint, thinkings sampled."""
    return "direct" if system in WITHOUT_THINKING else "sampled"
