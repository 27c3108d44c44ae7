"""The contract's test kit: our own models keep its promises, and a model that breaks one is found out."""

import copy
import inspect

import diffusers
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import PreTrainedModel

from tests.helpers.broken_toys import BROKEN, ReadsBack
from tests.helpers.models_page import toy_module
from tests.helpers.tiny_cosmos3 import tiny_cosmos3
from tests.helpers.tiny_pipelines import FAMILIES, qwen3, tokenizer
from tests.helpers.tiny_unified import bagel_with_tower, moved, tiny_bagel, tiny_tokenizer, weights
from trl_unigrpo import (
    ReFLConfig,
    ReFLTrainer,
    UnifiedModelMixin,
    UnifiedSFTConfig,
    UnifiedSFTTrainer,
    UniGRPOConfig,
    UniGRPOTrainer,
)
from trl_unigrpo.models.contract import REQUIRED_METHODS
from trl_unigrpo.models.pipeline import PipelineForUnifiedGeneration, PipelineUnifiedConfig
from trl_unigrpo.testing import CHECKS, ContractError, contract_case, contract_tests


TOY = toy_module()
NAMES = [check.__name__ for check in CHECKS]
BAGEL = {
    "prompts": ["a red cat", "a big green dog runs"],
    "thinkings": ["the cat sits on the mat", "a tree"],
    "impossible_size": (10, 8),
}
SIZE = (8, 8)


# Our own models


def test_the_toy_model_keeps_every_promise():
    assert contract_tests(TOY.toy(), TOY.tokenizer, SIZE) == NAMES


def test_the_packed_toy_model_keeps_every_promise():
    assert contract_tests(TOY.toy(TOY.PackedToyPainter), TOY.tokenizer, SIZE) == NAMES


@pytest.mark.parametrize("packs", [True, False])
def test_bagel_keeps_every_promise(packs, monkeypatch):
    model = tiny_bagel()
    monkeypatch.setattr(type(model), "packs_velocities", packs)
    assert contract_tests(model, tiny_tokenizer(), (8, 12), **BAGEL) == NAMES


# One that packs its latents, and one that paints different prompts one after the other.
@pytest.mark.parametrize(
    ("family", "impossible"), [("flux1", (9, 8)), pytest.param("cogview4", (34, 32), marks=pytest.mark.slow)]
)
def test_pipelines_keep_every_promise(family, impossible):
    tiny = FAMILIES[family]()
    config = PipelineUnifiedConfig(painter_arguments=tiny.arguments)
    model = PipelineForUnifiedGeneration(qwen3(language_head=True), tokenizer(), tiny.pipeline, config)
    assert contract_tests(model, None, tiny.size, impossible_size=impossible) == NAMES


@pytest.mark.slow
def test_cosmos3_keeps_all_promises_but_one():
    """Its transformer runs the text anew beside each image, so that the gradient reaches the reasoning tower."""
    model = tiny_cosmos3(diffusers.Cosmos3OmniPipeline)
    # diffusers 0.42 adds float32 times to what autocast has made bfloat16; weights in bfloat16 are as they should be.
    mixed = "velocity_is_float32_under_autocast"
    passed = contract_tests(model, None, (16, 16), separates_context=False, skip=[mixed])
    assert passed == [name for name in NAMES if name != mixed]
    (check,) = [check for check in CHECKS if check.__name__ == mixed]
    with pytest.raises(RuntimeError, match="Expected self.dtype to be equal to src.dtype"):
        check(contract_case(model, None, (16, 16)))
    check(contract_case(model.to(torch.bfloat16), None, (16, 16)))
    with pytest.raises(ContractError, match="pass separates_context=False"):
        contract_tests(
            model.float(), None, (16, 16), skip=[name for name in NAMES if name != "context_grad_is_followed"]
        )


READS = "texts_are_read_back_from_their_images"


def test_models_that_read_keep_that_promise_too():
    (check,) = [check for check in CHECKS if check.__name__ == READS]
    check(contract_case(TOY.toy(ReadsBack), TOY.tokenizer, SIZE))
    model = bagel_with_tower()
    assert model.read_back([], []) == []
    check(contract_case(model, tiny_tokenizer(), (8, 12), **BAGEL))


# Models that break a promise


def test_every_check_is_seen_to_fail():
    assert set(BROKEN) == set(NAMES)


