"""A model without a tokenizer: every door says the same, and what to do."""

import json

import pytest
from peft import LoraConfig, get_peft_model
from PIL import Image

from tests.helpers.tiny_unified import prompts_dataset, redness, tiny_bagel, tiny_config, tiny_tokenizer
from trl_unigrpo import ReFLConfig, ReFLTrainer, UniGRPOTrainer
from trl_unigrpo.evaluation import generate, load_model
from trl_unigrpo.models import load_unified_model
from trl_unigrpo.models.pipeline import PipelineForUnifiedGeneration
from trl_unigrpo.models.tokenizer import read_tokenizer
from trl_unigrpo.trainers.sft_trainer import UnifiedSFTConfig, UnifiedSFTTrainer


PAINTING = {"image_size": 8, "num_inference_steps": 2, "max_completion_length": 3}
CPU = {"report_to": "none", "use_cpu": True, "bf16": False}
EXAMPLES = prompts_dataset(completion=["<think> a </think>"] * 4, image=[Image.new("RGB", (8, 8))] * 4)
DOORS = {
    "generate": lambda folder, out: generate(load_unified_model(folder), ["a red cat"], **PAINTING),
    "eval": lambda folder, out: load_model(folder),
    "train": lambda folder, out: UniGRPOTrainer(folder, redness, tiny_config(out), prompts_dataset()),
    "sft": lambda folder, out: UnifiedSFTTrainer(folder, UnifiedSFTConfig(out, **CPU), EXAMPLES),
    "refl": lambda folder, out: ReFLTrainer(
        folder, lambda pixels, **_: pixels.mean((1, 2, 3)), ReFLConfig(out, image_size=8, **CPU), prompts_dataset()
    ),
}


@pytest.fixture
def merged(tmp_path):
    """A model that was merged and saved without its tokenizer."""
    base = tiny_bagel()
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=base.default_lora_targets("both")))
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    return tmp_path / "merged"


@pytest.mark.parametrize("door", DOORS)
def test_every_door_says_that_there_is_no_tokenizer(merged, tmp_path, door):
    with pytest.raises(
        OSError, match=r"No tokenizer can be read from '.*merged'. Put .*`tokenizer.json`.*or pass a tok"
    ):
        DOORS[door](str(merged), str(tmp_path / "out"))
    tiny_tokenizer().save_pretrained(merged)
    DOORS[door](str(merged), str(tmp_path / "out"))


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma"])
def test_an_empty_tokenizer_is_none(tmp_path, kind):
    """transformers makes one for a folder that has only a configuration."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(OSError, match="No tokenizer can be read"):
        read_tokenizer(str(tmp_path))


def test_a_thinker_without_a_tokenizer(tmp_path):
    from tests.helpers.tiny_pipelines import FAMILIES, qwen3

    qwen3(language_head=True).save_pretrained(tmp_path / "thinker")
    with pytest.raises(OSError, match=r"No tokenizer can be read from '.*thinker'"):
        PipelineForUnifiedGeneration.from_pretrained(
            thinker=str(tmp_path / "thinker"), painter=FAMILIES["sd3"]().pipeline
        )
