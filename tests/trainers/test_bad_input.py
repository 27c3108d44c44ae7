"""Mistakes in what a user hands over: one clear error each, before any training."""

import re
from functools import wraps

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import PrinterCallback, ProcessorMixin, ProgressCallback, Qwen2Config, Qwen2ForCausalLM

from tests.helpers.tiny_unified import prompts_dataset, redness, tiny_bagel, tiny_config, tiny_tokenizer
from trl_unigrpo.trainers.dataset_checks import check_training_data
from trl_unigrpo.trainers.prompt_checks import prompt_fault
from trl_unigrpo.trainers.reward_checks import GIVEN
from trl_unigrpo.trainers.unigrpo_config import UniGRPOConfig
from trl_unigrpo.trainers.unigrpo_trainer import UniGRPOTrainer


def streamed(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            Dataset.from_dict({"prompt": ["a"], "image": [None]}),
            "train_dataset has a column 'image'.*Rename it.*reference_image",
        ),
        (Dataset.from_dict({"prompt": ["a"], "images": [None]}), "has a column 'images'"),
        (
            Dataset.from_dict({"text": ["a"]}),
            r"train_dataset has no column 'prompt' \(it has \['text'\]\). Add it, or rename",
        ),
        (Dataset.from_dict({"prompt": []}), "train_dataset is empty. Pass a dataset with at least one row"),
        (streamed([{"prompt": "a", "image": 1}]), "has a column 'image'"),
        (streamed([{"text": "a"}]), "has no column 'prompt'"),
        (streamed([]), "train_dataset is empty"),
        ([{"text": "a"}], "has no column 'prompt'"),
        (Dataset.from_dict({"prompt": ["a"], "completions": ["b"]}), "has a column 'completions'.*own_completions"),
        (Dataset.from_dict({"prompt": ["a"], "log_metric": ["b"]}), "has a column 'log_metric'.*own_log_metric"),
    ],
    ids=[
        "image",
        "images",
        "no-prompt",
        "empty",
        "streamed-image",
        "streamed-no-prompt",
        "streamed-empty",
        "list",
        "completions",
        "log_metric",
    ],
)
def test_dataset(make_trainer, dataset, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(train_dataset=dataset)


def test_evaluation_dataset(make_trainer):
    with pytest.raises(ValueError, match=r"eval_dataset\['seen'\] has no column 'prompt'"):
        make_trainer(eval_dataset={"unseen": prompts_dataset(), "seen": Dataset.from_dict({"text": ["a"]})})


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([{"prompt": "a red cat"}] * 8, r"train_dataset is a list, expected.*Dataset.from_list\(rows\)"),
        ({"train": prompts_dataset(), "test": prompts_dataset()}, r"expected one dataset.*train_dataset\['train'\]"),
    ],
)
def test_what_is_no_dataset(make_trainer, dataset, message):
    with pytest.raises(TypeError, match=message):
        make_trainer(train_dataset=dataset)


def test_no_dataset(tmp_path):
    with pytest.raises(ValueError, match="train_dataset is missing: pass a dataset"):
        UniGRPOTrainer(str(tmp_path / "never-read"), redness, args=tiny_config(tmp_path))


USER = {"role": "user", "content": "a red cat"}
IMAGE_PART = {"type": "image", "text": None}
FAULTS = {
    "none": (None, r"None, expected a text, or a conversation.*dataset.filter"),
    "nan": (float("nan"), "nan, expected a text, or a conversation.*dataset.filter"),
    "blank": (" \n", r"' \\n', a blank text.*dataset.filter"),
    "number": (1984, r"1984, a number, expected a text.*cast_column\('prompt', datasets.Value\('string'\)\)"),
    "share": (0.5, "0.5, a number"),
    "message": (USER, r"\{.*\}, expected a text, or a conversation as in"),
    "empty": ([], r"\[\], expected a text, or a conversation as in"),
    "texts": (["a", "b"], r"\['a', 'b'\], expected a text, or a conversation as in"),
    "no-content": ([{"role": "user", "content": None}], "expected a text, or a conversation as in"),
    "image": ([{"role": "user", "content": [IMAGE_PART]}], "a conversation with .*'image'.*An image to edit belongs"),
    "no-user": ([{"role": "system", "content": "paint"}], r"\[.*\], a conversation without words of the user"),
    "blank-user": ([{"role": "user", "content": " "}], r"\[.*\], a conversation without words of the user"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_prompt_is_told_with_its_remedy(fault):
    prompt, message = FAULTS[fault]
    assert re.search(message, prompt_fault(prompt))


@pytest.mark.parametrize("prompt", ["a red cat", [USER], (USER,), [{"role": "system", "content": ""}, USER]])
def test_what_is_a_prompt(prompt):
    assert prompt_fault(prompt) is None


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a", None, ""], "row 1 is None"),
        (["a", " ", None], "row 1 is ' ', a blank text"),
        ([1984, 2001], "row 0 is 1984, a number"),
        ([[USER], [USER], []], r"row 2 is \[\], expected"),
    ],
)
def test_prompt_that_is_none_is_named_by_its_row(make_trainer, prompts, message, tmp_path):
    dataset = Dataset.from_dict({"prompt": prompts})
    with pytest.raises(ValueError, match=f"train_dataset: the prompt of {message}"):
        make_trainer(train_dataset=dataset, model=str(tmp_path / "never-read"))
    with pytest.raises(ValueError, match=rf"eval_dataset\['hard'\]: the prompt of {message}"):
        make_trainer(eval_dataset={"easy": prompts_dataset(), "hard": dataset})
    trainer = make_trainer()
    with pytest.raises(ValueError, match=f"eval_dataset: the prompt of {message}"):
        trainer.evaluate(dataset)


