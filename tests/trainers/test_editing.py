"""Edits: source images in prompts, in thinkings, in images of their sizes, and to reward functions."""

import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from PIL import Image

from tests.helpers.editing import PAINTED, PLACEHOLDER, SIZES, edits, source, tiny_editor
from tests.helpers.examples import run_example
from tests.helpers.judge_server import ChatServer, images_of, yes
from tests.helpers.many_images import assert_equations, images
from tests.helpers.runs import assert_equal_runs, run
from tests.helpers.tiny_unified import FixedTexts, redness, tiny_bagel, tiny_tokenizer
from trl_unigrpo.models.bagel import BagelForUnifiedGeneration
from trl_unigrpo.trainers.dataset_checks import check_rows
from trl_unigrpo.trainers.editing import of_one_size
from trl_unigrpo.trainers.source_checks import check_sources
from trl_unigrpo.trainers.unigrpo_config import UniGRPOConfig
from trl_unigrpo.trainers.unigrpo_trainer import UniGRPOTrainer
from trl_unigrpo.trajectory import Trajectory


def trajectories_of(seen):
    """Those of the first generation, by their rows."""
    found = {t.row: t for batch in seen.batches for t in batch["trajectories"]}
    return [found[row] for row in sorted(found)]


@pytest.fixture
def trained(make_trainer, train, tmp_path):
    def run_passes(make_model=tiny_editor, trainer_class=FixedTexts, **settings):
        plain = {"max_grad_norm": 0.0, "learning_rate": 0.5, "image_learning_rate": 2.0, "optim": "sgd"}
        settings = {"train_dataset": edits(), **plain, **settings}
        trainer = make_trainer(model=make_model(), trainer_class=trainer_class, **settings)
        return trainer, train(trainer)

    return run_passes


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.04, "max_steps": 1},
        {"flow_context_grad": "full"},
        {"gradient_accumulation_steps": 1, "steps_per_generation": 2, "max_steps": 4},
        {"train_dataset": edits(column="source_images"), "max_steps": 2},
        {"make_model": lambda: tiny_editor(eyes=False)},
    ],
    ids=["plain", "full", "updates", "several", "blind"],
)
def test_losses_and_gradients_are_those_of_the_equations(trained, settings):
    trainer, seen = trained(**settings)
    make_model, settings = settings.get("make_model", tiny_editor), {"flow_context_grad": "detach", **settings}
    assert_equations(make_model, trainer, seen, settings)


def test_each_group_shows_its_source_once_and_is_painted_in_its_size(trained):
    _, seen = trained(max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=8)
    rows = trajectories_of(seen)
    groups = [rows[start : start + 4] for start in range(0, 16, 4)]
    assert sorted(group[0].size for group in groups) == sorted(PAINTED)
    for group in groups:
        assert len({id(t.images[0]) for t in group}) == 1
        assert {image.size for t in group for image in images(t)} == {group[0].size}
        ids, system = group[0].prompt_ids, 4  # <|im_start|> think first <|im_end|>
        assert [place for place, token in enumerate(ids) if token == PLACEHOLDER] == [system]
        height, width = group[0].images[0].grid
        assert (4 * height, 4 * width) == group[0].size
    for batch in seen.batches:
        assert len({t.size for t in batch["trajectories"]}) == 1
        assert [t.images for t in batch["trajectories"]] == [t.images for t in batch["rounds"]]
    order = [t.row for batch in seen.batches for t in batch["trajectories"]]
    assert sorted(order) == list(range(16)) != order


class Noting(BagelForUnifiedGeneration):
    """Notes what its thinkings are asked for behind."""

    def generate(self, *args, **kwargs):
        self.__dict__.setdefault("asked", []).append(kwargs)
        return super().generate(*args, **kwargs)


def test_thinkings_are_written_and_images_painted_behind_the_sources(trained):
    model = tiny_editor()
    model.__class__ = Noting
    trainer, seen = trained(lambda: model, UniGRPOTrainer, max_steps=1, temperature=1e-4)
    start, rows, (asked,) = tiny_editor(), trajectories_of(seen), model.asked
    assert (asked["input_ids"] == PLACEHOLDER).sum(1).tolist() == [1] * 8
    for t, shown in zip(rows, asked["images"], strict=True):
        assert shown is t.images
        assert images(t)[0].context.images is t.images
        with torch.no_grad():
            ids = torch.tensor([*t.prompt_ids, *t.text_ids])
            hidden = start.backbone(ids[None], images=[shown]).last_hidden_state[0, len(t.prompt_ids) - 1 : -1]
            logits = start.get_output_embeddings()(hidden)
        logits[:, trainer.generation_config.suppress_tokens] = -torch.inf
        assert logits.argmax(-1).tolist() == t.text_ids


