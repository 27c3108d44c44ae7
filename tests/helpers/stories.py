"""Stories of one to three turns, with a source image or without, over the tiny BAGEL with texts known beforehand."""

from datasets import Dataset

from tests.helpers.editing import source, tiny_editor
from tests.helpers.rounds import FixedRounds
from tests.helpers.tiny_unified import build_trainer


TURNS = {
    "a red cat": ["a red cat", "a big green dog runs", "the mat"],
    "a small tree": ["a small tree"],
    "the blue cat sits": ["the blue cat sits", "a dog and a tree"],
}


def stories(turns=None, sources=True, first_source: int = 0) -> Dataset:
    """One row for each prompt of some stories, which are [`TURNS`] by default."""
    turns = TURNS if turns is None else turns
    columns = {"prompt": list(turns), "turns": list(turns.values())}
    if sources:
        columns["source_image"] = [source(first_source + i) for i in range(len(turns))]
    return Dataset.from_dict(columns)


def story_trainer(output_dir, trainer_class=FixedRounds, model=None, **settings):
    """Three groups of four, one for each of the stories."""
    plain = {"num_rounds": 3, "stop_text": "tree", "max_reflection_length": 4, "round_reward": "sum"}
    plain |= {"gradient_accumulation_steps": 3, "train_dataset": stories()}
    model = tiny_editor() if model is None else model
    return build_trainer(output_dir, model=model, trainer_class=trainer_class, **{**plain, **settings})