@pytest.mark.parametrize(
    ("check", "kind"),
    [(check, kind) for check, kinds in BROKEN.items() for kind in kinds],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_broken_promise_is_found(check, kind):
    asked = {"skip": [name for name in NAMES if name != check]}
    with pytest.raises(ContractError, match=rf"{kind.__name__} breaks 1 of 1 promises:\n- {check}: .*\n  Promise: "):
        contract_tests(TOY.toy(kind), TOY.tokenizer, SIZE, **asked)


def test_a_size_that_is_rounded_is_found():
    with pytest.raises(ContractError, match=r"`latent_shape` gives \(63, 3\) for \(7, 9\), which can't be painted"):
        contract_tests(TOY.toy(), TOY.tokenizer, SIZE, impossible_size=(7, 9))


def test_all_broken_promises_are_named_at_once():
    class TwoFaults(TOY.ToyPainter):
        def encode_images(self, pixels):
            return pixels

        def is_image_parameter(self, name):
            return False

    skip = ["adapters_go_to_their_expert", "context_grad_is_followed"]  # they tell experts apart, too
    with pytest.raises(ContractError) as error:
        contract_tests(TOY.toy(TwoFaults), TOY.tokenizer, SIZE, skip=skip)
    assert "TwoFaults breaks 2 of 25 promises" in str(error.value)
    assert "`encode_images` gives (2, 3, 8, 8), expected (2, 64, 3)." in str(error.value)
    assert "`is_image_parameter` gives [False] alone: one expert has no weights." in str(error.value)


def test_the_model_stays_as_it_is():
    model = TOY.toy().train()
    before, random = {name: p.clone() for name, p in model.named_parameters()}, torch.get_rng_state()
    contract_tests(model, TOY.tokenizer, SIZE)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert {name for name, p in model.named_parameters()} == set(before)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_what_can_not_be_tried():
    with pytest.raises(ValueError, match=r"skip=\['no_such'\]: there are no such checks. There are \['text_rows"):
        contract_tests(TOY.toy(), TOY.tokenizer, SIZE, skip=["no_such"])
    adapted = get_peft_model(TOY.toy(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="The model has adapters"):
        contract_tests(adapted, TOY.tokenizer, SIZE)


# Models that lack methods


class LacksTwo(TOY.ToyPainter):
    latent_shape = UnifiedModelMixin.latent_shape
    encode_images = UnifiedModelMixin.encode_images


class LacksPacked(TOY.ToyPainter):
    packs_velocities = True


# All methods of the toy on a model that writes no text.
METHODS = {name: method for name, method in vars(TOY.ToyPainter).items() if name in REQUIRED_METHODS}
LacksGenerate = type("LacksGenerate", (UnifiedModelMixin, PreTrainedModel), {"config_class": TOY.ToyConfig, **METHODS})


LACKS = [
    (LacksTwo, "LacksTwo lacks latent_shape, encode_images. A unified model must bring"),
    (LacksPacked, "LacksPacked lacks packed_forward, predict_velocities. A unified model"),
    (LacksGenerate, "LacksGenerate lacks forward, generate. A unified model"),
]


def unigrpo(model, folder):
    args = UniGRPOConfig(str(folder), image_size=8, report_to="none", use_cpu=True)
    return UniGRPOTrainer(model=model, reward_funcs=no_reward, args=args, processing_class=TOY.tokenizer, **DATA)


def sft(model, folder):
    args = UnifiedSFTConfig(str(folder), max_steps=1, learning_rate=1e-2, report_to="none", use_cpu=True)
    image = Image.new("RGB", (8, 8), "red")
    rows = [{"prompt": "a red circle", "completion": text, "image": image} for text in ("a circle", "red")]
    return UnifiedSFTTrainer(model=model, args=args, train_dataset=rows, processing_class=TOY.tokenizer)


def refl(model, folder):
    short = {"num_inference_steps": 4, "max_completion_length": 4, "max_steps": 1}
    args = ReFLConfig(str(folder), image_size=8, learning_rate=1e-2, report_to="none", use_cpu=True, **short)
    return ReFLTrainer(model=model, reward=redness_of_pixels, args=args, processing_class=TOY.tokenizer, **DATA)


def redness_of_pixels(pixels, prompts):
    return pixels[:, 0].mean((1, 2))


def no_reward(prompts, completions, images, **columns):
    return [0.0 for _ in images]


DATA = {"train_dataset": Dataset.from_dict({"prompt": ["a red circle", "a blue square"]})}


@pytest.mark.parametrize(("kind", "message"), LACKS, ids=[kind.__name__ for kind, _ in LACKS])
@pytest.mark.parametrize("door", [unigrpo, sft, refl, lambda model, folder: contract_tests(model)])
def test_missing_methods_are_named_at_the_door(tmp_path, door, kind, message):
    with pytest.raises(TypeError, match=message):
        door(TOY.toy(kind), tmp_path)


# UniGRPOTrainer trains it on the page.
@pytest.mark.parametrize(("trainer_of", "experts"), [(sft, {False, True}), (refl, {True})])
@pytest.mark.parametrize("packs", [False, True])
def test_the_toy_model_trains(tmp_path, trainer_of, experts, packs):
    model = TOY.toy(TOY.PackedToyPainter if packs else TOY.ToyPainter)
    before, signature = weights(model), inspect.signature(model.forward)
    trainer_of(model, tmp_path).train()
    assert {model.is_image_parameter(name) for name in moved(before, weights(model))} == experts
    assert inspect.signature(model.forward) == signature  # `generate` looks at it


def test_a_copy_of_a_model_in_training_computes_with_its_own_weights(tmp_path):
    model = TOY.toy()
    sft(model, tmp_path)
    clone, ids = copy.deepcopy(model), torch.tensor([[3, 4, 7]])
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert not model(ids).logits.any()
    assert clone(ids).logits.any()
