"""Train BAGEL by its own reading: no judge, no server, no labels. `prompts.csv` has a column `prompt`."""

from datasets import load_dataset
from peft import LoraConfig

from trl_unigrpo import UniGRPOConfig, UniGRPOTrainer
from trl_unigrpo.rewards import ReadBackReward


trainer = UniGRPOTrainer(
    model="ByteDance-Seed/BAGEL-7B-MoT",
    reward_funcs=ReadBackReward(),
    args=UniGRPOConfig.self_rewarded("bagel-self-rewarded"),
    train_dataset=load_dataset("csv", data_files="prompts.csv", split="train"),
    peft_config=LoraConfig(r=32, lora_alpha=64),
)
trainer.train()
