"""GenEval: are the objects there, how many, where, in which colour?"""

from ...rewards.geneval.geneval_questions import questions_from_geneval
from ..benchmark import Benchmark, Item, Painting
from ..metrics import all_correct
from .geneval_prompts import benchmark_rows


def load_geneval() -> Benchmark:
    """Make the 553 prompts, by rule. Overall is the mean of the six tasks' means, as in GenEval's own summary."""
    items = [
        Item(f"{place:05}", row["prompt"], row["tag"], questions_from_geneval(row), row)
        for place, row in enumerate(benchmark_rows())
    ]
    return Benchmark(
        "geneval", "GenEval", tuple(items), metric=all_correct, overall="tasks", painting=Painting(samples=4)
    )
