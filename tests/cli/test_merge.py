"""`trl-unigrpo merge`: one folder that computes what base and adapters compute, and what is refused."""

import json

import diffusers
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig
from typer.testing import CliRunner

from tests.helpers.adapters import difference, outputs
from tests.helpers.painting import painted_steps, prompts_alone
from tests.helpers.paths import FIXTURES
from tests.helpers.tiny_cosmos3 import tiny_cosmos3
from tests.helpers.tiny_painters import PROMPTS, generators
from tests.helpers.tiny_pipelines import FAMILIES, qwen3, tokenizer
from tests.helpers.tiny_unified import tiny_bagel, tiny_tokenizer
from trl_unigrpo.cli import app
from trl_unigrpo.cli.train import main as train
from trl_unigrpo.evaluation.models import load_model
from trl_unigrpo.flow.sampler import RolloutPlan
from trl_unigrpo.models.bagel import BagelForUnifiedGeneration
from trl_unigrpo.models.pipeline import PipelineForUnifiedGeneration
from trl_unigrpo.models.registry import load_unified_model, unified_model
from trl_unigrpo.shapeworld import load_base
from trl_unigrpo.trajectory import in_order


FLOAT = {"dtype": "float32", "device": "cpu"}


def merge(*arguments):
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


def merged(*arguments):
    result = merge(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def adapt(model, folder, rank=4):
    """Write random adapters of both experts, none of whose numbers is zero."""
    torch.manual_seed(0)
    targets = model.default_lora_targets("both")
    adapted = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=4 * rank, target_modules=targets, init_lora_weights=False)
    )
    adapted.save_pretrained(folder)


@pytest.fixture
def bagel(tmp_path):
    """A folder of a random tiny BAGEL with its tokenizer."""
    tiny_bagel().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_bagel_is_its_base_with_the_adapters(bagel, tmp_path):
    adapt(load_unified_model(str(bagel)), tmp_path / "adapters")
    told = merged(tmp_path / "adapters", tmp_path / "new" / "merged")
    assert told == f"{tmp_path}/new/merged: {tmp_path}/adapters merged into {bagel}, in float32.\n"
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["merged"]
    expected = outputs(load_model(str(tmp_path / "adapters"), **FLOAT)[0])
    model, _ = load_model(str(tmp_path / "new" / "merged"), **FLOAT)
    assert type(model) is BagelForUnifiedGeneration
    assert difference(outputs(model), expected) < 1e-5
    assert difference(outputs(load_unified_model(str(bagel))), expected) > 1e-2


def test_the_released_form_with_its_autoencoder_and_tokenizer(tmp_path):
    released = FIXTURES / "bagel" / "tiny_bagel"
    adapt(load_unified_model(str(released)), tmp_path / "adapters")
    merged(tmp_path / "adapters", tmp_path / "merged", "--dtype", "bfloat16")
    model, own = load_model(str(tmp_path / "merged"), **FLOAT)
    before, tokens = load_model(str(released), **FLOAT)
    assert model.codec is not None and own.get_vocab() == tokens.get_vocab()
    assert set(model.state_dict()) == set(before.state_dict())
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_the_merged_weights_have_the_dtype_of_the_base(bagel, tmp_path):
    adapt(load_unified_model(str(bagel)), tmp_path / "adapters")
    halved = load_unified_model(str(bagel), dtype=torch.bfloat16)
    halved.save_pretrained(tmp_path / "half")
    tiny_tokenizer().save_pretrained(tmp_path / "half")
    told = merged(tmp_path / "adapters", tmp_path / "merged", "--base", tmp_path / "half")
    assert told.endswith(f"merged into {tmp_path}/half, in bfloat16.\n")
    assert (
        load_file(tmp_path / "merged" / "model.safetensors")["language_model.lm_head.weight"].dtype == torch.bfloat16
    )


def test_eval_and_train_load_it(tmp_path):
    adapt(load_base()[0], tmp_path / "adapters")
    merged(tmp_path / "adapters", tmp_path / "merged")
    found = []
    for name in ("adapters", "merged"):
        result = CliRunner().invoke(
            app,
            [
                "eval",
                "--benchmark",
                "shapeworld",
                "--num-prompts",
                "7",
                "--num-inference-steps",
                "2",
                "--device",
                "cpu",
            ]
            + ["--greedy", "--model", str(tmp_path / name), "--output-dir", str(tmp_path / f"eval-{name}")],
        )
        assert result.exit_code == 0, result.output
        found.append(json.loads((tmp_path / f"eval-{name}" / "summary.json").read_text())["metrics"]["image_error"])
    assert found[0]["mean"] == pytest.approx(found[1]["mean"], abs=1e-4)
    settings = {
        "model_name_or_path": tmp_path / "merged",
        "dataset_name": "shapeworld",
        "max_steps": 1,
        "image_size": 48,
    }
    settings |= {"reward_funcs": "trl_unigrpo.shapeworld:shapeworld_reward", "output_dir": tmp_path / "run"}
    settings |= {
        "num_generations": 2,
        "per_device_train_batch_size": 2,
        "max_completion_length": 4,
        "report_to": "none",
    }
    settings |= {"num_inference_steps": 7, "sde_window_size": 1, "num_iterations": 1, "use_cpu": True, "bf16": False}
    train([str(part) for name, value in settings.items() for part in (f"--{name}", value)])
    assert (tmp_path / "run" / "model.safetensors").is_file()


# Pipelines


