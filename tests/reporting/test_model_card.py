"""The model card: written at every save, true to the run, and its example runs."""

import math
import re

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig
from PIL import Image

from tests.helpers.tiny_painters import tiny_model
from tests.helpers.tiny_pipelines import saved_halves, tokenizer
from tests.helpers.tiny_unified import prompts_dataset, redness, tiny_bagel, tiny_tokenizer
from trl_unigrpo.flow.guidance import Guidance
from trl_unigrpo.models import load_unified_model
from trl_unigrpo.models.pipeline import PipelineForUnifiedGeneration
from trl_unigrpo.reporting.run_files import read_run
from trl_unigrpo.reporting.run_summary import change
from trl_unigrpo.rewards import thinking_reward


SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
EVALUATED = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_on_start": True,
    "num_generations_eval": 1,
    "per_device_eval_batch_size": 4,
}


@thinking_reward
def words(completions, **_):
    return [float(len(text)) for text in completions]


def test_the_card_of_a_run(make_trainer, tmp_path):
    prompts = ["a `red` <script>cat", "a big green dog runs", "a small tree", "a\nb"]
    trainer = make_trainer(
        reward_funcs=[redness, words],
        reward_weights=[0.5, 2.0],
        gallery_steps=50,
        eval_dataset=prompts_dataset(prompts, 1),
        image_learning_rate=0.3,
        **SAVED,
        **EVALUATED,
    )
    trainer.train()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "text-to-image" and {"unigrpo", "trl"} <= set(card.data.tags)
    assert card.data.base_model is None and "None" not in card.text
    text = card.text
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    assert titles == [
        f"Model Card for {tmp_path.name}",
        *("Quick start", "Rewards", "Training procedure", "Settings", "Framework versions", "Citations"),
    ]
    assert "BagelForUnifiedGeneration" in text and "arxiv.org/abs/2603.23500" in text and "2 steps" in text
    assert "- `redness`, weight 0.5\n- `words`, weight 2 (of the thinking)\n" in text
    assert "| `num_generations` | 4 |" in text and "vonwerra2020trl" in text
    found = change(read_run(tmp_path))
    assert f"{found.before:.3f} before, {found.after:.3f} after" in text
    order = [sample.prompt for sample in read_run(tmp_path).shown[0].samples]
    listed = re.findall(r"^\d\. `([^`]*)`$", text, re.MULTILINE)
    assert listed == [prompt.replace("`", "'").replace("\n", " ") for prompt in order]

    some_image = np.asarray(Image.open(tmp_path / "before_after.jpg")).astype(float)
    assert some_image.shape == (18, 38, 3)
    first, last = (shown for shown in read_run(tmp_path).shown if shown.mode == "eval")
    means = []
    for row, shown in enumerate((first, last)):
        for column, sample in enumerate(shown.samples):
            image = np.asarray(Image.open(tmp_path / "gallery" / sample.image)).astype(float)
            cell = some_image[10 * row : 10 * row + 8, 10 * column : 10 * column + 8]
            assert np.abs(cell.mean((0, 1)) - image.mean((0, 1))).max() < 5
            means.append(image.mean((0, 1)))
    assert np.abs(np.subtract(means[:4], means[4:])).max() > 10  # a swap of the rows would be seen


def test_without_evaluations_a_group_and_without_a_gallery_no_image(make_trainer, tmp_path):
    make_trainer(tmp_path / "group", gallery_steps=50, **SAVED).train()
    text = (tmp_path / "group" / "README.md").read_text()
    assert "A group of one prompt at step 0, the best first" in text
    assert Image.open(tmp_path / "group" / "before_after.jpg").size == (38, 8)
    make_trainer(tmp_path / "none", gallery_steps=0, **SAVED).train()
    assert "before_after" not in (tmp_path / "none" / "README.md").read_text()


def run_example(text):
    code = text.split("```python")[1].split("```")[0]
    names = {}
    exec(code, names)
    return names


