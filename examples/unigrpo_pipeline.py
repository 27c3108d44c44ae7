"""Train a language model that thinks and a diffusers pipeline that paints, with adapters on both.

    python examples/unigrpo_pipeline.py --thinker Qwen/Qwen3-1.7B \\
        --painter stabilityai/stable-diffusion-3.5-medium --prompts prompts.csv --output_dir sd3-unigrpo

Where the painter's text encoder is a language model itself, leave `--thinker` out, and it thinks, in memory once:

    python examples/unigrpo_pipeline.py --painter Qwen/Qwen-Image --load_in_4bit \\
        --prompts prompts.csv --output_dir qwen-unigrpo

`prompts.csv` has a column `prompt`; its other columns reach the reward as lists.
Any field of UniGRPOConfig, and of TRL's ModelConfig (`--lora_r`), is an option; `--model_revision` is both models'.
"""

from dataclasses import dataclass, field

import numpy as np
from datasets import load_dataset
from trl import TrlParser, get_peft_config, get_quantization_config

from trl_unigrpo import PipelineForUnifiedGeneration, UniGRPOConfig, UniGRPOTrainer
from trl_unigrpo.cli.train import ModelArguments, loading_arguments
from trl_unigrpo.trainers.recipes import SINGLE_GPU


ADAPTERS = {"use_peft": True, "lora_r": 32, "lora_alpha": 64}


def colorfulness(prompts, completions, images, **columns):
    """Replace me: one number per image, or None where it can't be scored."""
    return [float(np.asarray(image, dtype=np.float32).std(axis=2).mean() / 128) for image in images]


@dataclass
class ScriptArguments:
    prompts: str = field(metadata={"help": "A csv file with a column 'prompt'."})
    painter: str = field(metadata={"help": "Folder or hub id of a flow-matching pipeline of diffusers."})
    thinker: str | None = field(
        default=None, metadata={"help": "Folder or hub id of a causal language model; the painter's own if left out."}
    )
    painter_prompt: str = field(
        default="answer", metadata={"help": "What the painter is told: 'answer', 'prompt_and_answer' or 'completion'."}
    )


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, UniGRPOConfig, ModelArguments))
    parser.set_defaults(**SINGLE_GPU, **ADAPTERS)
    script, args, model = parser.parse_args_and_config()
    trainer = UniGRPOTrainer(
        model=PipelineForUnifiedGeneration.from_pretrained(
            thinker=script.thinker,
            painter=script.painter,
            painter_prompt=script.painter_prompt,
            quantization_config=get_quantization_config(model),
            **loading_arguments(model),
        ),
        reward_funcs=colorfulness,
        args=args,
        train_dataset=load_dataset("csv", data_files=script.prompts, split="train"),
        peft_config=get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
