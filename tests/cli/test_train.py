"""`trl-unigrpo train`: each option that its help lists reaches the run, or is refused."""

import json
import runpy
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from typer.testing import CliRunner

from tests.helpers.paths import ROOT
from tests.helpers.tiny_pipelines import saved_halves
from tests.helpers.tiny_unified import tiny_bagel, tiny_tokenizer
from trl_unigrpo.cli import app
from trl_unigrpo.cli.prompt_files import load_prompts
from trl_unigrpo.cli.train import ModelArguments, check_model_arguments, main, prepare_training
from trl_unigrpo.evaluation.models import base_revision, fingerprint, load_model
from trl_unigrpo.shapeworld import BASE, SEEING_BASE
from trl_unigrpo.trainers.unigrpo_config import UniGRPOConfig


PROMPTS = [f"a red circle and {number} squares" for number in range(16)]
REWARD = "trl_unigrpo.rewards:sharpness"
SETTINGS = {
    "model_name_or_path": "shapeworld",
    "dataset_name": "shapeworld",
    "reward_funcs": REWARD,
    "max_steps": 1,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "image_size": 48,
    "num_inference_steps": 6,
    "eval_num_inference_steps": 4,
    "max_completion_length": 8,
    "gradient_checkpointing": False,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def options(tmp_path, **changes):
    settings = {**SETTINGS, "output_dir": tmp_path / "run", **changes}
    return [part for name, value in settings.items() if value is not None for part in (f"--{name}", str(value))]


def prepared(tmp_path, **changes):
    return prepare_training(options(tmp_path, **changes))[1]


def refused(*arguments):
    """The line that the command says before it trains."""
    result = CliRunner().invoke(app, ["train", *arguments])
    assert result.exit_code == 1 and "Traceback" not in result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("trl-unigrpo train: ")]
    return line


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.csv"
    Dataset.from_dict({"prompt": PROMPTS}).to_csv(file)
    return str(file)


# The model


def test_dtype_and_attention_reach_the_model(tmp_path):
    trainer = prepared(tmp_path, dtype="bfloat16", attn_implementation="eager", use_peft=True)
    assert trainer.unified.dtype == torch.bfloat16
    assert trainer.unified.config._attn_implementation == "eager"
    trainer = prepared(tmp_path, model_init_kwargs='{"dtype": "float32"}', use_peft=True, bf16=None)
    assert trainer.unified.dtype == torch.float32 and trainer.unified.config._attn_implementation != "eager"


