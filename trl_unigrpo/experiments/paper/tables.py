"""The page's tables, as Markdown that both GitHub and mkdocs render."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .claims import JOINT, LONG, REFERENCE, comparison, mean_rule, title
from .markdown import (
    NONE,
    escape,
    interval,
    markdown_table,
    number,
    p_value,
    rate,
)
from .order import main_mode
from .systems import SYSTEMS


WEIGHT_OF_RATE = {"learning_rate": "text_weight", "image_learning_rate": "flow_weight"}
"""Learning rate -> the weight that is 0 where it trains nothing."""
LISTED = 4
"""More changed settings than these would fill a table, and say less than the text below it."""
IMAGE_MEASURES = ("image error", "latent distance", "distinct images")

TableRow = tuple[str, Mapping[str, Any], str]
"""A system's name, what results.json holds of it, and the mode in which it is evaluated."""


def rows(results: Mapping[str, Any], *groups: str) -> list[TableRow]:
    """List the table rows of some groups, in the page's order."""
    return [
        (name, system, mode)
        for name, system in results["systems"].items()
        if system["group"] in groups
        for mode in ("direct", "sampled", "rounds")
        if (system["modes"].get(mode) or {}).get("rule")
    ]


def emphasized(row: TableRow, cells: list[str]) -> list[str]:
    """Make UniGRPO's row bold."""
    return [f"**{cell}**" for cell in cells] if row[0] == REFERENCE[0] else cells


def table1(results: Mapping[str, Any]) -> str:
    """Tabulate every system in every way to paint, against UniGRPO."""
    header = ["system", "thinking", "rule", "minus UniGRPO", "Holm p", "questions", "learned reward", "seeds"]
    lines = []
    for row in rows(results, "table1"):
        _, system, mode = row
        found = system["modes"][mode]
        cells = [
            escape(system["title"]),
            "yes" if mode == "sampled" else "no",
            interval(found["rule"]),
            *_difference(found),
            number(found["questions"]),
            interval(found["learned"]),
            str(len(found["seeds"])) if system["trained"] else NONE,
        ]
        lines.append(emphasized(row, cells))
    return markdown_table(header, lines, text_columns=2)


def details_table(results: Mapping[str, Any], *groups: str) -> str:
    """Tabulate what plans and images are worth, where runs were stopped, and what training cost."""
    header = ["system", "greedy", "strict", "plan", "clipped", *IMAGE_MEASURES, "stopped at", "CPU seconds"]
    lines = []
    for row in rows(results, *groups):
        name, system, mode = row
        found = system["modes"][mode]
        greedy = system["modes"].get("greedy", {}).get("rule") if mode == "sampled" else None
        stopped = system["stopped"]
        cells = [
            escape(title(results, (name, mode))),
            number(greedy["mean"] if greedy else None),
            *(number(found[key]) for key in ("strict", "plan")),
            number(system["clip_frac"], 2),
            *_image_measures(row),
            number(sum(stopped) / len(stopped) if stopped else None, 2),
            f"{system['train_cpu_seconds']:,.0f}" if system["trained"] else NONE,
        ]
        lines.append(emphasized(row, cells))
    return markdown_table(header, lines)


def _image_measures(row: TableRow) -> list[str]:
    """Write the columns of `IMAGE_MEASURES`."""
    name, system, mode = row
    found = system["modes"][mode]
    # Diversity is measured once per run, in the system's own way to paint.
    distinct = system["diversity"].get("distinct_images") if mode == main_mode(name) else None
    distance = number(found["latent_distance"], 3, significant=True)
    return [number(found["image_error"], 4), distance, number(distinct, 2)]


def _difference(found: Mapping[str, Any]) -> list[str]:
    difference = found.get("difference")
    if not difference:
        return [NONE, NONE]
    return [interval(difference, "+"), p_value(difference["p_holm"]) if "p_holm" in difference else NONE]


def joint_table(results: Mapping[str, Any]) -> str:
    """Tabulate the rule of each image objective, trained alone and together with the thinking. Nothing without any."""
    lines = [
        [
            f"{escape(title(results, alone))} → {escape(title(results, both))}",
            *(interval(mean_rule(results, side)) for side in (alone, both)),
            interval(difference, "+"),
        ]
        for both, alone in JOINT
        if (difference := comparison(results, both, alone))
    ]
    header = ["image expert alone → both experts", "alone", "both", "difference"]
    return markdown_table(header, lines) if lines else ""


