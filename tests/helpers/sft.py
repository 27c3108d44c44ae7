"""Rows for supervised fine-tuning, and a trainer over a random tiny BAGEL."""

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from tests.helpers.tiny_unified import IMAGE_SIZE, tiny_bagel, tiny_tokenizer
from trl_unigrpo.trainers.sft_trainer import UnifiedSFTConfig, UnifiedSFTTrainer


def some_image(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


ROWS = [
    {"prompt": "a red cat", "completion": "<think> the cat sits </think>", "image": some_image(0)},
    {"prompt": "a small tree", "completion": "<think> a big tree under the mat </think>", "image": some_image(1)},
    {"prompt": "the green dog runs", "completion": "", "image": some_image(2)},
    {"prompt": "a mat", "completion": None, "image": some_image(3)},
]


def many_rows(count):
    """Rows with thinkings of all lengths, some with none."""
    words = ["the", "cat", "sits", "on", "the", "mat", "and", "the", "dog", "runs"]
    return [
        {"prompt": words[i % 5], "completion": " ".join(words[: i % 5 * 2]), "image": some_image(i)}
        for i in range(count)
    ]


def make_sft(tmp_path, model=None, rows=ROWS, eval_dataset=None, **changes):
    settings = {
        "output_dir": str(tmp_path),
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
    }
    return UnifiedSFTTrainer(
        model=tiny_bagel() if model is None else model,
        args=UnifiedSFTConfig(**{**settings, **changes}),
        train_dataset=Dataset.from_list(rows, features=FEATURES) if isinstance(rows, list) else rows,
        eval_dataset=eval_dataset,
        processing_class=tiny_tokenizer(),
    )


FEATURES = Features({"prompt": Value("string"), "completion": Value("string"), "image": ImageFeature()})