def test_an_attention_that_the_model_lacks_is_refused(tmp_path):
    assert "does not support Flash Attention 2" in refused(*options(tmp_path, attn_implementation="flash_attention_2"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub with one repository, whose revisions differ in a weight and in a word."""
    repository = tmp_path / "hub" / "models--org--tiny"
    for number, revision in enumerate(("main", "second")):
        folder = repository / "snapshots" / (40 * str(number))
        model, tokenizer = tiny_bagel(), tiny_tokenizer()
        with torch.no_grad():
            model.llm2vae.bias.fill_(number)
        if number:
            tokenizer.add_tokens(["later"])
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(folder.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return "org/tiny"


def test_a_revision_is_that_of_weights_tokenizer_adapters_and_evaluation(hub, tmp_path):
    small = {"model_name_or_path": hub, "image_size": 8, "dataset_name": str(tmp_path / "prompts.jsonl")}
    Dataset.from_dict({"prompt": ["a red cat", "a big green dog"] * 4}).to_json(tmp_path / "prompts.jsonl")
    trainer = prepared(tmp_path, **small)
    assert float(trainer.unified.llm2vae.bias.mean()) == 0 and "later" not in trainer.processing_class.get_vocab()
    trainer = prepared(tmp_path, **small, model_revision="second", use_peft=True)
    assert float(trainer.unified.llm2vae.bias.mean()) == 1 and "later" in trainer.processing_class.get_vocab()
    trainer.save_model()
    run = str(tmp_path / "run")
    assert base_revision(run) == "second" and fingerprint(hub, "second") == {"source": hub, "revision": "1" * 40}
    model, tokenizer = load_model(run, device="cpu")
    assert float(model.get_base_model().llm2vae.bias.mean()) == 1 and "later" in tokenizer.get_vocab()


def test_a_folder_has_no_revisions(tmp_path):
    with pytest.warns(UserWarning, match="revision='v2' is ignored: .* is a folder"):
        prepared(tmp_path, model_revision="v2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_r": 8}, "--lora_r 8 does nothing without --use_peft"),
        ({"lora_target_modules": ["q_proj"]}, "--lora_target_modules q_proj does nothing without --use_peft"),
        ({"use_dora": True}, "--use_dora True does nothing without --use_peft"),
        ({"use_peft": True, "bnb_4bit_quant_type": "fp4"}, "fp4 does nothing without --load_in_4bit"),
        ({"use_peft": True, "lora_dropout": 0.1}, "--lora_dropout 0.1 does nothing: dropout is off"),
        ({"use_peft": True, "lora_task_type": "SEQ_CLS"}, "--lora_task_type SEQ_CLS"),
    ],
)
def test_options_that_would_do_nothing(tmp_path, changes, message):
    args = UniGRPOConfig(str(tmp_path), bf16=False, use_cpu=True)
    check_model_arguments(ModelArguments("shapeworld", use_peft=True, lora_r=8), args)
    with pytest.raises(ValueError, match=message):
        check_model_arguments(replace(ModelArguments("shapeworld"), **changes), args)


def test_lora_options_reach_the_adapters(tmp_path):
    given = {"lora_r": 4, "lora_alpha": 6, "lora_dropout": 0.2, "use_rslora": True, "disable_dropout": False}
    config = prepared(tmp_path, use_peft=True, **given).model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (4, 6, 0.2, True)
    assert "'nothing' match no parameter of the model" in refused(
        *options(tmp_path, use_peft=True, lora_target_parameters="nothing")
    )


def test_code_of_a_repository_is_never_run(tmp_path):
    for arguments in ({"trust_remote_code": True}, {"model_init_kwargs": '{"trust_remote_code": true}'}):
        assert "trust_remote_code=True" in refused(*options(tmp_path, **arguments))


def test_a_model_that_is_not_there(tmp_path):
    gone = str(tmp_path / "gone")
    assert f"{gone!r}: no such folder" in refused(*options(tmp_path, model_name_or_path=gone))
    assert "--model_name_or_path is missing" in refused(*options(tmp_path, model_name_or_path=None))


# The data


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "parquet", "txt", "CSV"])
def test_files_of_every_kind(tmp_path, ending):
    file, table = tmp_path / f"prompts.{ending}", Dataset.from_dict({"prompt": PROMPTS})
    if ending == "txt":
        file.write_text("\n".join(PROMPTS) + "\n")
    else:
        {"csv": table.to_csv, "parquet": table.to_parquet}.get(ending.lower(), table.to_json)(file)
    assert load_prompts(str(file), "train")["prompt"][:] == PROMPTS
    assert load_prompts(str(file), "train[75%:]")["prompt"][:] == PROMPTS[12:]
    with pytest.raises(
        ValueError, match=r"no split 'test': a file is one split, 'train'. Pass another file, or slices"
    ):
        load_prompts(str(file), "test")


def test_names_that_are_no_prompts(tmp_path, prompts):
    with pytest.raises(FileNotFoundError, match="no such file. Pass a file, a folder, a hub id or 'shapeworld'"):
        load_prompts(str(tmp_path / "none.csv"), "train")
    (tmp_path / "prompts.tsv").write_text("prompt\na red cat\n")
    with pytest.raises(ValueError, match="is no file of prompts: expected one that ends in .csv, .json"):
        load_prompts(str(tmp_path / "prompts.tsv"), "train")
    for name in (prompts, "shapeworld"):
        with pytest.raises(ValueError, match="dataset_config='en' does nothing here"):
            load_prompts(name, "train", "en")


def test_splits_of_a_file(tmp_path, prompts):
    evaluated = {"dataset_name": prompts, "eval_strategy": "steps", "eval_steps": 1}
    slices = {"dataset_train_split": "train[:75%]", "dataset_test_split": "train[75%:]"}
    trainer = prepared(tmp_path, **evaluated, **slices)
    assert trainer.train_dataset["prompt"][:] == PROMPTS[:12] and trainer.eval_dataset["prompt"][:] == PROMPTS[12:]
    assert "has no split 'test'" in refused(*options(tmp_path, **evaluated))
    assert "All 4 prompts to evaluate on are trained on" in refused(
        *options(tmp_path, **evaluated, dataset_test_split="train[75%:]")
    )
    with pytest.warns(UserWarning, match="4 of 8 prompts to evaluate on are trained on"):
        prepared(tmp_path, **{**evaluated, **slices, "dataset_test_split": "train[50%:]"})


def test_another_file_to_evaluate_on(tmp_path, prompts):
    (tmp_path / "held_out.txt").write_text("a green circle\na blue square\n")
    other = {"dataset_name": prompts, "eval_dataset_name": tmp_path / "held_out.txt"}
    trainer = prepared(tmp_path, **other, eval_strategy="steps", eval_steps=1)
    assert trainer.eval_dataset["prompt"][:] == ["a green circle", "a blue square"]
    assert "nothing evaluates it. Add --eval_strategy" in refused(*options(tmp_path, **other))


def test_shapeworld_has_splits_of_its_own(tmp_path):
    trainer = prepared(tmp_path, dataset_train_split="validation", eval_strategy="steps", eval_steps=1)
    assert not set(trainer.train_dataset["prompt"]) & set(trainer.eval_dataset["prompt"])


# YAML


def test_a_yaml_file_with_single_values(tmp_path, prompts):
    file = tmp_path / "run.yaml"
    settings = {**SETTINGS, "dataset_name": prompts, "output_dir": str(tmp_path / "run"), "reward_weights": 0.5}
    settings |= {"use_peft": True, "lora_modules_to_save": "lm_head"}
    file.write_text(json.dumps(settings))  # which is YAML, too
    trainer = prepare_training([f"--config={file}", "--max_completion_length", "4"])[1]
    assert trainer.reward_func_names == ["sharpness"] and trainer.reward_weights.tolist() == [0.5]
    assert trainer.args.max_completion_length == 4 and trainer.model.peft_config["default"].modules_to_save == [
        "lm_head"
    ]
    file.write_text(json.dumps(settings | {"num_generation": 8}))
    assert "unknown option 'num_generation'. Is it num_generations?" in refused("--config", str(file))


def test_mistakes_of_the_command_line_are_one_line(tmp_path):
    assert "--config names no file" in refused("--config")
    for arguments, said in (
        (
            ["--output_dir", "run"],
            "required: --dataset_name/--dataset-name, --reward_funcs/--reward-funcs. --help lists",
        ),
        (
            options(tmp_path, num_generations="three"),
            "--num_generations/--num-generations: invalid int value: 'three'",
        ),
    ):
        result = CliRunner().invoke(app, ["train", *arguments])
        assert result.exit_code == 2 and said in result.output and result.output.count("\n") == 1


def test_a_recipe_gives_defaults_that_files_and_options_overrule(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("recipe: reflect_until_good\nround_cost: 0.2\nlearning_rate: 1e-3\n")
    only = {"num_generations": None, "per_device_train_batch_size": None, "model_name_or_path": SEEING_BASE}
    args = prepared(tmp_path, config=file, learning_rate=0.5, **only).args
    assert (args.num_rounds, args.eval_num_rounds, args.round_group, args.num_generations) == (2, 4, "tree", 12)
    assert (args.round_cost, args.learning_rate, args.image_learning_rate) == (0.2, 0.5, 3e-4)
    args = prepared(tmp_path, recipe="single_gpu").args
    assert (args.image_size, args.image_learning_rate, args.num_rounds) == (48, 3e-4, 1)
    args = prepared(tmp_path, config=file, recipe="single_gpu").args
    assert (args.num_rounds, args.round_cost) == (1, 0.2)
    expected = "recipe='two_gpus': expected one of single_gpu, fast, editing, "
    assert expected in refused(*options(tmp_path, recipe="two_gpus"))
    file.write_text("recipe: two_gpus\n")
    assert expected in refused(*options(tmp_path, config=file))


# Rewards


def test_a_reward_that_asks_a_judge_gets_the_one_that_is_named(tmp_path):
    reward, url = "trl_unigrpo.rewards:EditReward", "http://127.0.0.1:9/v1"
    trainer = prepared(tmp_path, reward_funcs=reward, judge_model="m", judge_base_url=url)
    assert trainer.reward_func_names == ["EditReward"]
    assert "asks a judge" in refused(*options(tmp_path, reward_funcs=reward))
    judge = {"judge_model": "m", "judge_base_url": url}
    assert "No reward among 'trl_unigrpo.rewards:sharpness' asks" in refused(*options(tmp_path, **judge))
    assert "names no model" in refused(*options(tmp_path, judge_base_url=url))


# The run


def test_a_run_goes_on_and_is_evaluated(tmp_path, prompts, monkeypatch):
    """Resumed from the last checkpoint, then known by its folder alone."""
    (tmp_path / "my_rewards.py").write_text(
        "class Width:\n    def __call__(self, prompts, completions, images, **columns):\n"
        "        return [float(len(text)) for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    run = {"dataset_name": prompts, "reward_funcs": "my_rewards:Width", "save_steps": 1, "use_peft": True}
    main(options(tmp_path, **run))
    main(options(tmp_path, **run | {"max_steps": 2}, resume_from_checkpoint="true"))
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    shutil.rmtree(tmp_path / "run" / "checkpoint-1")
    arguments = ["--model", str(tmp_path / "run"), "--prompts", prompts, "--num-prompts", "2", "--samples", "1"]
    arguments += ["--rewards", "my_rewards:Width", "--image-size", "48", "--num-inference-steps", "2"]
    arguments += ["--max-completion-length", "4", "--device", "cpu", "--output-dir", str(tmp_path / "eval")]
    result = CliRunner().invoke(app, ["eval", *arguments])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "eval" / "summary.json").read_text())["images"] == 2


@pytest.mark.parametrize("name", ["bagel", "pipeline"])
def test_the_examples_hand_on_the_options_of_a_model(tmp_path, prompts, monkeypatch, name):
    if name == "bagel":
        own = {"model_name_or_path": str(BASE)}
    else:
        own = saved_halves(tmp_path)
    own |= {"prompts": prompts, "output_dir": tmp_path / "run", "attn_implementation": "nonsense", "bf16": False}
    arguments = [part for option, value in own.items() for part in (f"--{option}", str(value))]
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--use_cpu"])
    with pytest.raises(ValueError, match='attn_implementation="nonsense"'):
        runpy.run_path(str(ROOT / "examples" / f"unigrpo_{name}.py"), run_name="__main__")
