"""A model that also reads images is trained as one that does not: its tower stays as it was."""

import pytest
from peft import LoraConfig
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.helpers.tiny_unified import bagel_with_tower, moved, tiny_tokenizer, weights
from trl_unigrpo.models.bagel.vision import UNDERSTANDING_MODULES


def is_tower(name: str) -> bool:
    return any(f"{module}." in name for module in UNDERSTANDING_MODULES)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("by_folder", [False, True])
def test_tower_is_not_trained(make_trainer, tmp_path, adapters, by_folder):
    model = bagel_with_tower()
    if by_folder:
        model.save_pretrained(tmp_path / "model")
        model = str(tmp_path / "model")
    peft_config = LoraConfig(r=2, init_lora_weights=False) if adapters else None
    trainer = make_trainer(model=model, peft_config=peft_config, weight_decay=0.1)
    before = weights(trainer.model)
    trainer.train()
    assert moved(before, weights(trainer.model)) == {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    tower = {name for name in before if is_tower(name)}
    assert len(tower) == 3 + 16 + 2 + 4
    assert not any(trainer.model.get_parameter(name).requires_grad for name in tower)
    in_optimizer = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not in_optimizer & {trainer.model.get_parameter(name) for name in tower}


def test_tokenizer_of_another_model_is_refused(make_trainer):
    words = tiny_tokenizer().backend_tokenizer.to_str().replace("<|im_start|>", "<|begin|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(words), pad_token="<|endoftext|>")
    with pytest.raises(ValueError, match=r"has <\|im_start\|> at None, the model at 1.*Take both from the same"):
        make_trainer(processing_class=tokenizer)
