"""Parts of TRL that are used: each change to it ends in an error that says so, before or at the first use."""

import ast
import copy
import importlib.util
import inspect
import re
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
import trl
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

import trl_unigrpo
from tests.helpers.tiny_unified import images_of, tiny_bagel, weights
from trl_unigrpo.trainers import setup, trl_bridge, trl_versions
from trl_unigrpo.trainers.trl_bridge import (
    ATTRIBUTES,
    ENGINE_HOOKS,
    HOOKS,
    OF_SAMPLING,
    TRLChangedError,
    VLLMGeneration,
    check_attributes,
    check_trl,
    compute_head_in_float32,
    generation_fields,
)
from trl_unigrpo.trainers.trl_versions import OPTIONS, RANGE, TESTED, note_untested
from trl_unigrpo.trainers.unigrpo_config import UniGRPOConfig
from trl_unigrpo.trainers.unigrpo_trainer import UniGRPOTrainer
from trl_unigrpo.trainers.vllm_thinking import ThinkingEngine


PACKAGE = Path(trl_unigrpo.__file__).parent
ROOT = PACKAGE.parent
REMEDY = re.escape(f"tested with TRL {', '.join(TESTED)}") + ".*" + re.escape(f"pip install 'trl=={TESTED[-1]}'")


def fresh(name, source=None):
    """A second copy of a module, which imports what is there now, or a module of other source in its place."""
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    code = source or Path(spec.origin).read_text(encoding="utf-8")
    exec(compile(code, spec.origin, "exec"), vars(module))
    return module


def config_without(monkeypatch, option):
    """UniGRPOConfig on top of TRL's GRPOConfig as it would be without an option, and without what reads it there."""
    tree = ast.parse(inspect.getsource(inspect.getmodule(GRPOConfig)))
    (of_config,) = [node for node in tree.body if getattr(node, "name", "") == "GRPOConfig"]
    of_config.body = [node for node in of_config.body if getattr(getattr(node, "target", None), "id", "") != option]
    (last,) = [node for node in of_config.body if getattr(node, "name", "") == "__post_init__"]
    last.body = [node for node in last.body if f"self.{option}" not in ast.unparse(node)]
    without = fresh(GRPOConfig.__module__, ast.unparse(tree)).GRPOConfig
    without.__dataclass_fields__.pop(option, None)  # of transformers' TrainingArguments
    for place in (trl, trl_versions):
        monkeypatch.setattr(place, "GRPOConfig", without)
    return fresh("trl_unigrpo.trainers.unigrpo_config").UniGRPOConfig


def private_imports(file):
    """(module, name) of what a file imports from TRL that isn't its public API."""
    return [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trl.") and node.module != "trl.rewards"
        for alias in node.names
    ]


BRIDGE = Path(trl_bridge.__file__)


def test_installed_trl_is_the_one_expected():
    check_trl()


def test_every_override_of_a_private_method_is_a_checked_hook():
    overridden = {
        name
        for name, member in vars(UniGRPOTrainer).items()
        if inspect.isfunction(member)
        and hasattr(GRPOTrainer, name)
        and name not in ("__init__", "create_model_card", "evaluate")
    }
    assert overridden <= set(HOOKS)