def category_table(results: Mapping[str, Any]) -> str:
    """Tabulate the mean rule by category; the highest of each column is bold."""
    categories = list(results["prompts"]["categories"])
    shown = rows(results, "table1")
    means = {
        category: [of["mean"] for _, system, mode in shown if (of := system["modes"][mode]["categories"][category])]
        for category in categories
    }
    lines = []
    for row in shown:
        found = row[1]["modes"][row[2]]["categories"]
        cells = [interval(found[category], digits=2) if found[category] else NONE for category in categories]
        best = [bool(found[of]) and found[of]["mean"] == max(means[of]) for of in categories]
        marked = (f"**{cell}**" if bold else cell for cell, bold in zip(cells, best, strict=True))
        lines.append([escape(title(results, (row[0], row[2]))), *marked])
    return markdown_table(["system", *(escape(of.replace("_", " ")) for of in categories)], lines)


def changes_table(results: Mapping[str, Any], group: str) -> str:
    """
    Tabulate what each system of a group changed of UniGRPO's settings, and what came of it, against UniGRPO or what it
    builds on. Nothing without any.
    """
    shown = rows(results, group)
    if not shown:
        return ""
    own = [row for row in rows(results, "table1") if row[0] == REFERENCE[0]]
    header = ["run", "changed", "against", "rule", "difference", "questions", "learned reward", "seeds"]
    lines = []
    for row in own + shown:
        name, system, mode = row
        found = system["modes"][mode]
        difference = found.get("difference")
        cells = [
            escape(title(results, (name, mode))),
            changed(system["settings"], own[0][1]["settings"]) if own else NONE,
            escape(title(results, tuple(difference["to"]))) if difference else NONE,
            interval(found["rule"]),
            interval(difference, "+") if difference else NONE,
            number(found["questions"]),
            interval(found["learned"]),
            str(len(found["seeds"])) if system["trained"] else NONE,
        ]
        lines.append(emphasized(row, cells))
    return markdown_table(header, lines, text_columns=3)


def changed(settings: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    """List the settings that differ from a reference, those it does not have included; count them if they are many."""
    found = {key: value for key, value in settings.items() if key not in reference or reference[key] != value}
    if len(found) > LISTED:
        return f"{len(found)} settings, in its run.json"
    values = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in found.items()}
    return ", ".join(f"{escape(key)} = {escape(value)}" for key, value in values.items()) or NONE


def guidance_table(results: Mapping[str, Any]) -> str:
    """Tabulate Figure 4's two by two."""
    figure = results["figure4"]
    lines = []
    for name, cells in figure["cells"].items():
        values = [cells.get(mode) for mode in ("sampled", "guided")]
        lines.append([escape(results["systems"][name]["title"]), *(interval(of) if of else NONE for of in values)])
    return markdown_table(["trained", "evaluated without guidance", "evaluated with guidance"], lines)


def regularizer_table(results: Mapping[str, Any]) -> str:
    """Tabulate the ends of the long runs."""
    header = ["run", "learned reward", "rule", "minus velocity MSE", "Holm p", "questions"]
    header += ["image error", "as a multiple", "latent distance", "distinct images"]
    lines = []
    for name, found in results["figure5"].items():
        ratio = found["image_error_ratio"]
        spread = f" [{ratio['low']:.3g}, {ratio['high']:.3g}]" if ratio and ratio["low"] is not None else ""
        difference = _difference(results["systems"][name]["modes"]["sampled"]) if name != "base" else [NONE, NONE]
        cells = [
            escape(found["title"]),
            *(interval(found[key]) if found[key] else NONE for key in ("learned", "rule")),
            *difference,
            number(found["questions"]),
            number(found["image_error"], 4),
            f"x {ratio['ratio']:.3g}{spread}" if ratio else NONE,
            number(found["latent_distance"], 3, significant=True),
            number(found["distinct"], 2),
        ]
        lines.append([f"**{cell}**" for cell in cells] if name == LONG[0] else cells)
    return markdown_table(header, lines)


def search_table(results: Mapping[str, Any]) -> str:
    """Tabulate each method's candidates with their learned reward on validation prompts; the chosen one is bold."""
    entries = results["search"]
    titles = {name: of.title for name, of in SYSTEMS.items()}  # what was searched need not have been run
    titles |= {name: of["title"] for name, of in results["systems"].items()}
    width = max((len(of["candidates"]) for of in entries.values()), default=0)
    lines = []
    for name, entry in entries.items():
        cells = [escape(titles.get(name, name)), " / ".join(map(escape, _searched(entry)))]
        for i, of in enumerate(entry["candidates"]):
            rates = " / ".join(rate(of["settings"][key]) for key in _searched(entry))
            text = f"{rates}: {of['reward']:.3f}" + " ≈" * (i in entry["as_good"])
            cells.append(
                f"**{text}**" + " (edge)" * bool(entry["at_edge"]) if of["settings"] == entry["chosen"] else text
            )
        lines.append(cells + [NONE] * (width - len(entry["candidates"])))
    return markdown_table(["method", "rates", *(f"candidate {i + 1}" for i in range(width))], lines, 2)


