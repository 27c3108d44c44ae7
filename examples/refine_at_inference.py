"""Paint, look at the image, paint again, and keep what a vision-language model likes best; nothing is trained.

    vllm serve Qwen/Qwen3-VL-8B-Instruct --port 8000
    python examples/refine_at_inference.py

Without `judge=` the answer is the last image, and it is the model that knows when to stop.
"""

from trl_unigrpo.evaluation import load_model, refine
from trl_unigrpo.rewards import VLMJudge


model, tokenizer = load_model("ByteDance-Seed/BAGEL-7B-MoT")
judge = VLMJudge("Qwen/Qwen3-VL-8B-Instruct", base_url="http://localhost:8000/v1")
prompts = ["a red cube on top of a blue sphere", "three green apples and a yellow cup"]

refined = refine(model, prompts, tokenizer, rounds=3, judge=judge, image_size=512)
for number, one in enumerate(refined):
    for text, score in zip(one.texts, one.scores, strict=True):
        print(f"{score}  {text}")
    one.image.save(f"refined_{number}.png")
