"""Train BAGEL to tell a story: several edits in a row, each judged beside the image before.

    vllm serve Qwen/Qwen3-VL-8B-Instruct --port 8000
    python examples/story.py

Each line of `stories.jsonl` has what the user asks for, turn by turn, of which the first is the prompt, and the path
of the image that it begins with:

    {"prompt": "make it blue", "turns": ["make it blue", "now let it sleep"], "source_image": "images/cat.png"}
"""

from datasets import load_dataset
from peft import LoraConfig

from trl_unigrpo import UniGRPOConfig, UniGRPOTrainer
from trl_unigrpo.rewards import ConsistencyReward, EditReward, VLMJudge


judge = VLMJudge("Qwen/Qwen3-VL-8B-Instruct", base_url="http://localhost:8000/v1")
trainer = UniGRPOTrainer(
    model="ByteDance-Seed/BAGEL-7B-MoT",
    reward_funcs=[EditReward(judge), ConsistencyReward()],
    args=UniGRPOConfig.editing(
        "bagel-stories", num_rounds=3, round_reward="sum", round_context="full", reward_weights=[1.0, 0.2]
    ),
    train_dataset=load_dataset("json", data_files="stories.jsonl", split="train"),
    peft_config=LoraConfig(r=32, lora_alpha=64),
)
trainer.train()
