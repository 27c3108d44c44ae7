"""`trl-unigrpo train`: UniGRPO from the command line or a YAML file, as `trl grpo` does GRPO."""

import argparse
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any

from datasets import Dataset
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from ..rewards.loading import load_judged
from ..trainers.recipes import RECIPES
from ..trainers.unigrpo_config import UniGRPOConfig
from ..trainers.unigrpo_trainer import UniGRPOTrainer
from .prompt_files import is_file, load_prompts


@dataclass
class TrainArguments:
    r"""
    The data to train on, and the rewards.

    Parameters:
        dataset_name (`str`): hub id or folder of a dataset, a csv, json, jsonl, parquet or txt file, or `shapeworld`.
        reward_funcs (`list[str]`): reward functions as `module:NAME`, such as `my_rewards:redness`, or
            `think_format_reward`.
        judge_model, judge_base_url (`str`, *optional*): a judge behind an endpoint, for rewards that ask one, such as
            `trl_unigrpo.rewards:EditReward`; its key is read from `OPENAI_API_KEY`.
        dataset_config (`str`, *optional*): configuration of a hub dataset.
        dataset_train_split (`str`, *optional*, defaults to `"train"`): split to train on, or a slice of it.
        eval_dataset_name (`str`, *optional*): dataset to evaluate on if `eval_strategy` says so; `dataset_name`'s by
            default.
        dataset_test_split (`str`, *optional*): its split; by default all of a file that `eval_dataset_name` names, of
            other datasets "test".
        recipe (`str`, *optional*): name of a preset of [`UniGRPOConfig`], whose settings are then the defaults.
    """

    dataset_name: str = field(
        metadata={"help": "Hub id or folder of a dataset, a csv/json/jsonl/parquet/txt file, or 'shapeworld'."}
    )
    reward_funcs: list[str] = field(metadata={"help": "Reward functions as module:NAME, such as my_rewards:redness."})
    judge_model: str | None = field(
        default=None, metadata={"help": "Name of the judge that rewards ask, at an OpenAI-compatible endpoint."}
    )
    judge_base_url: str | None = field(default=None, metadata={"help": "That endpoint."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_train_split: str = field(
        default="train", metadata={"help": "Split to train on; a file is one split, train. Slices: 'train[:90%%]'."}
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset to evaluate on, named as dataset_name is, which is the default."}
    )
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; test, or all of a file named by eval_dataset_name."}
    )
    recipe: str | None = field(
        default=None, metadata={"help": f"Preset whose settings are the defaults: {', '.join(RECIPES)}."}
    )


@dataclass
class ModelArguments(ModelConfig):
    """TRL's [`~trl.ModelConfig`] with other defaults: the dtype is left to the trainer, adapters have no dropout."""

    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Of the weights. By default float32 where they are trained, below adapters bfloat16 with --bf16.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout of the adapters; with --disable_dropout false alone."}
    )


