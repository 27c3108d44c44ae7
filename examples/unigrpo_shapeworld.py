"""Train the built-in tiny BAGEL on the built-in world: a CPU and a few minutes are enough.

    python examples/unigrpo_shapeworld.py --output_dir shapeworld-unigrpo --max_steps 200

Any field of UniGRPOConfig is an option, or an entry of a YAML file given by --config.
"""

from trl import TrlParser

from trl_unigrpo import UniGRPOConfig, UniGRPOTrainer
from trl_unigrpo.shapeworld import (
    BASE,
    demo_settings,
    shapeworld_dataset,
    shapeworld_reward,
)


if __name__ == "__main__":
    parser = TrlParser(UniGRPOConfig)
    parser.set_defaults(**demo_settings())
    (args,) = parser.parse_args_and_config()
    trainer = UniGRPOTrainer(
        model=str(BASE),
        reward_funcs=shapeworld_reward,
        args=args,
        train_dataset=shapeworld_dataset("train"),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