@pytest.mark.parametrize("adapters", [False, True])
def test_the_example_of_the_card_paints_as_it_was_trained(make_trainer, tmp_path, monkeypatch, adapters):
    import trl_unigrpo.evaluation as evaluation

    base, run = tmp_path / "base", tmp_path / "run"
    tiny_bagel().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    trainer = make_trainer(
        run,
        model=str(base),
        processing_class=None,
        peft_config=LoraConfig(r=2) if adapters else None,
        timestep_shift=2.0,
        guidance_scale=1.5,
        eval_image_size=[8, 12],
        **SAVED,
    )
    trainer.train()
    trainer.save_model(str(run))
    monkeypatch.chdir(tmp_path)
    generate, asked = evaluation.generate, {}
    monkeypatch.setattr(evaluation, "generate", lambda *args, **told: asked.update(told) or generate(*args, **told))
    names = run_example((run / "README.md").read_text())
    trained = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    loaded = dict(names["model"].named_parameters())
    changed = [name for name in loaded if "lora" in name] if adapters else list(loaded)
    assert changed and all(math.isclose(float((trained[n] - loaded[n]).abs().max()), 0) for n in changed)
    assert Image.open(tmp_path / "image.png").size == (12, 8)
    sizes = {"image_size": [8, 12], "num_inference_steps": 6, "max_completion_length": 5}
    assert asked == sizes | {"timestep_shift": 2.0, "guidance": Guidance(1.5)}


@pytest.mark.parametrize(
    "kind", ["whole", pytest.param("adapters", marks=pytest.mark.slow), "adapters of a saved one"]
)
def test_the_example_of_a_pipelines_card_paints_as_it_was_trained(make_trainer, tmp_path, monkeypatch, kind):
    """With transformers and diffusers alone."""
    told = {"painter_arguments": {"max_sequence_length": 24}, "dtype": torch.float32}
    model = PipelineForUnifiedGeneration.from_pretrained(**saved_halves(tmp_path), **told)
    if kind == "adapters of a saved one":
        model.save_pretrained(tmp_path / "saved")
        model = load_unified_model(str(tmp_path / "saved"), dtype=torch.float32)
    trainer = make_trainer(
        tmp_path / "run",
        model=model,
        processing_class=model.tokenizer,
        peft_config=None if kind == "whole" else LoraConfig(r=2),
        image_learning_rate=0.1,
        system_prompt="paint well",
        **SAVED,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    text = (tmp_path / "run" / "README.md").read_text()
    names = run_example(text)
    assert names["image"].size == (8, 8) and "num_inference_steps=6" in text
    assert names["tokens"].shape[1] - names["inputs"]["input_ids"].shape[1] <= 5
    assert names["messages"][0]["content"] == "paint well"
    prompt = names["text"].rpartition("</think>")[2].strip() or "A red cube on a blue table"
    arguments = {"height": 8, "width": 8, "num_inference_steps": 6, "output_type": "pt"}
    painted = [
        pipeline(prompt, **trainer.unified.painter_arguments, **arguments, generator=torch.manual_seed(0)).images
        for pipeline in (names["pipeline"], trainer.unified.pipeline)
    ]
    assert torch.equal(*painted)


def test_a_pipelines_card_names_its_parts(make_trainer, tmp_path):
    model = tiny_model()
    model.config.sources = {"thinker": "org/thinker", "painter": "org/painter"}
    trainer = make_trainer(
        model=model, processing_class=tokenizer(), peft_config=LoraConfig(r=2), image_size=8, **SAVED
    )
    trainer.train()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == ["org/thinker", "org/painter"]
    assert "[org/thinker](https://huggingface.co/org/thinker) and [org/painter]" in card.text
    assert "None" not in card.text.split("## Rewards")[0]
    assert "DiffusionPipeline.from_pretrained" in card.text and "PeftModel.from_pretrained(thinker" in card.text
