"""Train the built-in tiny BAGEL with a vision-language model as the judge, in place of ShapeWorld's verifier.

    vllm serve Qwen/Qwen3-VL-8B-Instruct --port 8000
    python examples/judge_shapeworld.py --base_url http://localhost:8000/v1 --judge Qwen/Qwen3-VL-8B-Instruct \\
        --output_dir shapeworld-judged

Any OpenAI-compatible endpoint will do. Any field of UniGRPOConfig is an option.
"""

from dataclasses import dataclass, field

from trl import TrlParser

from trl_unigrpo import UniGRPOConfig, UniGRPOTrainer
from trl_unigrpo.rewards import VLMJudge
from trl_unigrpo.shapeworld import BASE, demo_settings, shapeworld_dataset


@dataclass
class ScriptArguments:
    base_url: str = field(metadata={"help": "The judge's endpoint, as in http://localhost:8000/v1."})
    judge: str = field(metadata={"help": "The name under which the endpoint serves the model."})


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, UniGRPOConfig))
    parser.set_defaults(**demo_settings())
    script, args = parser.parse_args_and_config()
    trainer = UniGRPOTrainer(
        model=str(BASE),
        reward_funcs=VLMJudge(script.judge, base_url=script.base_url, image_format="png"),  # was: shapeworld_reward
        args=args,
        train_dataset=shapeworld_dataset("train"),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
