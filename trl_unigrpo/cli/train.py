"""`trl-unigrpo train`: UniGRPO from the command line or a YAML file, as `trl grpo` does GRPO."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import typer

from .options import told_in_a_line


PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Settings of a command whose options another parser reads."""


@dataclass
class TrainArguments:
    r"""
    The data to train on, and the rewards.

    Parameters:
        dataset_name (`str`): hub id or folder of a dataset, a csv, json, jsonl, parquet or txt file, or `shapeworld`.
        dataset_config (`str`, *optional*): configuration of a hub dataset.
        dataset_train_split (`str`, *optional*, defaults to `"train"`): split to train on.
        dataset_test_split (`str`, *optional*, defaults to `"test"`): split to evaluate on, if `eval_strategy` says so.
        reward_funcs (`list[str]`): reward functions as `module:NAME`, such as `my_rewards:redness`, or
            `think_format_reward`.
    """

    dataset_name: str = field(
        metadata={"help": "Hub id or folder of a dataset, a csv/json/jsonl/parquet/txt file, or 'shapeworld'."}
    )
    reward_funcs: list[str] = field(metadata={"help": "Reward functions as module:NAME, such as my_rewards:redness."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})


def train_command(context: typer.Context) -> None:
    """Train with UniGRPO: --config file.yaml, or options; train --help lists them."""
    run_training(context.args)


def run_training(argv: Sequence[str] | None = None) -> None:
    """Parse arguments and the file named by `--config`, train, and save to `output_dir`."""
    from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

    from ..rewards.loading import load_reward
    from ..trainers.unigrpo_config import UniGRPOConfig
    from ..trainers.unigrpo_trainer import UniGRPOTrainer
    from .prompt_files import load_prompts

    parser = TrlParser((TrainArguments, UniGRPOConfig, ModelConfig), prog="trl-unigrpo train")
    script, args, model = parser.parse_args_and_config(
        list(argv) if argv is not None else None, fail_with_unknown_args=True
    )
    if model.model_name_or_path is None:
        raise SystemExit("trl-unigrpo train: --model_name_or_path is missing: a folder, a hub id, or 'shapeworld'.")
    source = model.model_name_or_path
    if source == "shapeworld":
        from ..shapeworld import BASE

        source = str(BASE)
    with told_in_a_line("train", ValueError):
        rewards = [load_reward(path) for path in script.reward_funcs]
    evaluates = args.eval_strategy != "no"
    trainer = UniGRPOTrainer(
        model=source,
        reward_funcs=rewards,
        args=args,
        train_dataset=load_prompts(script.dataset_name, script.dataset_train_split, script.dataset_config),
        eval_dataset=load_prompts(script.dataset_name, script.dataset_test_split, script.dataset_config)
        if evaluates
        else None,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
