"""Train BAGEL to edit, with a vision-language model as the judge.

    vllm serve Qwen/Qwen3-VL-8B-Instruct --port 8000
    python examples/editing.py

Each line of `edits.jsonl` has an instruction and the path of the image that it is about:

    {"prompt": "make the cat blue", "source_image": "images/cat.png"}
"""

from datasets import load_dataset
from peft import LoraConfig

from trl_unigrpo import UniGRPOConfig, UniGRPOTrainer
from trl_unigrpo.rewards import EditReward, VLMJudge


trainer = UniGRPOTrainer(
    model="ByteDance-Seed/BAGEL-7B-MoT",
    reward_funcs=EditReward(VLMJudge("Qwen/Qwen3-VL-8B-Instruct", base_url="http://localhost:8000/v1")),
    args=UniGRPOConfig.editing("bagel-edits"),
    train_dataset=load_dataset("json", data_files="edits.jsonl", split="train"),
    peft_config=LoraConfig(r=32, lora_alpha=64),
)
trainer.train()
