"""A model that reads its own images: with which weights, in which mode, and what does not fit."""

import functools

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.helpers.rounds import rounds_bagel
from tests.helpers.tiny_unified import tiny_bagel, tiny_tokenizer
from trl_unigrpo.rewards import ReadBackReward
from trl_unigrpo.sampling.self_reader import SelfReader, bring_readers
from trl_unigrpo.shapeworld.base import load_base
from trl_unigrpo.shapeworld.render import render_images
from trl_unigrpo.shapeworld.world import COLORS, SHAPES


def noise(*sizes):
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


IMAGES, TEXTS = noise((8, 8), (16, 8), (8, 8)), ["red cat", "blue tree red", "cat"]


def log_probs(reader, images=IMAGES, texts=TEXTS):
    return [torch.tensor(reading.log_probs) for reading in reader.read(images, texts)]


@torch.no_grad()
def test_texts_are_read_as_the_forward_sees_them():
    """Tokens behind the image and the start marker, none of the others in the batch: by the model's own logits."""
    model, tokenizer = rounds_bagel(), tiny_tokenizer()
    found = log_probs(SelfReader(model, tokenizer))
    for image, text, row in zip(IMAGES, TEXTS, found, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = torch.tensor([[model.image_placeholder, model.config.im_start_token_id, *ids]])
        hidden = model.backbone(whole, images=[model.read_images([image])]).last_hidden_state
        expected = model.get_output_embeddings()(hidden)[0, 1:-1].log_softmax(-1)[range(len(ids)), ids]
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)


def test_the_start_of_training_reads_or_the_policy():
    model, tokenizer = rounds_bagel(), tiny_tokenizer()
    model.keep_reference()
    start, policy = SelfReader(model, tokenizer), SelfReader(model, tokenizer, "policy")
    before = log_probs(start)
    assert all(map(torch.equal, before, log_probs(policy)))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    assert all(map(torch.equal, before, log_probs(start)))
    assert not any(map(torch.equal, before, log_probs(policy)))


def test_dropout_is_off_while_reading_and_on_again_after():
    model, tokenizer = rounds_bagel(), tiny_tokenizer()
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, logits: nn.functional.dropout(logits, 0.5, module.training))
    model.train()
    reader = SelfReader(model, tokenizer)
    assert all(map(torch.equal, log_probs(reader), log_probs(reader)))
    assert model.training and head.training


def test_half_as_many_where_the_memory_runs_out(monkeypatch):
    """The same log-probs, and painting keeps its own number."""
    model, tokenizer = rounds_bagel(), tiny_tokenizer()
    reader = SelfReader(model, tokenizer)
    whole, read_back, asked = log_probs(reader), model.read_back, []

    def small_memory(images, texts):
        asked.append(len(texts))
        if len(texts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return read_back(images, texts)

    monkeypatch.setattr(model, "read_back", small_memory)
    with pytest.warns(UserWarning, match="The memory ran out while images were read: from here on 1 at once"):
        torch.testing.assert_close(log_probs(reader), whole)
    assert asked == [3, 1, 1, 1]
    assert (reader.largest_image_batch, model.largest_image_batch) == (1, None)


def test_text_that_does_not_fit_the_context():
    model, tokenizer = rounds_bagel(), tiny_tokenizer()
    model.config.llm_config.max_position_embeddings = 6
    reader = SelfReader(model, tokenizer)
    first, long = reader.read(IMAGES[:2], ["red cat", "red cat red"])
    assert (first.tokens, long) == (["red", " cat"], None)
    assert reader.last_error == "A prompt of 3 tokens does not fit into the reader's context of 6."


def test_log_probs_that_are_no_numbers_have_no_score_and_a_reason():
    model, tokenizer = rounds_bagel(), tiny_tokenizer()
    with torch.no_grad():
        model.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids("tree")] = torch.nan
    reward = ReadBackReward()
    bring_readers([reward], model, tokenizer)
    assert reward(TEXTS[:1], images=IMAGES[:1]) == [None]
    assert "The model reads NaN or infinity in torch.float32" in reward.last_error


def test_model_that_can_not_read():
    with pytest.raises(ValueError, match="has no understanding tower"):
        bring_readers([ReadBackReward()], tiny_bagel(), tiny_tokenizer())


def test_rewards_with_a_reader_of_their_own_keep_it():
    class Other:
        last_error = ""

    own, itself = ReadBackReward(Other()), ReadBackReward()
    bring_readers([own, functools.partial(itself, columns=1), len], rounds_bagel(), tiny_tokenizer())
    assert isinstance(own.reader, Other) and isinstance(itself.reader, SelfReader)


def test_shapeworlds_base_reads_what_an_image_shows():
    """Of prompts with other colours and shapes, the one that an image follows is the likeliest."""
    model, tokenizer = load_base(seeing=True)
    scene = np.zeros(9, dtype=int)
    scene[[0, 1]] = 1 + 5 * COLORS.index("green") + SHAPES.index("square")
    reward = ReadBackReward()
    bring_readers([reward], model, tokenizer)
    said = [f"two {color} {shape}s" for color in ("red", "green", "blue") for shape in ("circle", "square", "ring")]
    scores = reward(said, images=render_images(scene) * len(said))
    assert said[int(np.argmax(scores))] == "two green squares"
