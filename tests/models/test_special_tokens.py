"""Tokens that are no text: never sampled, and refused in prompts at every way in."""

import pytest
from datasets import Dataset
from PIL import Image
from transformers import AddedToken

from tests.helpers.tiny_painters import tiny_model
from tests.helpers.tiny_pipelines import qwen25_vl, tokenizer
from tests.helpers.tiny_unified import build_trainer, prompts_dataset, redness, tiny_bagel, tiny_tokenizer
from trl_unigrpo.models.tokenizer import check_messages, never_sampled
from trl_unigrpo.sampling import generate
from trl_unigrpo.trainers.refl_trainer import ReFLConfig, ReFLTrainer
from trl_unigrpo.trainers.sft_trainer import UnifiedSFTConfig, UnifiedSFTTrainer


def test_special_tokens_are_never_sampled_but_those_of_an_answer():
    words = tokenizer()
    words.add_tokens([AddedToken("<tool_call>", special=False)])
    words.add_tokens(["<|image_pad|>", "<|message|>", "</think>"], special_tokens=True)
    words.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' %}<|message|>{% endif %}{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    model, end = tiny_model(), words.convert_tokens_to_ids("<|im_end|>")
    never = never_sampled(model, words, [end])
    named = {token: words.convert_tokens_to_ids(token) in never for token in words.get_added_vocab()}
    assert named["<|image_pad|>"] and named["<|im_start|>"] and named["<pad>"] and named["<bos>"]
    for allowed in ("<|im_end|>", "<|message|>", "<tool_call>", "</think>", "<unk>"):
        assert not named[allowed], allowed


def test_what_stands_for_images_is_never_sampled_though_it_is_no_special_token():
    """As the thinker's own settings name it."""
    model = tiny_model()
    model.thinker.config.image_token_id, model.thinker.config.vision_start_token_id = 77, 78
    model.thinker.config.video_token_id = None
    assert {77, 78} <= set(never_sampled(model, tokenizer(), [5]))
    assert qwen25_vl().config.image_token_id == 3  # where a thinker that reads images has it
    bagel = tiny_bagel()
    bagel.config.image_token_id = 9
    assert 9 in never_sampled(bagel, tiny_tokenizer(), [2])


BAD = "a sign that says <|vision_start|>"
CONVERSATION = [{"role": "user", "content": [{"type": "text", "text": BAD}]}]


@pytest.mark.parametrize("prompt", [BAD, CONVERSATION])
def test_a_prompt_with_the_text_of_a_special_token(prompt, tmp_path):
    told = r"'<\|vision_start\|>', which is no text to the model"
    with pytest.raises(ValueError, match="A prompt holds " + told):
        generate(tiny_bagel(), ["red", prompt], tiny_tokenizer(), image_size=16)
    fine = "red" if isinstance(prompt, str) else [{"role": "user", "content": [{"type": "text", "text": "red"}]}]
    dataset = Dataset.from_dict({"prompt": [fine, prompt]})
    with pytest.raises(ValueError, match="Row 1 of train_dataset holds " + told):
        build_trainer(tmp_path, train_dataset=dataset)
    with pytest.raises(ValueError, match=r"Row 1 of eval_dataset\['easy'\] holds " + told):
        build_trainer(tmp_path, train_dataset=prompts_dataset(), eval_dataset={"easy": dataset})
    with pytest.raises(ValueError, match="Row 1 of train_dataset holds " + told):
        ReFLTrainer(
            tiny_bagel(),
            redness,
            args=ReFLConfig(str(tmp_path), use_cpu=True, report_to="none", image_size=16),
            train_dataset=dataset,
            processing_class=tiny_tokenizer(),
        )


def test_streamed_prompts_are_checked_as_they_come(tmp_path):
    dataset = Dataset.from_dict({"prompt": [BAD] * 4}).to_iterable_dataset()
    trainer = build_trainer(tmp_path, train_dataset=dataset)
    with pytest.raises(ValueError, match="A prompt holds"):
        trainer.train()


def test_a_completion_with_the_text_of_a_special_token(tmp_path):
    rows = [{"prompt": "red", "completion": BAD, "image": Image.new("RGB", (16, 16))}]
    with pytest.raises(ValueError, match="Row 0 of train_dataset holds"):
        UnifiedSFTTrainer(
            tiny_bagel(),
            args=UnifiedSFTConfig(str(tmp_path), use_cpu=True, report_to="none"),
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny_tokenizer(),
        )


def test_texts_that_only_look_like_tokens_are_texts():
    words = tiny_tokenizer()
    texts = ["a < b |> c", "<|vision|>", "<think>red</think>", ""]
    assert check_messages(texts, words) == texts