class TrainParser(TrlParser):
    """
    TRL's parser, which takes one value in YAML for a list of one, names an unknown option of the file, and says what
    is wrong without the usage of three hundred options before it.
    """

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}. --help lists all options.\n")

    def read_recipe(self, arguments: Sequence[str] | None) -> None:
        """Take the settings of the recipe that arguments name as defaults."""
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--recipe")
        self.set_defaults_with_config(recipe=first.parse_known_args(arguments)[0].recipe)

    def set_defaults_with_config(self, **settings: Any) -> list[str]:
        recipe = self.get_default("recipe") or settings.get("recipe")  # the command line's counts more
        if recipe is not None and recipe not in RECIPES:
            raise ValueError(f"recipe={recipe!r}: expected one of {', '.join(RECIPES)}.")
        settings = {**(RECIPES[recipe] if recipe else {}), **settings}
        options = {action.dest: action for action in self._actions}
        for name, value in settings.items():
            if name not in options:
                close = get_close_matches(name, options, n=1)
                raise ValueError(
                    f"The file of --config has an unknown option {name!r}." + f" Is it {close[0]}?" * bool(close)
                )
            if options[name].nargs in ("+", "*") and value is not None and not isinstance(value, list):
                settings[name] = [value]
        return super().set_defaults_with_config(**settings)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse arguments and the file named by `--config`, train, and save to `output_dir`."""
    run_training(*prepare_training(argv))


def run_training(script: TrainArguments, trainer: UniGRPOTrainer) -> None:
    """Train, save, and publish if that was asked for."""
    resume = trainer.args.resume_from_checkpoint
    if isinstance(resume, str) and resume.lower() in ("true", "false"):  # an option of the command line is a text
        resume = resume.lower() == "true"
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(trainer.args.output_dir)
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)


def prepare_training(argv: Sequence[str] | None = None) -> tuple[TrainArguments, UniGRPOTrainer]:
    """
    Make the trainer that arguments ask for.

    Raises:
        ImportError, OSError, TypeError, ValueError: for what can't be trained, before the training.
    """
    parser = TrainParser(
        (TrainArguments, UniGRPOConfig, ModelArguments),
        prog="trl-unigrpo train",
        description="Train with UniGRPO. --config FILE reads options from a YAML file; those beside it count more.",
    )
    given = [part for word in argv or () for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if given[-1:] == ["--config"]:
        raise ValueError("--config names no file: expected one of YAML behind it.")
    arguments = given if argv is not None else None  # those of the process
    parser.read_recipe(arguments)
    script, args, model = parser.parse_args_and_config(arguments)
    if model.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: a folder, a hub id, or 'shapeworld'.")
    check_model_arguments(model, args)
    rewards = list(load_judged(script.reward_funcs, judge_of(script)).values())
    train_dataset, eval_dataset = load_datasets(script, args)
    args.model_init_kwargs = {**loading_arguments(model), **(args.model_init_kwargs or {})}
    return script, UniGRPOTrainer(
        model=model_source(model.model_name_or_path),
        reward_funcs=rewards,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(replace(model, dtype=None) if model.dtype == "auto" else model),
        peft_config=get_peft_config(model),
    )


def judge_of(script: TrainArguments) -> Any:
    """Make the judge that the rewards ask; None without one."""
    if script.judge_model is None:
        if script.judge_base_url is not None:
            raise ValueError(f"--judge_base_url {script.judge_base_url} names no model. Add --judge_model.")
        return None
    from ..rewards.judge.vlm_judge import VLMJudge

    return VLMJudge(script.judge_model, script.judge_base_url)


def model_source(name: str) -> str:
    """Give the folder or hub id of a model by its name here."""
    if name != "shapeworld":
        return name
    from ..shapeworld import BASE

    return str(BASE)


def loading_arguments(model: ModelArguments) -> dict[str, Any]:
    """Choose the arguments of `from_pretrained` that were given, for `model_init_kwargs`."""
    arguments = {
        "revision": None if model.model_revision == "main" else model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    return {name: value for name, value in arguments.items() if value is not None}


def check_model_arguments(model: ModelArguments, args: UniGRPOConfig) -> None:
    """Raise ValueError for options of adapters, or of quantised weights, that would do nothing."""
    changed = [each.name for each in fields(model) if getattr(model, each.name) != each.default]
    groups = {
        "use_peft": [name for name in changed if name.startswith("lora_") or name in ("use_rslora", "use_dora")],
        "load_in_4bit": [name for name in changed if name.startswith("bnb_4bit_") or name == "use_bnb_nested_quant"],
    }
    for switch, names in groups.items():
        if names and not getattr(model, switch):
            raise ValueError(
                f"--{names[0]} {getattr(model, names[0])} does nothing without --{switch}: add that, or leave it out."
            )
    if model.lora_dropout and args.disable_dropout:
        raise ValueError(
            f"--lora_dropout {model.lora_dropout} does nothing: dropout is off, as the update would not compute what "
            "the rollout did. Leave it out, or add --disable_dropout false."
        )
    if model.lora_task_type != "CAUSAL_LM":
        raise ValueError(
            f"--lora_task_type {model.lora_task_type}: a unified model writes its thinking, which is CAUSAL_LM."
        )


def load_datasets(script: TrainArguments, args: UniGRPOConfig) -> tuple[Dataset, Dataset | None]:
    """
    Load the prompts to train on, and those to evaluate on if that was asked for.

    Raises:
        ValueError: if there is no such split, if nothing evaluates the one that was named, or if all prompts to
            evaluate on are trained on.
    """
    train = load_prompts(script.dataset_name, script.dataset_train_split, script.dataset_config)
    named = {"eval_dataset_name": script.eval_dataset_name, "dataset_test_split": script.dataset_test_split}
    if args.eval_strategy == "no" and not args.eval_on_start:
        for option, value in named.items():
            if value is not None:
                raise ValueError(
                    f"--{option} {value}: nothing evaluates it. Add --eval_strategy steps, or leave it out."
                )
        return train, None
    source = script.eval_dataset_name or script.dataset_name
    whole = script.eval_dataset_name is not None and is_file(source)
    config = script.dataset_config if script.eval_dataset_name is None else None
    held_out = load_prompts(source, script.dataset_test_split or ("train" if whole else "test"), config)
    if "prompt" in train.column_names and "prompt" in held_out.column_names:
        known = {json.dumps(prompt, default=str) for prompt in train["prompt"]}
        repeated = sum(json.dumps(prompt, default=str) in known for prompt in held_out["prompt"])
        if repeated == len(held_out) > 0:
            raise ValueError(
                f"All {repeated} prompts to evaluate on are trained on, so that they would measure nothing new. Pass "
                "other ones: --eval_dataset_name, --dataset_test_split, or slices such as 'train[:90%]' and "
                "'train[90%:]'."
            )
        if repeated:
            warnings.warn(f"{repeated} of {len(held_out)} prompts to evaluate on are trained on.")
    return train, held_out
