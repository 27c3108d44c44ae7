"""Train BAGEL to say what is wrong in its image and paint a better one, with a vision-language model as the judge.

    vllm serve Qwen/Qwen3-VL-8B-Instruct --port 8000
    python examples/self_refinement.py

`prompts.csv` has a column `prompt`. `UniGRPOConfig.reflect_until_good` in place of `self_refinement` also teaches the
model to keep an image that is good.
"""

from datasets import load_dataset
from peft import LoraConfig

from trl_unigrpo import UniGRPOConfig, UniGRPOTrainer
from trl_unigrpo.rewards import VLMJudge


trainer = UniGRPOTrainer(
    model="ByteDance-Seed/BAGEL-7B-MoT",
    reward_funcs=VLMJudge("Qwen/Qwen3-VL-8B-Instruct", base_url="http://localhost:8000/v1"),
    args=UniGRPOConfig.self_refinement("bagel-refine"),
    train_dataset=load_dataset("csv", data_files="prompts.csv", split="train"),
    peft_config=LoraConfig(r=32, lora_alpha=64),
)
trainer.train()
