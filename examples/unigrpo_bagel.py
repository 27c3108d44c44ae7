"""Fine-tune BAGEL-7B with adapters on one GPU, with a reward of your own on the images.

    python examples/unigrpo_bagel.py --prompts prompts.csv --output_dir bagel-unigrpo

On a GPU with 24 GB, hold the base in 4 bits and Adam's state in 8:

    python examples/unigrpo_bagel.py --prompts prompts.csv --output_dir bagel-unigrpo \\
        --load_in_4bit --use_bnb_nested_quant --optim adamw_8bit --per_device_train_batch_size 1

`prompts.csv` has a column `prompt`; its other columns reach the reward as lists.
Any field of UniGRPOConfig, and of TRL's ModelConfig (`--lora_r`), is an option.
"""

from dataclasses import dataclass, field

import numpy as np
from datasets import load_dataset
from trl import TrlParser, get_peft_config, get_quantization_config

from trl_unigrpo import UniGRPOConfig, UniGRPOTrainer
from trl_unigrpo.cli.train import ModelArguments, loading_arguments
from trl_unigrpo.trainers.recipes import SINGLE_GPU


ADAPTERS = {"use_peft": True, "lora_r": 32, "lora_alpha": 64}


def colorfulness(prompts, completions, images, **columns):
    """Replace me: one number per image, or None where it can't be scored."""
    return [float(np.asarray(image, dtype=np.float32).std(axis=2).mean() / 128) for image in images]


@dataclass
class ScriptArguments:
    prompts: str = field(metadata={"help": "A csv file with a column 'prompt'."})


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, UniGRPOConfig, ModelArguments))
    parser.set_defaults(model_name_or_path="ByteDance-Seed/BAGEL-7B-MoT", **SINGLE_GPU, **ADAPTERS)
    script, args, model = parser.parse_args_and_config()
    args.model_init_kwargs = {**loading_arguments(model), **(args.model_init_kwargs or {})}
    trainer = UniGRPOTrainer(
        model=model.model_name_or_path,
        reward_funcs=colorfulness,
        args=args,
        train_dataset=load_dataset("csv", data_files=script.prompts, split="train"),
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