def test_rewards_get_the_source_images(trained):
    calls = []

    def reward(prompts, completions, images, source_images, **columns):
        calls.append((prompts, images, source_images, columns))
        return redness(prompts, completions, images)

    trained(max_steps=1, reward_funcs=reward)
    prompts, painted, shown, columns = calls[0]
    assert "source_image" not in columns
    wanted = dict(zip(edits()["prompt"], range(4), strict=True))
    for prompt, image, (original,) in zip(prompts, painted, shown, strict=True):
        assert np.array_equal(np.asarray(original), np.asarray(source(wanted[prompt])))
        assert (image.height, image.width) == PAINTED[wanted[prompt]]


def test_text_alone_is_trained_on_source_images(trained):
    trainer, seen = trained(max_steps=2, flow_weight=0.0, per_device_train_batch_size=4)
    assert all(len(batch["rounds"]) == 4 for batch in seen.batches)
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_evaluation_shows_sources(trained):
    sizes = []

    def reward(prompts, completions, images, source_images, **columns):
        sizes.append([image.size[::-1] for image in images])
        return redness(prompts, completions, images)

    trainer, _ = trained(max_steps=1, reward_funcs=reward, eval_dataset=edits(), eval_strategy="no")
    sizes.clear()
    first = trainer.evaluate()
    again = trainer.evaluate()
    assert first["eval_reward"] == again["eval_reward"]
    assert {size for batch in sizes for size in batch} == set(PAINTED)
    with pytest.raises(ValueError, match="train_dataset has one, eval_dataset differs"):
        trainer.evaluate(edits().remove_columns("source_image"))


def test_a_run_resumes_exactly_between_two_passes(make_trainer, tmp_path):
    made = partial(make_trainer, train_dataset=edits(), max_steps=4)
    whole = run(made, tmp_path / "whole", model=tiny_editor(), max_steps=4)
    resumed = run(
        made, tmp_path / "resumed", model=tiny_editor(), max_steps=4, resume=tmp_path / "whole" / "checkpoint-3"
    )
    assert_equal_runs(whole, resumed, 3)


STREAM = [{"prompt": "a red cat", "source_image": source(0)}, {"prompt": "a small tree", "source_image": None}]


