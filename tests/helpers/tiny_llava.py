"""A random LLaVA with a vocabulary of a few words, built in memory."""

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


IMAGE_SIZE, PATCH = 32, 8
WORDS = ["<unk>", "<pad>", "<s>", "</s>", "<image>", "Yes", "yes", "▁yes", "NO", "no", "maybe", "user", "system"]
WORDS += ["assistant", ":", "is", "there", "a", "red", "blue", "cat", "dog", "the", "picture", "?", '"', "answer"]
TEMPLATE = (
    "<s>{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


MERGED = [":a", ":the", ":dog"]


def tiny_llava(seed=0, dtype=torch.float64, merges=False):
    """The model and its processor; with `merges`, one that joins an answer's first word to the colon before."""
    torch.manual_seed(seed)
    words = [*WORDS, *MERGED] if merges else WORDS
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    text = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlavaConfig(
        vision_config={**vision, "num_attention_heads": 2, "image_size": IMAGE_SIZE, "patch_size": PATCH},
        text_config={**text, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(words)},
        image_token_index=WORDS.index("<image>"),
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config).to(dtype).eval()
    for weight in model.parameters():  # far from uniform, and far from blind to the image
        torch.nn.init.normal_(weight, std=0.3) if weight.ndim > 1 else None
    tokens = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    splits = [pre_tokenizers.WhitespaceSplit(), *([] if merges else [pre_tokenizers.Punctuation()])]
    tokens.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace(" : {%", " :{%") if merges else TEMPLATE,
    )
    return model, processor
