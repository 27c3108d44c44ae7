"""The corpus of second looks and edits: kinds of rows, and the mistakes that are made on purpose."""

from collections import Counter

import numpy as np
import pytest

from trl_unigrpo.shapeworld.edits import all_edits, changes_of, parse_edit, split_of_edit
from trl_unigrpo.shapeworld.grammar import parse_prompt, prompts_by_split
from trl_unigrpo.shapeworld.plan import parse_plan, plan_cells
from trl_unigrpo.shapeworld.reflection import REFLECTION_TEMPLATE, closest_scene, parse_reflection
from trl_unigrpo.shapeworld.render import render_images
from trl_unigrpo.shapeworld.second_corpus import DESCRIBE, FAULTLESS, OwnImages, SecondRates, second_corpus
from trl_unigrpo.shapeworld.verifier import images_to_array, read_cells, score
from trl_unigrpo.shapeworld.world import MAX_OBJECTS


HEAD, TAIL = REFLECTION_TEMPLATE.split("{prompt}")


@pytest.fixture(scope="module")
def own():
    """Own images: the first prompt's is right, the others show one thing too many."""
    prompts = list(prompts_by_split()["train"])[:6]
    cells = [closest_scene(parse_prompt(prompt), np.zeros(9, dtype=np.int64)) for prompt in prompts]
    for scene in cells[1:]:
        scene[scene.argmin()] = 7
    return OwnImages.of(prompts, render_images(np.stack(cells)))


def rows_of(own, rates, number=600):
    rows = second_corpus(number, own, seed=1, rates=rates)[:]
    cells = [
        [None if image is None else read_cells(images_to_array([image]))[0][0] for image in rows[name]]
        for name in ("source_image", "image")
    ]
    return list(zip(rows["prompt"], rows["completion"], rows["category"], *cells, strict=True))


def asked(text):
    """The prompt that a second look quotes, as its meaning."""
    assert text.startswith(HEAD) and text.endswith(TAIL)
    return parse_prompt(text[len(HEAD) : -len(TAIL)])


def test_without_mistakes_every_row_is_right(own):
    for prompt, text, category, source, image in rows_of(own, FAULTLESS):
        if source is None:
            assert category not in ("refine", "edit", "describe")
            continue
        if category == "describe":
            assert prompt == DESCRIBE
            assert (plan_cells(parse_plan(text)) == source).all()
            assert (image == source).all()
            continue
        look = parse_reflection(text)
        assert all(source[cell] == code for cell, code in look.seen.items())
        if category == "edit":
            edit = parse_edit(prompt)
            assert split_of_edit(edit) == "train"
            assert look.fixes == changes_of(edit, source)
            assert set(look.seen) == set(look.fixes)
        else:
            target = closest_scene(asked(prompt), source)
            wrong = np.flatnonzero(target != source).tolist()
            assert sorted(look.fixes) == wrong
            assert list(look.seen) == np.flatnonzero(source).tolist()[:MAX_OBJECTS]
            assert score([asked(prompt)], image[None]).strict.all()
        changed = {int(cell): int(image[cell]) for cell in np.flatnonzero(image != source)}
        assert changed == look.fixes


def test_captions_are_prompts_of_the_split_that_their_image_follows(own):
    rows = rows_of(own, SecondRates(caption=0.4))
    captions = [row for row in rows if row[2] == "caption"]
    assert len(captions) == round(0.4 * len(rows))
    specs = prompts_by_split()["train"]
    for prompt, text, _, source, image in captions:
        assert prompt == []  # the image alone stands before it, as where prompts are read back
        assert score([specs[text]], image[None]).strict.all()
        assert (image == source).all()


def test_mistakes_are_as_frequent_as_said(own):
    looks = Counter()
    harmed, objects = 0, 0
    for prompt, text, category, source, image in rows_of(own, SecondRates(0.6, 0.2, 0.2, 0.0), 3000):
        look = parse_reflection(text)
        stays = source > 0
        stays[list(look.fixes)] = False
        assert all(image[cell] == code for cell, code in look.fixes.items())
        if look.fixes:
            harmed, objects = harmed + (source != image)[stays].sum(), objects + stays.sum()
        if category == "edit":
            looks["followed" if look.fixes == changes_of(parse_edit(prompt), source) else "misread"] += 1
            continue
        wrong = set(np.flatnonzero(closest_scene(asked(prompt), source) != source).tolist())
        looks["kept" if not look.fixes else "mended", bool(wrong)] += 1
        if not look.fixes:
            assert (source == image).all()
        elif len(wrong) == 1:
            looks["named" if wrong <= set(look.fixes) else "overlooked"] += 1
    assert looks["kept", True] / (looks["kept", True] + looks["mended", True]) == pytest.approx(0.2, abs=0.04)
    assert looks["kept", False] / (looks["kept", False] + looks["mended", False]) == pytest.approx(0.85, abs=0.07)
    assert looks["overlooked"] / (looks["overlooked"] + looks["named"]) == pytest.approx(0.3, abs=0.06)
    assert looks["misread"] / (looks["misread"] + looks["followed"]) == pytest.approx(0.35, abs=0.07)
    assert harmed / objects == pytest.approx(0.03, abs=0.015)


def test_kinds_of_rows_have_their_shares(own):
    rows = second_corpus(2000, own, seed=2)
    kinds = Counter(rows["category"][:])
    assert kinds["edit"] / 2000 == pytest.approx(0.2, abs=0.03)
    assert kinds["describe"] / 2000 == pytest.approx(0.05, abs=0.02)
    assert kinds["refine"] / 2000 == pytest.approx(0.37, abs=0.04)
    shown = {image.tobytes() for image in rows[:]["source_image"] if image is not None}
    assert {pixels.tobytes() for pixels in own.pixels} <= shown
    again = second_corpus(2000, own, seed=2)
    assert again["completion"][:] == rows["completion"][:]
    assert not set(rows["prompt"][:]) & {t for t, e in all_edits().items() if split_of_edit(e) != "train"}
