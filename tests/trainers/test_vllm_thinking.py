"""Thinkings sampled by an engine beside the trainer: what it is sent, what comes back, and what is done with it."""

import copy
import warnings

import bitsandbytes
import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from tests.helpers import vllm_engine
from tests.helpers.tiny_cosmos3 import tiny_cosmos3
from tests.helpers.tiny_pipelines import saved_halves
from tests.helpers.tiny_pipelines import tokenizer as bytes_tokenizer
from tests.helpers.tiny_unified import prompts_dataset, tiny_bagel, tiny_config, tiny_tokenizer, weights
from tests.helpers.toy_painter import toy_painter
from trl_unigrpo.models.adapters import merge_found_adapters
from trl_unigrpo.models.bagel import BagelForUnifiedGeneration
from trl_unigrpo.models.pipeline import PipelineForUnifiedGeneration
from trl_unigrpo.models.registry import unified_model
from trl_unigrpo.models.tokenizer import never_sampled
from trl_unigrpo.trainers.vllm_thinking import check_served


LORA = LoraConfig(r=2, init_lora_weights=False)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Of each kind: how the model is loaded, its tokenizer, and the folder of what thinks."""
    folder = tmp_path_factory.mktemp("models")
    halves = saved_halves(folder)
    load = PipelineForUnifiedGeneration.from_pretrained
    load(**halves, dtype=torch.float32).save_pretrained(folder / "whole")
    bagel, thinker = folder / "bagel", folder / "whole" / "thinker"
    tiny_bagel().save_pretrained(bagel)
    return {
        "pipeline": (lambda: load(**halves, dtype=torch.float32), bytes_tokenizer, halves["thinker"]),
        "saved pipeline": (lambda: load(folder / "whole", dtype=torch.float32), bytes_tokenizer, str(thinker)),
        "bagel": (lambda: BagelForUnifiedGeneration.from_pretrained(bagel), tiny_tokenizer, str(bagel)),
    }


@pytest.fixture
def with_engine(make_trainer, kinds, monkeypatch):
    """Function that builds a trainer over a kind of model, and the engine that thinks for it: two groups of two."""

    def make(kind, mode="colocate", **changes):
        load, tokenizer, folder = kinds[kind]
        engines = vllm_engine.install(monkeypatch, folder)
        sizes = {"num_generations": 2, "gradient_accumulation_steps": 1, "num_inference_steps": 3, "num_iterations": 1}
        settings = {"processing_class": tokenizer(), "max_completion_length": 4, **sizes, **changes}
        trainer = make_trainer(
            model=load(), use_vllm=True, vllm_mode=mode, sde_window_range=(0, 2), sde_window_size=1, **settings
        )
        (engine,) = engines
        return trainer, engine

    return make


def thinking_part(model):
    """Names and weights of what thinks, with adapters merged for good."""
    model = copy.deepcopy(unified_model(model))
    with warnings.catch_warnings(action="ignore"):
        merge_found_adapters(model)
    return {n: p.detach() for n, p in model.served_thinker().named_parameters() if not model.is_image_parameter(n)}


def noted_weights(trainer):
    """The part that thinks, at each time that the engine is to be sent it."""
    noted, sync = [], trainer.vllm_generation.sync_weights

    def spied():
        noted.append(thinking_part(trainer.model))
        sync()

    trainer.vllm_generation.sync_weights = spied
    return noted


@pytest.mark.parametrize(
    ("kind", "mode", "peft"),
    [
        ("pipeline", "colocate", LORA),
        ("saved pipeline", "server", None),
        ("bagel", "server", LORA),
        ("bagel", "colocate", None),
    ],
)
def test_two_steps(with_engine, kinds, train, kind, mode, peft):
    trainer, engine = with_engine(
        kind, mode, peft_config=peft, temperature=0.9, vllm_importance_sampling_mode="token_truncate"
    )
    assert engine.source == kinds[kind][2]
    expected, before = noted_weights(trainer), weights(trainer.model)
    seen = train(trainer)
    for name, parameter in trainer.model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, before[name])  # merging leaves no trace

    # What was sent: once before each generation, all that thinks and nothing else, as it was then.
    *syncs, nothing = engine.syncs
    assert (len(syncs), nothing) == (2, {})
    for sent, own in zip(syncs, expected, strict=True):
        assert list(sent) == list(own) and all(torch.equal(sent[name], own[name]) for name in own)
    trained = {name for name in syncs[0] if not torch.equal(syncs[0][name], syncs[1][name])}
    assert trained == {name for name in syncs[0] if not peft or "_proj.weight" in name}

    # What was asked for.
    banned = never_sampled(trainer.unified, trainer._tokenizer, trainer.eos_token_ids)
    assert len(engine.asked) == 2
    for prompts, params in engine.asked:
        assert params.logit_bias == dict.fromkeys(banned, -100.0)
        assert (params.temperature, params.max_tokens, params.stop_token_ids) == (0.9, 4, trainer.eos_token_ids)
        assert (len(prompts), params.n) == ((4, 1) if mode == "colocate" else (2, 2))
    assert not {token for one in engine.sampled for token in one.token_ids} & {*banned}

    # What came back: its tokens, and their log-probs beside the trainer's own, which know nothing of bans.
    completions = {tuple(one.token_ids): one for one in engine.sampled}
    assert len(seen.batches) == 2
    for batch in seen.batches:
        masks = batch["completion_mask"].bool()
        for ids, mask, ratio, trajectory in zip(
            batch["completion_ids"], masks, batch["importance_sampling_ratio"], batch["trajectories"], strict=True
        ):
            one = completions[tuple(ids[mask].tolist())]
            assert trajectory.rounds[0].text_ids == one.token_ids  # what is painted from
            whole, processed = torch.tensor([one.whole, one.processed])
            assert (whole < processed).all()
            assert len(ratio) == len(mask)
            torch.testing.assert_close(ratio[mask], (whole - processed).exp(), rtol=2e-4, atol=0)


def test_averages_are_evaluated_with_their_own_thinkings(with_engine):
    evaluation = {"eval_dataset": prompts_dataset(copies=1), "eval_strategy": "steps", "eval_steps": 1}
    trainer, engine = with_engine("bagel", ema_decay=0.9, max_steps=2, **evaluation)
    noted = noted_weights(trainer)
    trainer.train()
    *syncs, _ = engine.syncs
    first, averaged, second, _ = syncs
    assert all(torch.equal(sent[name], own[name]) for sent, own in zip(syncs, noted, strict=True) for name in own)
    name = "language_model.lm_head.weight"
    moved, average = second[name] - first[name], averaged[name] - first[name]
    assert moved.any() and torch.allclose(average, (1 - 2 / 11) * moved, atol=1e-6)  # decay (1 + 1) / (10 + 1)


def test_an_evaluation_within_a_step_has_the_averages_too(with_engine):
    class Evaluates(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                trainer.evaluate(prompts_dataset(copies=1))

    settings = {"ema_decay": 0.9, "max_steps": 2, "gradient_accumulation_steps": 2}
    trainer, engine = with_engine("bagel", callbacks=[Evaluates()], **settings)
    trainer.train()
    _, trained, averaged, _ = engine.syncs
    assert not torch.equal(*(sent["language_model.lm_head.weight"] for sent in (trained, averaged)))


def test_adapters_are_merged_in_their_own_precision(with_engine):
    """Under autocast their product would be one of bfloat16."""
    trainer, engine = with_engine("bagel", peft_config=LORA, bf16=True, max_steps=1)
    expected = thinking_part(trainer.model)
    trainer.train()
    assert all(torch.equal(engine.syncs[0][name], weight) for name, weight in expected.items())


def test_groups_of_fewer_thinkings_than_images(with_engine):
    trainer, engine = with_engine("bagel", "server", num_generations=4, images_per_thinking=2, max_steps=1)
    trainer.train()
    ((prompts, params),) = engine.asked
    assert (len(prompts), params.n) == (1, 2)


def test_a_users_bans_and_ends_are_kept(with_engine):
    given = {"suppress_tokens": [7], "stop_token_ids": [9], "min_p": 0.0}
    trainer, engine = with_engine("bagel", generation_kwargs=given, max_steps=1)
    trainer.train()
    ((_, params),) = engine.asked
    assert params.logit_bias[7] == params.logit_bias[trainer._tokenizer.pad_token_id] == -100.0
    assert params.stop_token_ids == [9]
    assert trainer.args.generation_kwargs == given


def test_the_engine_is_the_thinkers_whatever_else_the_model_has(with_engine, kinds):
    load, *others = kinds["saved pipeline"]

    def with_rounded_part():
        model = load()
        model.frozen["vae"].rounded = bitsandbytes.nn.Linear4bit(2, 2)
        return model

    kinds["rounded"] = (with_rounded_part, *others)
    _, engine = with_engine("rounded")
    assert (engine.source, engine.arguments["quantization"]) == (others[1], None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_rounds": 2}, "use_vllm=True with num_rounds=2 does not work: later rounds .* images"),
        ({"eval_num_rounds": 2}, "use_vllm=True with eval_num_rounds=2 does not work: later rounds"),
        ({"thinking": False, "text_weight": 0.0}, "use_vllm=True with thinking=False does not work: there is no"),
        ({"vllm_structured_outputs_regex": "a+"}, "vllm_structured_outputs_regex='a\\+' does not work: log-probs"),
        ({"generation_kwargs": {"frequency_penalty": 0.5}}, "frequency_penalty=0.5 does not work"),
        ({"generation_kwargs": {"logit_bias": {3: 1.0}}}, "logit_bias=.* does not work"),
        ({"generation_kwargs": {"n": 2}}, "n=2 does not work.*set by `num_generations`"),
    ],
)
def test_settings_that_vllm_cannot_have(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, use_vllm=True, **changes)


def test_models_that_vllm_cannot_think_for(monkeypatch, tmp_path):
    with pytest.raises(ImportError, match=r"vLLM is not installed. pip install 'trl\[vllm\]'"):
        check_served(tiny_bagel(), shows_images=False, mode="server")
    vllm_engine.install(monkeypatch, tmp_path)
    check_served(tiny_bagel(), shows_images=False, mode="server")
    with pytest.raises(ValueError, match="BagelForUnifiedGeneration sees them while it thinks"):
        check_served(tiny_bagel(), shows_images=True, mode="server")
    with pytest.raises(ValueError, match=r"ToyPainter does not say which part .* override `served_thinker`"):
        check_served(toy_painter(30), shows_images=False, mode="server")
    with pytest.raises(ValueError, match="shares its weights with the painter"):
        check_served(tiny_cosmos3(), shows_images=False, mode="server")
    with pytest.raises(ValueError, match="'colocate': vLLM loads what thinks from a folder"):
        check_served(tiny_bagel(), shows_images=False, mode="colocate")
    rounded = tiny_bagel()
    head = rounded.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().to(torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"quantised weights \('language_model.lm_head.weight' and others\)"):
        check_served(rounded, shows_images=False, mode="server")


def test_vllm_is_missed_before_the_model_is_tried_out(make_trainer, monkeypatch):
    model = tiny_bagel()
    monkeypatch.setattr(model, "try_out", None)
    with pytest.raises(ImportError, match="use_vllm=True: vLLM is not installed"):
        make_trainer(model=model, use_vllm=True)
