"""Faults that reach all three trainers: data without prompts, too few rows, one callback, runs that are finished."""

import re

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from PIL import Image
from transformers import PrinterCallback

from tests.helpers.tiny_unified import IMAGE_SIZE, build_trainer, moved, tiny_bagel, tiny_tokenizer, weights
from trl_unigrpo import ReFLConfig, ReFLTrainer
from trl_unigrpo.trainers.sft_trainer import UnifiedSFTConfig, UnifiedSFTTrainer
from trl_unigrpo.trainers.whole_checkpoints import UNFINISHED, fault_of


TRAINERS = ("unigrpo", "refl", "sft")
COMMON = {
    "max_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


def brightness(pixels, prompts, **columns):
    return pixels.mean((1, 2, 3))


def rows(kind, prompts):
    """Rows of a dataset for one of the trainers."""
    if kind != "sft":
        return [{"prompt": prompt} for prompt in prompts]
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    return [{"prompt": prompt, "completion": "a cat", "image": Image.fromarray(pixels)} for prompt in prompts]


def make(kind, folder, dataset=None, model=None, **changes):
    """One of the trainers over a tiny model."""
    passed = {name: changes.pop(name) for name in ("callbacks", "eval_dataset") if name in changes}
    dataset = Dataset.from_list(rows(kind, ["a red cat", "a mat"] * 4)) if dataset is None else dataset
    settings = {**COMMON, **changes}
    if kind == "unigrpo":
        return build_trainer(folder, model, train_dataset=dataset, **passed, **settings)
    model, tokenizer = model or tiny_bagel(), tiny_tokenizer()
    if kind == "sft":
        args = UnifiedSFTConfig(str(folder), **settings)
        return UnifiedSFTTrainer(model, args, dataset, processing_class=tokenizer, **passed)
    sizes = {"image_size": IMAGE_SIZE, "max_completion_length": 4, "num_inference_steps": 4}
    args = ReFLConfig(str(folder), **sizes, **settings)
    return ReFLTrainer(model, brightness, args, dataset, processing_class=tokenizer, **passed)


@pytest.mark.parametrize("kind", TRAINERS)
def test_finished_run_that_is_resumed_does_not_go_on(tmp_path, kind):
    ends = []
    for start in range(3):
        trainer = make(kind, tmp_path)
        trainer.train(resume_from_checkpoint=start > 0)
        ends.append(weights(trainer.model))
        assert trainer.state.global_step == 2
    assert not moved(ends[0], ends[2])  # the checkpoint's weights, so that they can be saved
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    longer = make(kind, tmp_path, max_steps=3)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 3


@pytest.mark.parametrize("kind", TRAINERS)
def test_half_a_checkpoint_is_passed_over(tmp_path, kind):
    make(kind, tmp_path).train()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text('{"best_glo')
    with pytest.warns(UserWarning, match="checkpoint-2: trainer_state.json is cut off"):
        make(kind, tmp_path).train(resume_from_checkpoint=True)
    assert fault_of(tmp_path / "checkpoint-2") is None
    assert not (tmp_path / UNFINISHED).exists()


def test_finished_run_on_a_stream_does_not_go_on(tmp_path):
    for resume in (False, True):
        stream = IterableDataset.from_generator(lambda: iter(rows("unigrpo", ["a red cat", "a mat"] * 4)))
        trainer = make("unigrpo", tmp_path, stream)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == 2


@pytest.mark.parametrize("kind", TRAINERS)
def test_row_without_a_prompt(tmp_path, kind):
    found = rows(kind, ["a red cat", None] * 4)
    with pytest.raises(ValueError, match="train_dataset: the prompt of row 1 is None, expected a text"):
        make(kind, tmp_path, Dataset.from_list(found), model=str(tmp_path / "never-read"))
    trainer = make(kind, tmp_path, IterableDataset.from_generator(lambda: iter(found)))
    with pytest.raises(ValueError, match=r"In the row \{'prompt': None.*\} the prompt is None"):
        trainer.train()


@pytest.mark.parametrize("kind", ["refl", "sft"])
def test_prompts_in_parts_are_the_text_of_their_parts(tmp_path, kind):
    parts = [{"type": "text", "text": "a red"}, {"type": "text", "text": "cat"}]
    losses = []
    for content in (parts, "a red cat"):
        dataset = Dataset.from_list(rows(kind, [[{"role": "user", "content": content}]] * 4))
        trainer = make(kind, tmp_path / str(len(losses)), dataset, max_steps=1, logging_steps=1, seed=3)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", ["refl", "sft"])
def test_fewer_rows_than_a_batch_that_must_be_full(tmp_path, kind):
    few = Dataset.from_list(rows(kind, ["a red cat"] * 3))
    message = "train_dataset has 3 rows: the first batch takes 4 rows.*dataloader_drop_last=False"
    with pytest.raises(ValueError, match=message):
        make(kind, tmp_path, few, dataloader_drop_last=True)
    trainer = make(kind, tmp_path, few, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("several", [lambda callback: callback, lambda callback: (callback,)])
def test_one_callback(tmp_path, kind, several):
    callback = PrinterCallback()
    assert callback in make(kind, tmp_path, callbacks=several(callback)).callback_handler.callbacks


@pytest.mark.parametrize("kind", TRAINERS)
def test_evaluation_is_checked(tmp_path, kind):
    dataset = Dataset.from_list(rows(kind, ["a red cat"]))
    with pytest.warns(UserWarning, match="eval_dataset is not used while training"):
        make(kind, tmp_path, eval_dataset=dataset)
    with pytest.raises(ValueError, match="there is no eval_dataset"):
        make(kind, tmp_path, eval_strategy="epoch")
    message = re.escape("metric_for_best_model='loss' is of none of the evaluation sets ['easy', 'hard']")
    sets = {"easy": dataset, "hard": dataset}
    with pytest.raises(ValueError, match=message):
        make(kind, tmp_path, eval_dataset=sets, eval_strategy="epoch", metric_for_best_model="loss")


@pytest.mark.parametrize(("kind", "metric"), [("refl", "reward"), ("sft", "loss/text")])
def test_evaluation_sets_have_metrics_of_their_own(tmp_path, kind, metric):
    sets = {name: Dataset.from_list(rows(kind, [text])) for name, text in (("easy", "a cat"), ("hard", "a big mat"))}
    trainer = make(kind, tmp_path, eval_dataset=sets, do_eval=True)
    together = trainer.evaluate()
    for name, part in sets.items():
        alone = trainer.evaluate(part)
        assert together[f"eval_{name}_{metric}"] == pytest.approx(alone[f"eval_{metric}"])
    assert f"eval_{metric}" not in together
    assert together[f"eval_easy_{metric}"] != together[f"eval_hard_{metric}"]