@pytest.mark.parametrize("kind", ["stream", "transform"])
def test_prompt_that_is_none_is_found_when_its_row_comes(make_trainer, kind):
    rows = [{"prompt": "a red cat", "id": 7}, {"prompt": None, "id": 8}]
    dataset = streamed(rows * 4) if kind == "stream" else Dataset.from_list(rows * 4)
    if kind == "transform":
        dataset = dataset.with_transform(lambda batch: {**batch, "id": [i + 1 for i in batch["id"]]})
    trainer = make_trainer(train_dataset=dataset, max_steps=4)
    row = r"\{'prompt': None, 'id': 8\}" if kind == "stream" else r"\{'prompt': None, 'id': 9\}"
    with pytest.raises(ValueError, match=f"In the row {row} the prompt is None, expected a text"):
        trainer.train()


def test_prompts_in_parts_train_as_the_text_of_their_parts(make_trainer, train):
    parts = [{"type": "text", "text": "a red"}, {"type": "text", "text": "cat"}]
    ids = []
    for content in (parts, "a red cat"):
        trainer = make_trainer(
            train_dataset=prompts_dataset([[{"role": "user", "content": content}]] * 4), max_steps=1
        )
        ids.append([trajectory.prompt_ids for trajectory in train(trainer).batches[0]["trajectories"]])
    assert ids[0] == ids[1]


@pytest.mark.parametrize("kind", ["dataset", "stream"])
def test_fewer_prompts_than_a_generation_batch(make_trainer, kind, tmp_path):
    rows = [{"prompt": "a red cat"}] * 2
    message = r"generation batch takes 3 \(generation_batch_size=12 of num_generations=4 each\).*Lower.*or repeat"
    settings = {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1}
    if kind == "dataset":
        with pytest.raises(ValueError, match=f"train_dataset has 2 rows: a {message}"):
            make_trainer(train_dataset=Dataset.from_list(rows), model=str(tmp_path / "never-read"), **settings)
        make_trainer(train_dataset=Dataset.from_list(rows * 2).select(range(3)), **settings)
        return
    trainer = make_trainer(train_dataset=streamed(rows), **settings)
    with pytest.raises(ValueError, match=f"train_dataset ended before the first optimizer step: a {message}"):
        trainer.train()


def test_prompts_are_counted_for_all_processes(tmp_path, monkeypatch):
    config = tiny_config(tmp_path)
    monkeypatch.setattr(UniGRPOConfig, "world_size", 4)
    config.generation_batch_size *= 4
    with pytest.raises(ValueError, match=r"takes 8.*per_device_train_batch_size=4 on 4 processes"):
        check_training_data(prompts_dataset(copies=1), config)


def test_streamed_prompts_train(make_trainer):
    rows = [{"prompt": "a red cat"}, {"prompt": "a small tree"}] * 8
    trainer = make_trainer(train_dataset=streamed(rows), max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


def test_thinking_longer_than_the_model_has_positions(make_trainer):
    with pytest.raises(ValueError, match="max_completion_length=1024 leaves no room for a prompt: the model has 1024"):
        make_trainer(max_completion_length=1024)


@pytest.mark.parametrize("size", [10, 64])
def test_image_size(make_trainer, size):
    with pytest.raises(
        ValueError, match=rf"can't paint an image of {size} x {size} pixels.*multiple of 4, at most 16"
    ):
        make_trainer(image_size=size)


def test_model_without_the_contract(make_trainer):
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    with pytest.raises(
        TypeError, match="Qwen2ForCausalLM is not a unified model: it paints no images.*UnifiedModelMixin"
    ):
        make_trainer(model=Qwen2ForCausalLM(config))
    with pytest.raises(TypeError, match="Linear is not a unified model"):
        make_trainer(model=torch.nn.Linear(2, 2))


def test_text_model_by_name(make_trainer, tmp_path):
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "text-model")
    with pytest.raises(TypeError, match="Qwen2ForCausalLM is not a unified model"):
        make_trainer(model=str(tmp_path / "text-model"))


def test_processor_instead_of_a_tokenizer(make_trainer):
    class Processor(ProcessorMixin):
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

    with pytest.raises(
        TypeError, match="processing_class is a Processor, expected a tokenizer.*Pass processor.tokenizer"
    ):
        make_trainer(processing_class=Processor(tiny_tokenizer()))