@pytest.mark.parametrize(
    ("dataset", "settings", "message"),
    [
        (
            Dataset.from_dict({"prompt": ["a", "b"], "source_image": [source(0), None]}),
            {},
            r"train_dataset: the source_image of row 1 is None, expected a PIL image.*dataset.filter",
        ),
        (
            Dataset.from_dict({"prompt": ["a", "b"], "source_images": [[source(0)], []]}),
            {},
            "train_dataset: the source_images of row 1 is an empty list",
        ),
        (
            Dataset.from_dict({"prompt": ["a", "b"], "source_image": ["nowhere.png", "nowhere.png"]}),
            {},
            "row 0 is 'nowhere.png', and there is no such file",
        ),
        (
            Dataset.from_dict(
                {"prompt": ["a"] * 2, "source_image": [source(0)] * 2, "source_images": [[source(0)]] * 2}
            ),
            {},
            "has both columns",
        ),
        (edits(), {"eval_dataset": edits().remove_columns("source_image")}, "eval_dataset has neither a column"),
        (edits(), {"remove_unused_columns": True}, "remove_unused_columns=True takes the source images away"),
        (
            edits(),
            {"num_generations": 2},
            "per_device_train_batch_size=4 does not divide num_generations=2.*such as 2",
        ),
        (edits(column="image"), {}, "has a column 'image'.*or 'source_image', if the prompts say how"),
    ],
)
def test_bad_sources_are_refused_before_a_model_is_loaded(make_trainer, dataset, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(model="no/such-model", train_dataset=dataset, **settings)


@pytest.mark.parametrize("column", ["source_image", "source_images"])
def test_several_groups_share_an_update_where_all_sources_have_one_size(tmp_path, column):
    def rows(*sizes):
        images = [Image.new("RGB", size) for size in sizes]
        return Dataset.from_dict(
            {"prompt": ["a"] * len(images), column: images if column == "source_image" else [[one] for one in images]}
        )

    args = UniGRPOConfig(str(tmp_path), num_generations=2, per_device_train_batch_size=4, use_cpu=True, bf16=False)
    assert check_sources({"train_dataset": rows((40, 30), (40, 30)), "eval_dataset": None}, args)
    with pytest.raises(ValueError, match="or, where all source images have one size, a multiple"):
        check_sources({"train_dataset": rows((40, 30), (30, 40))}, args)
    streamed = rows((40, 30), (40, 30)).to_iterable_dataset()
    with pytest.raises(ValueError, match="does not divide"):
        check_sources({"train_dataset": streamed}, args)


@pytest.mark.parametrize("column", ["source_image", "source_images"])
def test_trainers_that_do_not_edit_refuse_the_column(column):
    with pytest.raises(ValueError, match=f"train_dataset has a column '{column}', which this trainer does not show"):
        check_rows(edits(column=column), "train_dataset", ("prompt",), None)
    check_rows(edits(column=column), "train_dataset", ("prompt",), None, shown=[column])


def test_a_model_without_sources_is_refused_at_construction(make_trainer):
    class Blind(type(tiny_bagel())):
        edits = False

    model = tiny_bagel()
    model.__class__ = Blind
    with pytest.raises(ValueError, match="Blind is text to image only"):
        make_trainer(model=model, train_dataset=edits())


def test_a_streamed_row_without_source_ends_the_run(make_trainer):
    dataset = IterableDataset.from_generator(lambda: iter(STREAM))
    trainer = make_trainer(model=tiny_editor(), train_dataset=dataset, dataloader_num_workers=0)
    with pytest.raises(ValueError, match=re.escape("The source_image of the prompt 'a small tree' is None")):
        trainer.train()


def test_rows_are_dealt_in_batches_of_one_size():
    sizes = [(8, 8), (4, 8), (8, 8), (4, 8), (4, 8), (8, 8), (8, 8), (4, 8)]
    trajectories = [Trajectory("", [], row, size=size) for row, size in enumerate(sizes)]
    batches = [
        {"trajectories": trajectories[i : i + 2], "x": torch.arange(i, i + 2), "n": torch.tensor(8), "none": None}
        for i in range(0, 8, 2)
    ]
    dealt = of_one_size(batches)
    assert sorted(batch["x"].tolist() for batch in dealt) == [[0, 2], [1, 3], [4, 7], [5, 6]]
    for batch in dealt:
        assert [t.row for t in batch["trajectories"]] == batch["x"].tolist()
        assert len({t.size for t in batch["trajectories"]}) == 1
        assert batch["n"] == 8
        assert batch["none"] is None


def test_paths_and_transparent_images_are_read(trained, tmp_path):
    file = tmp_path / "a.png"
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(file)
    given = []

    def reward(prompts, completions, images, source_images, **columns):
        given.extend(source_images)
        return redness(prompts, completions, images)

    dataset = Dataset.from_dict({"prompt": ["a red cat"] * 2, "source_image": [str(file)] * 2})
    trained(max_steps=1, reward_funcs=reward, train_dataset=dataset)
    assert {image.getpixel((0, 0)) for (image,) in given} == {(255, 255, 255)}


def test_the_example_trains_by_a_judge_that_sees_source_and_edit(tmp_path, monkeypatch):
    """The script as it is, but for the names of the model, the judge and the file, and smaller numbers."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    tiny_editor().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = []
    for number, prompt in enumerate(edits()["prompt"]):
        source(number).save(tmp_path / f"{number}.png")
        rows.append({"prompt": prompt, "source_image": str(tmp_path / f"{number}.png")})
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small = {"image_size": 8, "num_inference_steps": 6, "num_generations": 4, "max_completion_length": 4}
    small |= {"report_to": "none", "use_cpu": True, "max_steps": 2, "save_strategy": "no", "disable_tqdm": True}
    some_images = []

    def reply(body, attempt):
        some_images.append([image.size[::-1] for image in images_of(body)])
        return yes(0.1 + 0.8 * np.asarray(images_of(body)[1]).mean() / 255)

    with ChatServer(reply) as server:
        replaced = {
            '"ByteDance-Seed/BAGEL-7B-MoT"': repr(str(tmp_path / "model")),
            '"http://localhost:8000/v1"': repr(server.url),
            '"edits.jsonl"': repr(str(tmp_path / "edits.jsonl")),
            '"bagel-edits"': f"{str(tmp_path / 'out')!r}, **{small!r}",
        }
        found = run_example("editing.py", **replaced)
    assert found["trainer"].state.global_step == 2
    logs = found["trainer"].state.log_history
    assert 0 < logs[0]["EditReward/following"] < 1
    sizes = {(first, second) for first, second in zip(SIZES, PAINTED, strict=True)}
    assert {tuple(pair) for pair in some_images} <= sizes
