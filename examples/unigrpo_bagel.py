"""Fine-tune BAGEL-7B with LoRA on one large GPU, with a reward of your own on the images.

    python examples/unigrpo_bagel.py --prompts prompts.csv --output_dir bagel-unigrpo

`prompts.csv` has a column `prompt`; its other columns reach the reward as lists.
Any field of UniGRPOConfig is an option.
"""

from dataclasses import dataclass, field

import numpy as np
from datasets import load_dataset
from peft import LoraConfig
from trl import TrlParser

from trl_unigrpo import UniGRPOConfig, UniGRPOTrainer
from trl_unigrpo.unigrpo_config import SINGLE_GPU


def colorfulness(prompts, completions, images, **columns):
    """Replace me: one number per image, or None where it can't be scored."""
    return [float(np.asarray(image, dtype=np.float32).std(axis=2).mean() / 128) for image in images]


@dataclass
class ScriptArguments:
    prompts: str = field(metadata={"help": "A csv file with a column 'prompt'."})
    model: str = field(
        default="ByteDance-Seed/BAGEL-7B-MoT", metadata={"help": "Folder or hub id of a unified model."}
    )
    lora_rank: int = field(default=32, metadata={"help": "Rank of the adapters of both experts."})


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, UniGRPOConfig))
    parser.set_defaults(**SINGLE_GPU)
    script, args = parser.parse_args_and_config()
    trainer = UniGRPOTrainer(
        model=script.model,
        reward_funcs=colorfulness,
        args=args,
        train_dataset=load_dataset("csv", data_files=script.prompts, split="train"),
        peft_config=LoraConfig(r=script.lora_rank, lora_alpha=2 * script.lora_rank),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
