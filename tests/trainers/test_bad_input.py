"""What a user can hand over by mistake: one clear error each, before any training."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import ProcessorMixin, Qwen2Config, Qwen2ForCausalLM

from tests.helpers.tiny_unified import prompts_dataset, tiny_bagel, tiny_tokenizer
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
    ],
    ids=["image", "images", "no-prompt", "empty", "streamed-image", "streamed-no-prompt", "streamed-empty", "list"],
)
def test_dataset(make_trainer, dataset, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(train_dataset=dataset)


def test_evaluation_dataset(make_trainer):
    with pytest.raises(ValueError, match=r"eval_dataset\['seen'\] has no column 'prompt'"):
        make_trainer(eval_dataset={"unseen": prompts_dataset(), "seen": Dataset.from_dict({"text": ["a"]})})


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


def test_no_reward(make_trainer):
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        make_trainer(reward_funcs=[])


def test_missing_tokenizer(tmp_path):
    args = UniGRPOConfig(str(tmp_path), use_cpu=True, image_size=8)
    with pytest.raises(ValueError, match="processing_class is missing.*Pass a tokenizer"):
        UniGRPOTrainer(tiny_bagel(), print, args=args, train_dataset=prompts_dataset())


def test_model_by_folder_is_trained_whole_in_float32(make_trainer, tmp_path):
    tiny_bagel().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    trainer = make_trainer(model=str(tmp_path / "model"), max_steps=1)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm/image"] > 0


def test_defaults_without_a_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="can't paint an image of 1024 x 1024"):  # the default is for the real BAGEL
        UniGRPOTrainer(tiny_bagel(), print, train_dataset=prompts_dataset(), processing_class=tiny_tokenizer())


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
