"""GenEval's prompts (arXiv 2310.11513), drawn again from their seed, and any number of others to train on.

A prompt is drawn as clauses: which objects, how many, in which colours, where. GenEval's own 553 came from numpy's
generator with the seed 43; whoever asks it for the same numbers in the same order gets the same prompts. The digest
of the list holds that, see [`benchmark_rows`].
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ...rewards.geneval.rules import GENEVAL_COLORS, RELATIONS


GenEvalRow = dict[str, Any]
Clause = dict[str, Any]

BENCHMARK_SEED = 43
DIGEST = "4de60dfc3c29f9d3"
"""First 16 hexadecimal digits of the SHA-256 of GenEval's prompts, one a line."""

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COUNT_WORDS = ("zero", "one", "two", "three", "four")
PERSON = 0
"""Place of the class that no prompt gives a colour."""

# COCO's 80 classes in their order, three of them under the names that GenEval's detector has.
CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich"),
    *("orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed"),
    *("dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone"),
    *("microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear"),
    *("hair drier", "toothbrush"),
)


def benchmark_rows() -> list[GenEvalRow]:
    """
    Draw GenEval's 553 rows: `tag`, `include`, `prompt` and, of counting, `exclude`.

    Raises:
        RuntimeError: if numpy's generator no longer draws what it drew for the benchmark.
    """
    rows = draw_rows(BENCHMARK_SEED)
    found = digest(row["prompt"] for row in rows)
    if found != DIGEST:
        raise RuntimeError(
            f"The {len(rows)} prompts drawn have the digest {found}, GenEval's have {DIGEST}: numpy {np.__version__} "
            "draws other numbers than the versions that this was tested with. Install one of those."
        )
    return rows


def training_rows(seed: int, per_task: int = 100) -> list[GenEvalRow]:
    """
    Draw rows to train on, none of which asks for what one of the benchmark's asks for, also not in another order.

    There is no `single_object` among them: the benchmark has each class.

    Args:
        seed: other than the benchmark's, 43.
        per_task: rows drawn for each of the other five tasks; repetitions and the benchmark's are left out of them.

    Raises:
        ValueError: for the benchmark's seed, a negative one, or less than one row.
    """
    if seed < 0 or seed == BENCHMARK_SEED:
        raise ValueError(f"seed={seed}: expected 0 or more, and not {BENCHMARK_SEED}, which draws the benchmark.")
    if per_task < 1:
        raise ValueError(f"per_task={per_task}: expected at least 1.")
    taken = {meaning(row) for row in benchmark_rows()}
    return [row for row in draw_rows(seed, per_task) if meaning(row) not in taken]


def geneval_dataset(seed: int = 0, per_task: int = 100) -> Any:
    """
    Put [`training_rows`] into a `datasets.Dataset` for [`GenEvalReward`]: columns `prompt`, `tag`, and `geneval`, the
    row as JSON, as a table has no type for its positions.
    """
    from datasets import Dataset

    return Dataset.from_list([table_row(row) for row in training_rows(seed, per_task)])


def table_row(row: Mapping[str, Any]) -> dict[str, str]:
    return {"prompt": row["prompt"], "tag": row["tag"], "geneval": json.dumps(row)}


def digest(prompts: Iterable[str]) -> str:
    """Give 16 hexadecimal digits of the SHA-256 of a list's lines, by which the list is known."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]


def meaning(row: Mapping[str, Any]) -> Any:
    """Give what a row asks for, whatever the order: a dog left of a cat is a cat right of a dog."""
    clauses = [(item["class"], item["count"], item.get("color")) for item in row["include"]]
    if "position" not in row["include"][-1]:
        return frozenset(clauses)
    relation, _ = row["include"][-1]["position"]
    place = RELATIONS.index(relation)
    # "right of" and "below" are the second of each pair of opposites: there the two objects change places.
    return place // 2, tuple(reversed(clauses)) if place % 2 else tuple(clauses)


def draw_rows(seed: int, per_task: int = 100) -> list[GenEvalRow]:
    """Draw all tasks' rows, each once: every class for `single_object`, `per_task` draws for each other task."""
    rng = np.random.default_rng(seed)
    drawn: list[GenEvalRow] = [
        _row("single_object", [_clause(place)]) for place in rng.choice(len(CLASSES), len(CLASSES), replace=False)
    ]
    for task, draw in _DRAWS.items():
        drawn += [_row(task, draw(rng)) for _ in range(per_task)]
    kept: dict[tuple[str, str], GenEvalRow] = {}
    for row in drawn:
        kept.setdefault((row["tag"], row["prompt"]), row)
    return list(kept.values())


def _clause(place: int, count: int = 1, color: int | None = None) -> Clause:
    clause: Clause = {"class": CLASSES[place], "count": count}
    return clause if color is None else clause | {"color": GENEVAL_COLORS[color]}


def _two_object(rng: np.random.Generator) -> list[Clause]:
    return [_clause(place) for place in rng.choice(len(CLASSES), 2, replace=False)]


def _counting(rng: np.random.Generator) -> list[Clause]:
    place = rng.choice(len(CLASSES))
    return [_clause(place, int(rng.integers(2, len(COUNT_WORDS))))]


def _colors(rng: np.random.Generator) -> list[Clause]:
    place = _but_person(rng.choice(len(CLASSES) - 1))
    return [_clause(place, color=rng.choice(len(GENEVAL_COLORS)))]


def _position(rng: np.random.Generator) -> list[Clause]:
    first, second = rng.choice(len(CLASSES), 2, replace=False)
    relation = RELATIONS[rng.choice(len(RELATIONS))]
    return [_clause(second), _clause(first) | {"position": [relation, 0]}]


def _color_attr(rng: np.random.Generator) -> list[Clause]:
    places = _but_person(rng.choice(len(CLASSES) - 1, 2, replace=False))
    colors = rng.choice(len(GENEVAL_COLORS), 2, replace=False)
    return [_clause(place, color=color) for place, color in zip(places, colors, strict=True)]


_DRAWS: dict[str, Callable[[np.random.Generator], list[Clause]]] = {
    "two_object": _two_object,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
}


def _but_person(places: Any) -> Any:
    """Turn places among the 79 other classes into places among all, counted on from the person's."""
    return (places + 1 + PERSON) % len(CLASSES)


def _row(task: str, include: Sequence[Clause]) -> GenEvalRow:
    """Make a row in GenEval's form, its keys in GenEval's order."""
    row: GenEvalRow = {"tag": task, "include": list(include)}
    first = include[0]
    if task == "counting":
        row["exclude"] = [{"class": first["class"], "count": first["count"] + 1}]
        text = f"{COUNT_WORDS[first['count']]} {_plural(first['class'])}"
    elif task == "position":
        text = f"{_described(include[1])} {include[1]['position'][0]} {_described(first)}"
    else:
        text = " and ".join(map(_described, include))
    return row | {"prompt": f"a photo of {text}"}


def _described(clause: Clause) -> str:
    words = f"{clause['color']} {clause['class']}" if "color" in clause else clause["class"]
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(name: str) -> str:
    return f"{name}es" if name.endswith("s") else f"{name}s"
