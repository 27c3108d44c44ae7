"""Instructions to edit: what they mean, what they change, and their score, against scenes written by hand."""

import numpy as np
import pytest

from trl_unigrpo.shapeworld import (
    shapeworld_edit_dataset,
    shapeworld_edit_reward,
    shapeworld_story_dataset,
    shapeworld_story_reward,
)
from trl_unigrpo.shapeworld.edits import (
    VERBS,
    all_edits,
    apply_changes,
    changes_of,
    parse_edit,
    score_edits,
    split_of_edit,
    untouched_cells,
)
from trl_unigrpo.shapeworld.render import render_images
from trl_unigrpo.shapeworld.tokenizer import shapeworld_tokenizer
from trl_unigrpo.shapeworld.verifier import images_to_array, read_cells
from trl_unigrpo.shapeworld.world import cell_code


def scene(**objects):
    """Cells by place: scene(left="red circle")."""
    places = ["top_left", "top", "top_right", "left", "center", "right", "bottom_left", "bottom", "bottom_right"]
    cells = np.zeros(9, dtype=np.int64)
    for place, name in objects.items():
        cells[places.index(place)] = cell_code(*name.split())
    return cells


SOURCE = scene(left="red circle", center="blue square", top="red square")


@pytest.mark.parametrize(
    "text, target",
    [
        ("make the red circle green", scene(left="green circle", center="blue square", top="red square")),
        ("make the square at top pink", scene(left="red circle", center="blue square", top="pink square")),
        ("remove the square at center", scene(left="red circle", top="red square")),
        ("move the red circle up", scene(top_left="red circle", center="blue square", top="red square")),
        ("move the blue square right", scene(left="red circle", right="blue square", top="red square")),
        (
            "swap the red circle and the blue square",
            scene(center="red circle", left="blue square", top="red square"),
        ),
        ("move the red circle left", None),  # off the grid
        ("move the red circle right", None),  # onto the square
        ("remove the green ring", None),
        ("swap the red circle and the pink ring", None),
        ("make the circle at center blue", None),
    ],
)
def test_what_an_instruction_changes(text, target):
    changes = changes_of(parse_edit(f"  {text} "), SOURCE)
    assert (changes is None) == (target is None)
    if target is not None:
        assert (apply_changes(SOURCE, changes) == target).all()
        assert sorted(changes) == np.flatnonzero(target != SOURCE).tolist()


def test_an_object_that_is_there_twice_is_not_named():
    twice = scene(left="red circle", right="red circle")
    assert changes_of(parse_edit("remove the red circle"), twice) is None
    assert changes_of(parse_edit("remove the circle at right"), twice) == {5: 0}


def test_done_and_kept_by_hand():
    edit = parse_edit("swap the red circle and the blue square")
    target = scene(center="red circle", left="blue square", top="red square")
    half = scene(center="red circle", left="green ring", top="red square")
    harmed = scene(center="red circle", left="blue square", top="red cross", bottom="red cross")
    scores = score_edits([edit] * 4, np.stack([SOURCE] * 4), np.stack([target, SOURCE, half, harmed]))
    assert scores.done.tolist() == [1, 0, 0.5, 1]
    assert scores.kept.tolist() == [1, 1, 1, 5 / 7]
    assert scores.reward == pytest.approx([1, 0, 0.5**0.5, (5 / 7) ** 0.5])


def test_the_edit_reward_reads_images():
    [source, target] = render_images(np.stack([SOURCE, scene(left="red circle", top="red square")]))
    prompt = [{"role": "user", "content": "remove the blue square"}]
    rewards = shapeworld_edit_reward(
        [prompt, prompt[0]["content"]],
        [""] * 2,
        [target, source],
        source_images=[[source], source],
        category=["x"] * 2,
    )
    assert rewards == [1.0, 0.0]
    with pytest.raises(ValueError, match="Row 0: 'remove the blue square' can't be followed"):
        shapeworld_edit_reward([prompt], [""], [target], source_images=[target])
    with pytest.raises(ValueError, match="1 images and 2 source images for 1 prompts"):
        shapeworld_edit_reward([prompt], [""], [target], source_images=[source, source])
    with pytest.raises(ValueError, match="'paint it red' is not an instruction"):
        shapeworld_edit_reward(["paint it red"], [""], [target], source_images=[source])


def test_a_story_keeps_what_its_earlier_turns_did():
    turns = ["remove the red square", "move the red circle up", "make the blue square pink"]
    after = [
        scene(left="red circle", center="blue square"),
        scene(top_left="red circle", center="blue square"),
        scene(top_left="red circle", center="pink square"),
    ]
    [source] = render_images(SOURCE)
    for number, image in enumerate(render_images(np.stack(after))):
        assert shapeworld_story_reward([""], [""], [image], [source], [turns], round_index=[number]) == [1.0]
    # The last turn is done, but the first one's square is back: one of eight other cells.
    back = render_images(scene(top_left="red circle", center="pink square", top="red square"))
    assert shapeworld_story_reward([""], [""], back, [source], [turns]) == pytest.approx([(7 / 8) ** 0.5])


def test_untouched_cells_are_those_of_no_turn():
    story = [parse_edit(text) for text in ("make the red circle green", "move the green circle up")]
    target = scene(top_left="green circle", center="blue square", top="red square")  # two cells were touched
    wrong = scene(top_left="pink ring", left="pink ring", center="blue square", top="red square", bottom="pink ring")
    assert untouched_cells([story] * 3, np.stack([SOURCE] * 3), np.stack([target, wrong, SOURCE])).tolist() == [
        1.0,
        pytest.approx(6 / 7),
        1.0,
    ]


def test_instructions_of_one_meaning_share_a_split():
    splits = {}
    for edit in all_edits().values():
        splits.setdefault(edit.content, set()).add(split_of_edit(edit))
    assert all(len(found) == 1 for found in splits.values())
    assert len(splits) == len(all_edits()) - 435  # either order of a swap
    share = [np.mean([split in found for found in splits.values()]) for split in ("train", "validation", "test")]
    assert share == pytest.approx([0.7, 0.1, 0.2], abs=0.03)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_datasets_can_be_followed(split):
    rows, stories = shapeworld_edit_dataset(split, 60, seed=3), shapeworld_story_dataset(split, 20, seed=3)
    assert set(rows["category"]) == set(VERBS)
    scenes = read_cells(images_to_array(list(stories["source_image"])))[0]
    for text, image in zip(rows["prompt"], rows["source_image"], strict=True):
        assert split_of_edit(parse_edit(text)) == split
        assert changes_of(parse_edit(text), read_cells(images_to_array([image]))[0][0])
    for prompt, turns, cells in zip(stories["prompt"], stories["turns"], scenes, strict=True):
        assert (prompt, len(turns)) == (turns[0], 3)
        for text in turns:
            cells = apply_changes(cells, changes_of(parse_edit(text), cells))
    assert shapeworld_edit_dataset(split, 60, seed=3)["prompt"][:60] == rows["prompt"][:60]


def test_every_word_is_in_the_vocabulary():
    tokenizer = shapeworld_tokenizer(seeing=True)
    assert all(tokenizer.unk_token_id not in ids for ids in tokenizer(list(all_edits()))["input_ids"])
    old, new = shapeworld_tokenizer().get_vocab(), tokenizer.get_vocab()
    assert old.items() < new.items()