def _searched(entry: Mapping[str, Any]) -> list[str]:
    """Name the settings among which was searched; one of two that always go together."""
    columns = {key: [of["settings"][key] for of in entry["candidates"]] for key in entry["candidates"][0]["settings"]}
    return [key for i, key in enumerate(columns) if columns[key] not in list(columns.values())[:i]]


def verdict_table(results: Mapping[str, Any]) -> str:
    """Tabulate the paper's claims and if they hold here, and nothing else."""
    lines = [[f"{escape(of['text'])} ({escape(of['where'])})", f"**{of['verdict']}**"] for of in results["claims"]]
    return markdown_table(["the paper", "here"], lines, text_columns=2)


def claims_table(results: Mapping[str, Any]) -> str:
    """Tabulate the numbers behind each verdict."""
    lines = [
        [
            f"{escape(of['text'])}: **{of['verdict']}**",
            "<br>".join(escape(part) for part in of["sentence"].split("; ")),
        ]
        for of in results["claims"]
    ]
    return markdown_table(["claim", "numbers"], lines, text_columns=2)


def seed_lines(results: Mapping[str, Any]) -> list[str]:
    """List what is missing: systems without a run, systems without some of their seeds, and evaluations."""
    alike: dict[str, list[str]] = {}
    for name, of in results["missing"]["seeds"].items():
        done = len(of["expected"]) - len(of["missing"])
        seeds = "seed" if len(of["expected"]) == 1 else "seeds"
        lacking = f" (without {', '.join(map(str, of['missing']))})" if done else ""
        alike.setdefault(f"{done} of {len(of['expected'])} {seeds}{lacking}", []).append(f"`{name}`")
    lines = [f"{what}: {', '.join(names)}" for what, names in alike.items()]
    for name, modes in results["missing"]["modes"].items():
        for mode, seeds_without in modes.items():
            lines.append(f"`{name}`: no evaluation `{mode}` of seeds {', '.join(map(str, seeds_without))}")
    return lines


def above_unigrpo(results: Mapping[str, Any]) -> str:
    """Name the rows of Table 1 that are above UniGRPO, intervals apart."""
    own = mean_rule(results, REFERENCE)
    if own is None:
        return "not known, UniGRPO was not measured"
    shown = [(name, mode) for name, _, mode in rows(results, "table1")]
    above = [title(results, of) for of in shown if mean_rule(results, of)["low"] > own["high"]]
    return "; ".join(map(escape, above)) or "none"


def rate_table(results: Mapping[str, Any]) -> str:
    """Tabulate the learning rates that each system of Table 1 was trained with."""
    lines = [
        [
            escape(of["title"]),
            *(
                rate(of["settings"][key]) if key in of["settings"] and of["settings"].get(weight, 1) else NONE
                for key, weight in WEIGHT_OF_RATE.items()
            ),
        ]
        for of in results["systems"].values()
        if of["group"] == "table1" and of["trained"]
    ]
    return markdown_table(["system", "learning rate", "of the image expert"], lines)


def unequal_rollouts(results: Mapping[str, Any]) -> str:
    """Name the systems of Table 1 that did not train on as many rollouts as UniGRPO, with their numbers."""
    systems = results["systems"]
    own = systems.get(REFERENCE[0], {}).get("rollouts")
    return ", ".join(
        f"{escape(of['title'])} ({of['rollouts']:,})"
        for of in systems.values()
        if of["group"] == "table1" and of["trained"] and of["rollouts"] != own
    )


def trace_titles(results: Mapping[str, Any], trace: Mapping[str, Any]) -> list[str]:
    return [escape(results["systems"][system]["title"]) for system in trace["samples"]]


def trace_table(results: Mapping[str, Any], trace: Mapping[str, Any]) -> str:
    """Tabulate what each system thought of one prompt, and what its image scored."""
    lines = [
        [name, escape(unwrapped(of["thinking"])) or NONE]
        + [number(of["rule"], 2), number(of["learned"], 2), number(of["image_error"], 4)]
        for name, of in zip(trace_titles(results, trace), trace["samples"].values(), strict=True)
    ]
    return markdown_table(["", "thinking", "rule", "learned reward", "image error"], lines, text_columns=2)


def unwrapped(thinking: str) -> str:
    """Take the tags off a thinking, unless it was never closed."""
    text = thinking.strip()
    closed = text.startswith("<think>") and text.endswith("</think>")
    return text.removeprefix("<think>").removesuffix("</think>").strip() if closed else text