@pytest.mark.parametrize("name", ["tools", "rollout_func", "environment_factory"])
def test_argument_of_grpo_trainer_that_cannot_work(make_trainer, name):
    with pytest.raises(ValueError, match=f"{name} does not work with UniGRPO"):
        make_trainer(**{name: [print] if name == "tools" else print})


def test_unknown_argument():
    with pytest.raises(TypeError, match="unexpected argument 'reward_function'"):
        UniGRPOTrainer(tiny_bagel(), print, reward_function=print)


def test_configuration_of_another_trainer(tmp_path):
    from trl import GRPOConfig

    with pytest.raises(TypeError, match="args is a GRPOConfig, expected a UniGRPOConfig"):
        UniGRPOTrainer(tiny_bagel(), print, args=GRPOConfig(str(tmp_path), use_cpu=True, bf16=False))


@pytest.mark.parametrize("reward_funcs", [None, [], ()])
def test_no_reward(make_trainer, reward_funcs):
    with pytest.raises(ValueError, match="No reward source provided: reward_funcs is empty"):
        make_trainer(reward_funcs=reward_funcs)


class Judge:
    def __call__(self, images, **columns):
        return [0.0] * len(images)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"reward_funcs": Judge}, TypeError, "has the class Judge, expected an instance"),
        ({"reward_funcs": {"judge": redness}}, TypeError, "reward_funcs has a dict, expected a function or a list"),
        ({"reward_funcs": [redness, 3]}, TypeError, "reward_funcs has a int, expected a function"),
        ({"reward_funcs": lambda images: [0.0]}, TypeError, r"'<lambda>' can't be called: .*'prompts'.*\*\*columns"),
        ({"reward_weights": [1.0, 2.0]}, ValueError, "has 2 numbers, expected one for each of the 1 reward_funcs"),
        ({"reward_weights": [0.0]}, ValueError, "nothing would be trained"),
        ({"callbacks": [print]}, TypeError, "callbacks has a builtin_function_or_method, expected a transformers"),
    ],
)
def test_reward_or_callback_that_is_none(make_trainer, arguments, error, message):
    with pytest.raises(error, match=message):
        make_trainer(**arguments)


def test_reward_that_takes_no_columns_of_the_dataset(make_trainer):
    def narrow(prompts, completions, completion_ids, images, trainer_state, log_extra, log_metric):
        return [0.0] * len(images)

    @wraps(narrow)
    def wide(**columns):
        return narrow(**{name: columns[name] for name in GIVEN})

    make_trainer(reward_funcs=narrow)
    make_trainer(reward_funcs=wide, train_dataset=prompts_dataset(tag=list("abcd")))
    with pytest.raises(TypeError, match="'narrow' can't be called: got an unexpected keyword argument 'tag'"):
        make_trainer(reward_funcs=narrow, train_dataset=prompts_dataset(tag=list("abcd")))


@pytest.mark.parametrize("several", [tuple, iter, list])
def test_rewards_and_callbacks_in_whatever_holds_them(make_trainer, several):
    callbacks = [PrinterCallback(), ProgressCallback()]
    trainer = make_trainer(reward_funcs=several([redness, Judge()]), callbacks=several(callbacks))
    assert trainer.reward_func_names == ["redness", "Judge"]
    assert set(callbacks) <= set(trainer.callback_handler.callbacks)


def test_one_callback(make_trainer):
    callback = PrinterCallback()
    assert callback in make_trainer(callbacks=callback).callback_handler.callbacks


def test_missing_tokenizer(tmp_path):
    args = UniGRPOConfig(str(tmp_path), use_cpu=True, image_size=8)
    with pytest.raises(ValueError, match="processing_class is missing.*Pass a tokenizer"):
        UniGRPOTrainer(tiny_bagel(), redness, args=args, train_dataset=prompts_dataset())


def test_model_by_folder_is_trained_whole_in_float32(make_trainer, tmp_path):
    tiny_bagel().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    trainer = make_trainer(model=str(tmp_path / "model"), max_steps=1)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm/image"] > 0


def test_defaults_without_a_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="can't paint an image of 1024 x 1024"):  # the default is for the real BAGEL
        UniGRPOTrainer(tiny_bagel(), redness, train_dataset=prompts_dataset(), processing_class=tiny_tokenizer())


def test_model_and_tokenizer_by_folder_train_in_the_ten_lines_of_the_readme(tmp_path):
    tiny_bagel().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    trainer = UniGRPOTrainer(
        model=str(tmp_path / "model"),
        reward_funcs=lambda images, **_: [float(i) for i in range(len(images))],
        args=UniGRPOConfig.single_gpu(
            output_dir=str(tmp_path / "out"),
            image_size=8,
            num_inference_steps=6,
            num_generations=4,
            max_completion_length=4,
            report_to="none",
            use_cpu=True,
            max_steps=2,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=prompts_dataset(),
        peft_config=LoraConfig(r=2),
    )
    trainer.train()
    assert trainer.state.global_step == 2
    trainer.save_model()
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