def computed(model, steps):
    """Logits of the thinker, and velocities of the painter."""
    base = unified_model(model)
    with torch.no_grad():
        logits = base(input_ids=torch.tensor([[10, 20, 30]])).logits
        return logits, in_order(base.velocities(steps))


def assert_merged(folder, adapters, size, **base):
    """The folder computes what the adapters compute on their base, and not what the base does."""
    adapted, plain = (
        load_model(str(adapters), **base, **FLOAT)[0],
        load_model(base.pop("base", None), **base, **FLOAT)[0],
    )
    assert isinstance(adapted, PeftModel)
    painter = unified_model(adapted)
    plan = RolloutPlan(painter.own_timesteps(3, size), size, torch.tensor((0, 1)))
    steps = painted_steps(painter, prompts_alone(PROMPTS[:2]), plan, generators(2))
    expected = computed(adapted, steps)
    assert difference(computed(load_model(str(folder), **FLOAT)[0], steps), expected) < 1e-5
    changed = [difference([one], [other]) for one, other in zip(computed(plain, steps), expected, strict=True)]
    assert min(changed) > 1e-3


def test_a_pipeline_of_two_parts(tmp_path):
    tiny = FAMILIES["sd3"]()
    qwen3(language_head=True).save_pretrained(tmp_path / "thinker")
    tokenizer().save_pretrained(tmp_path / "thinker")
    tiny.pipeline.save_pretrained(tmp_path / "painter")
    parts = {name: str(tmp_path / name) for name in ("thinker", "painter")}
    model = PipelineForUnifiedGeneration.from_pretrained(**parts, dtype=torch.float32)
    adapt(model, tmp_path / "adapters")
    given = [part for name, value in parts.items() for part in (f"--{name}", value)]
    told = merged(tmp_path / "adapters", tmp_path / "merged", *given)
    assert told.endswith(f"merged into {tmp_path}/thinker + {tmp_path}/painter, in float32.\n")
    assert_merged(tmp_path / "merged", tmp_path / "adapters", tiny.size, **parts)
    lost = merge(tmp_path / "adapters", tmp_path / "other")
    assert lost.exit_code == 1 and "pass painter=... and thinker=..." in lost.output
    assert not (tmp_path / "other").exists()
    model.save_adapters(tmp_path / "adapters")  # as a trainer does: now they say what they were trained on
    assert merged(tmp_path / "adapters", tmp_path / "other").endswith(told.partition(": ")[2].partition(" ")[2])
    assert_merged(tmp_path / "other", tmp_path / "adapters", tiny.size, **parts)


@pytest.mark.parametrize("kind", ["z_image", "cosmos3"])
def test_a_pipeline_whose_thinker_is_inside_its_painter(kind, tmp_path):
    """The text encoder thinks, or both are towers of one network: each weight is merged once."""
    if kind == "cosmos3":
        model, size = tiny_cosmos3(diffusers.Cosmos3OmniPipeline), (32, 32)
    else:
        tiny = FAMILIES[kind]()
        model, size = (
            PipelineForUnifiedGeneration.from_pretrained(painter=tiny.pipeline, dtype=torch.float32),
            tiny.size,
        )
    model.save_pretrained(tmp_path / "base")
    adapt(load_unified_model(str(tmp_path / "base"), dtype=torch.float32), tmp_path / "adapters")
    merged(tmp_path / "adapters", tmp_path / "merged", "--base", tmp_path / "base")
    assert_merged(tmp_path / "merged", tmp_path / "adapters", size, base=str(tmp_path / "base"))


# What is refused


def refused(*arguments):
    result = merge(*arguments)
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert result.output.startswith("trl-unigrpo merge: ")
    return result.output


@pytest.fixture
def adapters(bagel, tmp_path):
    adapt(load_unified_model(str(bagel)), tmp_path / "adapters")
    return tmp_path / "adapters"


def test_nothing_is_overwritten(adapters, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert f"{str(tmp_path / 'full')!r} is not empty" in refused(adapters, tmp_path / "full")
    assert f"{str(tmp_path / 'full' / 'notes.txt')!r} is not empty" in refused(
        adapters, tmp_path / "full" / "notes.txt"
    )
    assert [file.read_text() for file in (tmp_path / "full").iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    merged(adapters, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_folders_without_adapters_or_base(adapters, bagel, tmp_path):
    assert "holds no adapters (adapter_config.json is missing)" in refused(bagel, tmp_path / "out")
    assert "dtype='int8': expected auto, float32" in refused(adapters, tmp_path / "out", "--dtype", "int8")
    config = json.loads((adapters / "adapter_config.json").read_text())
    (adapters / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert "do not say what they were trained on: pass base=" in refused(adapters, tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapters", "base"]  # no half of a folder is left


def test_a_quantised_base(adapters, tmp_path):
    tiny_bagel(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "plain")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantised = BagelForUnifiedGeneration.from_pretrained(tmp_path / "plain", quantization_config=config)
    assert any(isinstance(module, Linear4bit) for module in quantised.modules())
    quantised.save_pretrained(tmp_path / "quantised")
    told = refused(adapters, tmp_path / "out", "--base", tmp_path / "quantised")
    assert f"{str(tmp_path / 'quantised')!r} is quantised (" in told and "is stored as U8" in told
    assert "Pass the unquantised model that it was made from as base" in told


def test_broken_adapters(adapters, tmp_path):
    weights = load_file(adapters / "adapter_model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: torch.full_like(weights[name], torch.nan)}, adapters / "adapter_model.safetensors")
    assert "NaN" in refused(adapters, tmp_path / "out")
