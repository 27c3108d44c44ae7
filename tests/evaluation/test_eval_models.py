"""Any model by name paints what it paints in memory; weights are told apart."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.helpers.paths import FIXTURES
from trl_unigrpo.evaluation import generate
from trl_unigrpo.evaluation.benchmark import Painting
from trl_unigrpo.evaluation.models import fingerprint, load_model, parts_of
from trl_unigrpo.evaluation.runner import Options, run
from trl_unigrpo.evaluation.scorers import RewardScorer
from trl_unigrpo.shapeworld import BASE, load_base


RELEASED = FIXTURES / "bagel" / "tiny_bagel"
PAINTING = {"image_size": 8, "num_inference_steps": 3, "max_completion_length": 5}
FLOAT = {"dtype": "float32", "device": "cpu"}


def painted(model, tokenizer, size=48, prompts=("a red circle",)):
    sizes = {"num_inference_steps": 3, "image_size": size, "max_completion_length": 5}
    return [np.asarray(s.image) for s in generate(model, list(prompts), tokenizer, **sizes)]


def same(images, others):
    return all(np.array_equal(a, b) for a, b in zip(images, others, strict=True))


def test_the_built_in_model_and_a_checkpoint(base, tmp_path):
    expected = painted(*base)
    assert same(painted(*load_model("shapeworld", **FLOAT)), expected)
    model, tokenizer = load_base()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(-1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    changed = painted(*load_model(str(tmp_path), **FLOAT))
    assert same(changed, painted(model, tokenizer)) and not same(changed, expected)
    assert fingerprint(str(tmp_path)) != fingerprint("shapeworld") == fingerprint(str(BASE))


def test_a_released_folder():
    model, tokenizer = load_model(str(RELEASED), **FLOAT)
    assert type(model).__name__ == "BagelForUnifiedGeneration" and not model.training
    assert model.dtype == torch.float32 and len(tokenizer) > 0
    assert load_model(str(RELEASED), dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16


def adapters(folder):
    model, tokenizer = load_base()
    torch.manual_seed(0)
    targets = model.default_lora_targets("both")
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=40, target_modules=targets, init_lora_weights=False))
    adapted.save_pretrained(folder)
    return adapted.eval(), tokenizer


def test_adapters_on_what_they_were_trained_on(base, tmp_path):
    expected = painted(*adapters(tmp_path))
    assert not same(expected, painted(*base))
    model, tokenizer = load_model(str(tmp_path), **FLOAT)
    assert isinstance(model, PeftModel) and same(painted(model, tokenizer), expected)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(BASE)
    assert parts_of(str(tmp_path), None, None, None) == {"source": str(tmp_path), "base": str(BASE)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="do not say what they were trained on: pass base"):
        load_model(str(tmp_path), **FLOAT)
    assert same(painted(*load_model(str(tmp_path), base="shapeworld", **FLOAT)), expected)


def test_a_pipelines_folder_and_its_parts(tmp_path):
    from tests.helpers.tiny_pipelines import FAMILIES, qwen3, tokenizer
    from trl_unigrpo.models.pipeline import PipelineForUnifiedGeneration

    tiny = FAMILIES["sd3"]()
    qwen3(language_head=True).save_pretrained(tmp_path / "thinker")
    tokenizer().save_pretrained(tmp_path / "thinker")
    tiny.pipeline.save_pretrained(tmp_path / "painter")
    parts = {"thinker": str(tmp_path / "thinker"), "painter": str(tmp_path / "painter")}
    whole = PipelineForUnifiedGeneration.from_pretrained(**parts, dtype=torch.float32)
    whole.save_pretrained(tmp_path / "whole")
    expected = painted(whole, whole.tokenizer, tiny.size[0])
    assert same(painted(*load_model(None, **parts, **FLOAT), tiny.size[0]), expected)
    assert same(painted(*load_model(str(tmp_path / "whole"), **FLOAT), tiny.size[0]), expected)


@pytest.fixture
def halves(tmp_path):
    """Folders of a thinker and of a painter."""
    from tests.helpers.tiny_pipelines import saved_halves

    return saved_halves(tmp_path)


def pipeline_adapters(model, folder):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=model.default_lora_targets("both"), init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(folder)  # as a trainer saves them
    model.save_adapters(folder)
    model.tokenizer.save_pretrained(folder)
    return painted(adapted.eval(), model.tokenizer, 8)


def test_adapters_of_a_pipeline_say_what_they_were_trained_on(halves, tmp_path):
    from trl_unigrpo.models.pipeline import PipelineForUnifiedGeneration

    told = {"painter_prompt": "completion", "painter_arguments": {"max_sequence_length": 24}, "system_prompt": "paint"}
    model = PipelineForUnifiedGeneration.from_pretrained(**halves, **told, dtype=torch.float32)
    expected = pipeline_adapters(model, tmp_path / "run")
    run = str(tmp_path / "run")
    read, tokenizer = load_model(run, **FLOAT)
    assert same(painted(read, tokenizer, 8), expected)
    config = read.get_base_model().config
    assert {name: getattr(config, name) for name in told} == told and config.sources == halves
    assert parts_of(run, None, None, None) == {"source": run, **halves}

    shutil.move(halves["painter"], tmp_path / "moved")  # which its user says; the rest is as it was trained
    moved, tokenizer = load_model(run, painter=str(tmp_path / "moved"), **FLOAT)
    assert same(painted(moved, tokenizer, 8), expected)
    assert moved.get_base_model().config.sources == halves | {"painter": str(tmp_path / "moved")}
    with pytest.raises(ValueError, match=r"a painter from '.*painter', which is gone: .*--painter P --thinker T"):
        load_model(run, **FLOAT)


def test_adapters_of_a_saved_pipeline_sit_on_its_folder(halves, tmp_path):
    """Not on the halves that it was once put together from, whose weights may be others."""
    from trl_unigrpo.models import load_unified_model
    from trl_unigrpo.models.pipeline import PipelineForUnifiedGeneration

    whole = PipelineForUnifiedGeneration.from_pretrained(**halves, dtype=torch.float32)
    with torch.no_grad():
        whole.painter.proj_out.bias.add_(1.0)
    whole.save_pretrained(tmp_path / "whole")
    model = load_unified_model(str(tmp_path / "whole"), dtype=torch.float32)
    expected = pipeline_adapters(model, tmp_path / "run")
    read, tokenizer = load_model(str(tmp_path / "run"), **FLOAT)
    assert same(painted(read, tokenizer, 8), expected)
    assert parts_of(str(tmp_path / "run"), None, None, None)["base"] == str(tmp_path / "whole")
    assert f'DiffusionPipeline.from_pretrained("{tmp_path}/whole/painter")' in model.quick_start("run", PAINTING)


def test_adapters_of_a_painter_that_thinks(tmp_path):
    from tests.helpers.tiny_pipelines import FAMILIES
    from trl_unigrpo.models.pipeline import PipelineForUnifiedGeneration

    tiny = FAMILIES["z_image"]()
    tiny.pipeline.save_pretrained(tmp_path / "painter")
    model = PipelineForUnifiedGeneration.from_pretrained(painter=str(tmp_path / "painter"), dtype=torch.float32)
    torch.manual_seed(0)
    targets = model.default_lora_targets("both")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "run")
    model.save_adapters(tmp_path / "run")
    expected = painted(adapted.eval(), model.tokenizer, tiny.size[0])
    assert same(painted(*load_model(str(tmp_path / "run"), **FLOAT), tiny.size[0]), expected)
    assert parts_of(str(tmp_path / "run"), None, None, None)["painter"] == str(tmp_path / "painter")


def test_adapters_that_name_a_thinker_alone(halves, tmp_path):
    """As runs of earlier versions do, and models that were made in memory."""
    from tests.helpers.tiny_painters import tiny_model
    from trl_unigrpo.models.pipeline import PipelineForUnifiedGeneration

    model = PipelineForUnifiedGeneration.from_pretrained(**halves, dtype=torch.float32)
    get_peft_model(model, LoraConfig(r=2, target_modules=model.default_lora_targets())).save_pretrained(
        tmp_path / "old"
    )
    with pytest.raises(ValueError, match=r"trained on '.*thinker', a Qwen3.*no images. .*--painter P --thinker T"):
        load_model(str(tmp_path / "old"), **FLOAT)
    pipeline_adapters(tiny_model("sd3"), tmp_path / "memory")
    with pytest.raises(ValueError, match="a painter from one without a name: .*--painter P --thinker T"):
        load_model(str(tmp_path / "memory"), **FLOAT)


def test_a_tokenizer_beside_the_adapters_where_the_base_has_none(tmp_path):
    shutil.copytree(BASE, tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*"))
    model, tokenizer = load_base()
    model.name_or_path = str(tmp_path / "base")
    get_peft_model(model, LoraConfig(r=2, target_modules=model.default_lora_targets())).save_pretrained(
        tmp_path / "run"
    )
    with pytest.raises(OSError, match=r"No tokenizer can be read from '.*run'"):
        load_model(str(tmp_path / "run"), **FLOAT)
    tokenizer.save_pretrained(tmp_path / "run")
    assert load_model(str(tmp_path / "run"), **FLOAT)[1].get_vocab() == tokenizer.get_vocab()


def test_bad_names(tmp_path):
    with pytest.raises(ValueError, match="no model"):
        load_model(None)
    with pytest.raises(ValueError, match="is a whole model"):
        load_model("shapeworld", base="other")
    with pytest.raises(ValueError, match="thinker='other' without a painter paints nothing"):
        parts_of(None, None, "other", None)
    with pytest.raises(ValueError, match="dtype='int8'"):
        load_model("shapeworld", dtype="int8")
    with pytest.raises(OSError):
        load_model(str(tmp_path / "nothing"))


def test_weights_are_known_by_their_content_and_not_by_a_runs_checkpoints(tmp_path):
    shutil.copytree(BASE, tmp_path / "a")
    first = fingerprint(str(tmp_path / "a"))
    shutil.copytree(BASE, tmp_path / "a" / "checkpoint-3")
    assert fingerprint(str(tmp_path / "a")) == first == fingerprint(str(BASE))
    (file,) = [file for file in (tmp_path / "a").glob("*.safetensors") if file.stat().st_size > 1_000_000][:1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert fingerprint(str(tmp_path / "a")) != first


def test_a_pipeline_runs_a_benchmark(asked, tmp_path):
    from tests.helpers.tiny_painters import tiny_model

    model = tiny_model("sd3")
    benchmark = replace(asked, metric=None, painting=Painting(1, 2, 8, 4, 2))
    scorer = RewardScorer({"size": lambda prompts, completions, images, **columns: [i.width / 8 for i in images]})
    lines = run(model, model.tokenizer, benchmark, scorer, tmp_path, Options(benchmark.painting))
    assert [line["reward"] for line in lines] == [1.0] * 4