def test_releases_are_named_in_one_place():
    """TESTED and RANGE are the data; what is written elsewhere has to agree with them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (required,) = [of for of in map(Requirement, project["dependencies"]) if of.name == "trl"]
    assert required.specifier == SpecifierSet(RANGE)
    pins = (ROOT / "constraints-dev.txt").read_text(encoding="utf-8")
    assert set(re.findall(r"^trl==(.*)$", pins, re.MULTILINE)) <= set(TESTED)
    assert all(Version(release) in required.specifier for release in TESTED)
    assert f"`trl{RANGE}`, tested with {', '.join(TESTED)}" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("release", ["1.15.2", "2.0.0.dev0", "2.1.0"])
def test_release_out_of_range(make_trainer, monkeypatch, tmp_path, release):
    args = UniGRPOConfig(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.setattr(trl, "__version__", release)
    with pytest.raises(TRLChangedError, match=rf"^TRL {release} .* expected trl>=.*{REMEDY}"):
        UniGRPOConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TRLChangedError, match=rf"^TRL {release} .* expected trl>="):
        UniGRPOTrainer("no-model", [], args)


@pytest.mark.parametrize("release", ["1.16.7", "1.17.0.dev0", "1.99.0"])
def test_release_that_was_not_tested_works_and_is_logged_once(make_trainer, monkeypatch, caplog, release):
    note_untested.cache_clear()
    monkeypatch.setattr(trl, "__version__", release)
    with warnings.catch_warnings(action="error", category=UserWarning):
        check_trl()
    make_trainer()
    assert [of.getMessage() for of in caplog.records if of.name.startswith("trl_unigrpo")] == [
        f"TRL {release} was not tested with trl-unigrpo ({TESTED[-1]} was), but has what it uses."
    ]


def test_private_names_of_trl_are_imported_in_the_bridge_alone():
    assert private_imports(BRIDGE)
    assert [f"{file.name}: {private_imports(file)}" for file in PACKAGE.rglob("*.py") if private_imports(file)] == [
        f"{BRIDGE.name}: {private_imports(BRIDGE)}"
    ]


@pytest.mark.parametrize(("module", "name"), private_imports(BRIDGE))
def test_import_that_is_gone(monkeypatch, module, name):
    monkeypatch.delattr(importlib.import_module(module), name)
    with pytest.raises(TRLChangedError, match=f"cannot import name '{name}' from '{module}'.*{REMEDY}"):
        fresh(trl_bridge.__name__)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TRLChangedError, match=f"import of {module} .*{REMEDY}"):
        fresh(trl_bridge.__name__)


def test_import_that_trl_itself_misses_stays_what_it_is(monkeypatch):
    monkeypatch.delitem(sys.modules, "trl.extras.profiling")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match="import of transformers"):
        fresh(trl_bridge.__name__)


def test_options_that_are_set_or_read_are_checked():
    of_trl = set(GRPOConfig.__dataclass_fields__)
    assert set(UniGRPOConfig.__annotations__) & of_trl <= set(OPTIONS)
    read = {
        node.attr
        for file in (PACKAGE / "trainers").glob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("args", "self.args")
    }
    assert read & set(GRPOConfig.__annotations__) <= set(OPTIONS)


@pytest.mark.parametrize("option", OPTIONS)
def test_option_that_is_gone(monkeypatch, tmp_path, option):
    config = config_without(monkeypatch, option)
    with pytest.raises(TRLChangedError, match=f"GRPOConfig has no option {option}.*{REMEDY}"):
        config(output_dir=str(tmp_path))


@pytest.mark.parametrize(
    "option", ["use_transformers_paged", "use_transformers_continuous_batching", "off_policy_mask_threshold"]
)
def test_refused_option_that_is_gone_needs_no_refusal(monkeypatch, tmp_path, option):
    config = config_without(monkeypatch, option)
    assert not hasattr(config(output_dir=str(tmp_path), use_cpu=True), option)
    with pytest.raises(ValueError, match="sync_ref_model=True does not work"):  # the others are refused as ever
        config(output_dir=str(tmp_path), use_cpu=True, sync_ref_model=True)


@pytest.mark.parametrize("name", HOOKS)
def test_hook_that_is_gone(make_trainer, monkeypatch, name):
    for owner in GRPOTrainer.__mro__:
        if name in vars(owner):
            monkeypatch.delattr(owner, name)
    with pytest.raises(TRLChangedError, match=f"GRPOTrainer.{name} is gone") as caught:
        make_trainer()
    assert re.search(REMEDY, str(caught.value))


@pytest.mark.parametrize("name", HOOKS)
def test_hook_with_other_parameters(make_trainer, monkeypatch, name):
    monkeypatch.setattr(GRPOTrainer, name, lambda self, something_else: None)
    if HOOKS[name] == ("self",):
        monkeypatch.setattr(GRPOTrainer, name, lambda trainer: None)
    with pytest.raises(TRLChangedError, match=rf"GRPOTrainer.{name} takes .*, expected \('self'"):
        make_trainer()


def test_loss_that_trl_would_scale_again(make_trainer, monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "loss_is_scaled_for_ga", False)
    with pytest.raises(TRLChangedError, match="loss_is_scaled_for_ga"):
        make_trainer()
    monkeypatch.delattr(GRPOTrainer, "loss_is_scaled_for_ga")
    with pytest.raises(TRLChangedError, match="loss_is_scaled_for_ga"):
        make_trainer()


@pytest.mark.parametrize(
    "outputs",
    [
        ([[1]], [[2]], None, ["a"]),
        ([[1]], [[2]], {}, {}),
        ([[1]], [[2], [3]], {}),
        (torch.ones(1, 1), [[2]], {}),
        ({}, [[1]], [[2]]),
        (["text"], [[2]], {}),
    ],
    ids=["no-dict", "two-dicts", "lengths", "tensors", "other-order", "texts"],
)
def test_other_outputs_of_generate(make_trainer, monkeypatch, outputs):
    with pytest.raises(TRLChangedError, match=r"GRPOTrainer\._generate no longer returns"):
        generation_fields(outputs)
    trainer = make_trainer()
    monkeypatch.setattr(GRPOTrainer, "_generate", lambda self, prompts: outputs)
    with pytest.raises(TRLChangedError, match=r"GRPOTrainer\._generate no longer returns"):
        trainer.train()


def test_loss_that_does_not_ask_for_log_probs_through_the_hook(make_trainer, monkeypatch):
    def other_loss(self, model, inputs):
        return sum(parameter.sum() for parameter in model.parameters() if parameter.requires_grad) * 0.0

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", other_loss)
    trainer = make_trainer()
    before = weights(trainer.model)
    with pytest.raises(TRLChangedError, match="did not call _get_per_token_logps_and_entropies"):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in weights(trainer.model).items())


def test_extra_fields_that_no_longer_reach_the_rewards(make_trainer, monkeypatch):
    trainer = make_trainer()
    own = UniGRPOTrainer._generate

    def lost(self, prompts):
        return tuple({} if isinstance(value, dict) else value for value in own(self, prompts))

    monkeypatch.setattr(UniGRPOTrainer, "_generate", lost)
    with pytest.raises(TRLChangedError, match="extra fields .* do not reach the rewards"):
        trainer.train()


def test_attributes_that_are_used_are_checked():
    source = inspect.getsource(GRPOTrainer.__init__)
    of_trl = set(re.findall(r"self\.(\w+)(?:: [^=\n]+)? = ", source))
    used = {
        node.attr
        for file in (PACKAGE / "trainers").glob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "trainer")
    }
    of_sampling = {name for names in OF_SAMPLING.values() for name in names}
    assert {"_step", "reward_weights"} | of_sampling <= used & of_trl <= set(ATTRIBUTES) | of_sampling


def test_attributes_of_the_engine_are_checked(make_trainer):
    trainer = make_trainer()
    trainer.args.use_vllm = True  # but the trainer has none
    with pytest.raises(TRLChangedError, match="GRPOTrainer has no attribute vllm_generation"):
        check_attributes(trainer)


@pytest.mark.parametrize("name", ENGINE_HOOKS)
def test_hook_of_the_engine_that_is_gone_or_another(monkeypatch, name):
    monkeypatch.setattr(VLLMGeneration, name, lambda something_else: None)
    with pytest.raises(TRLChangedError, match=rf"VLLMGeneration.{name} takes .*, expected \('self'"):
        check_trl()
    monkeypatch.delattr(VLLMGeneration, name)
    with pytest.raises(TRLChangedError, match=rf"VLLMGeneration.{name} is gone.*{REMEDY}"):
        check_trl()


def test_every_override_of_the_engine_is_a_checked_hook():
    own = {name for name, member in vars(ThinkingEngine).items() if inspect.isfunction(member)}
    assert {"_init_vllm", "_iter_named_params"} == own & {*vars(VLLMGeneration)} <= {*ENGINE_HOOKS}


def test_trainer_that_thinks_by_another_engine(monkeypatch):
    monkeypatch.delattr(inspect.getmodule(GRPOTrainer), "VLLMGeneration")
    with pytest.raises(TRLChangedError, match="GRPOTrainer does not think by VLLMGeneration"):
        check_trl()


@pytest.mark.parametrize("name", [*ATTRIBUTES, *OF_SAMPLING[False]])
def test_attribute_that_is_gone(make_trainer, monkeypatch, name):
    initialise = GRPOTrainer.__init__

    def other(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        if ATTRIBUTES.get(name):
            getattr(self, name).pop(ATTRIBUTES[name][-1])
        else:
            delattr(self, name)

    monkeypatch.setattr(GRPOTrainer, "__init__", other)
    with pytest.raises(TRLChangedError, match=rf"GRPOTrainer\.{name} has no key|GRPOTrainer has no attribute {name}"):
        make_trainer()


@pytest.mark.parametrize("tied", [False, True])
def test_language_head_in_float32(tied):
    model = tiny_bagel().to(torch.bfloat16)
    if tied:
        model.set_output_embeddings(torch.nn.Linear(32, model.get_input_embeddings().num_embeddings, bias=False))
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    copied = copy.deepcopy(model)
    compute_head_in_float32(model, temperature=0.7)
    ids = torch.tensor([[1, 8, 9, 10, 2]])
    hidden = copied.backbone(ids).last_hidden_state
    assert hidden.dtype == model.get_input_embeddings()(ids).dtype == torch.bfloat16
    logits = hidden.float() @ copied.get_output_embeddings().weight.float().T
    expected = (logits[:, :-1] / 0.7).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs, expected)
        torch.testing.assert_close(model(ids).logits, logits)
    again = copy.deepcopy(model)
    again.get_output_embeddings().weight.data.zero_()
    assert not again.get_output_embeddings()(hidden).any()


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2)], ids=["full", "lora"])
def test_option_for_the_language_head_in_float32(make_trainer, monkeypatch, peft_config):
    temperatures, compute = [], setup.compute_head_in_float32
    monkeypatch.setattr(setup, "compute_head_in_float32", lambda base, t: temperatures.append(t) or compute(base, t))
    args = {"cast_lm_head_to_fp32": True, "temperature": 0.7, "max_steps": 1}
    trainer = make_trainer(peft_config=peft_config, bf16=True, **args)
    assert trainer.args.cast_lm_head_to_fp32 and temperatures == [0.7]
    trainer.train()
    make_trainer(temperature=0.7)
    assert temperatures == [0.7]


def test_images_are_kept_as_long_as_the_other_logs(make_trainer):
    trainer = make_trainer()
    assert trainer._logs["images"].maxlen == trainer._logs["prompt"].maxlen == trainer._progress.images.maxlen == 8


def test_rows_of_a_batch_are_kept_together_by_trls_shuffle(make_trainer, train):
    # Trajectories are a list beside TRL's tensors: after the shuffle each still belongs to its row.
    seen = train(make_trainer(max_steps=1))
    for batch in seen.batches:
        for row, image in enumerate(images_of([batch])):
            prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
            thinking = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
            context = image.context.ids.tolist()
            assert context[: len(prompt) + len(thinking)] == prompt + thinking
            assert context[-1] == 2
