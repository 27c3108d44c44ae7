"""The reader in this process, on random models: its log-probs, what it can't read, its gradient."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaProcessor, PythonBackend

from tests.helpers.tiny_llava import IMAGE_SIZE, PATCH, TEMPLATE, WORDS, tiny_llava
from tests.helpers.tiny_qwen_vl import tiny_qwen_vl
from trl_unigrpo.rewards import EndpointReader, LocalReader, ReadBackReward
from trl_unigrpo.rewards.common import DeadRewardError
from trl_unigrpo.trainers.refl import as_reward


def some_image(seed=0, size=(IMAGE_SIZE, IMAGE_SIZE)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PROMPTS = ["a red cat", "the blue dog is there", "a picture", "dog"]
IMAGES = [some_image(0), some_image(1, (60, 40)), some_image(2, (20, 70)), some_image(3)]


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


@pytest.fixture
def reader(llava):
    return LocalReader(*llava, device="cpu")


def log_probs(readings):
    return [None if reading is None else list(reading.log_probs) for reading in readings]


def loss(model_and_processor, image, text, count):
    """The mean loss of a text's last tokens, as training on them has it: all other labels are -100."""
    model, processor = model_and_processor
    inputs = processor(images=image, text=text, return_tensors="pt", add_special_tokens=False)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -count:] = inputs["input_ids"][:, -count:]
    with torch.no_grad():
        return model(**inputs, labels=labels).loss.item()


# What is read


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("instruction", ["", "is there a dog ?"])
def test_log_probs_are_those_of_the_loss_alone_and_in_a_batch(llava, batch_size, instruction):
    reader = LocalReader(*llava, device="cpu", batch_size=batch_size, instruction=instruction)
    readings = reader.read(IMAGES, [f" {prompt}\n" for prompt in PROMPTS])
    for reading, image, prompt in zip(readings, IMAGES, PROMPTS, strict=True):
        text, count = f"<s>user : <image> {instruction} assistant : {prompt}", len(prompt.split())
        assert "".join(reading.tokens) == prompt and len(reading.log_probs) == count
        assert -np.mean(reading.log_probs) == pytest.approx(loss(llava, image, text, count), abs=1e-6)
        if count > 1:
            assert -reading.score == pytest.approx(loss(llava, image, text, count - 1), abs=1e-6)
    assert len({round(score, 6) for row in log_probs(readings) for score in row}) == 11  # each its own


def test_images_that_take_numbers_of_tokens_of_their_own():
    """Qwen's images are as many tokens as they are large, so that texts of a batch end at other places."""
    model, processor = tiny_qwen_vl()
    images = [some_image(seed, size) for seed, size in enumerate([(56, 56), (112, 56), (100, 100)])]
    prompts = ["a red cat", "日本 is far, €5", "dog"]
    together = LocalReader(model, processor, device="cpu").read(images, prompts)
    for reading, image, prompt in zip(together, images, prompts, strict=True):
        turn = "<bos><|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n"
        count = len(prompt.encode())
        assert "".join(reading.tokens) == prompt and len(reading.tokens) == count
        expected = loss((model, processor), image, turn + prompt, count)
        assert -np.mean(reading.log_probs) == pytest.approx(expected, abs=1e-6)


def test_score_starts_behind_the_token_that_is_merged_with_the_template():
    llava = tiny_llava(merges=True)
    reader = LocalReader(*llava, device="cpu")
    merged, single, apart = reader.read(IMAGES[:3], ["dog is there", "dog", "cat is there"])
    assert merged.tokens == ["dog", " is", " there"]
    expected = loss(llava, IMAGES[0], "<s>user :<image> assistant :dog is there", 2)
    assert -merged.score == pytest.approx(expected, abs=1e-6)
    assert -single.score == pytest.approx(loss(llava, IMAGES[1], "<s>user :<image> assistant :dog", 1), abs=1e-6)
    assert apart.tokens == ["cat", " is", " there"]


class SlowWords(PythonBackend):
    """A tokenizer in Python, which tells no offsets."""

    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, **options):
        self.words = {word: index for index, word in enumerate(WORDS)}
        super().__init__(**options)

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return {**self.words, **self.added_tokens_encoder}

    def _tokenize(self, text, **options):
        return re.findall(r"\w+|[^\w\s]", text)

    def _convert_token_to_id(self, token):
        return self.words.get(token, 0)

    def _convert_id_to_token(self, index):
        return WORDS[index]


def test_tokenizer_without_offsets(llava, reader):
    model, processor = llava
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    slow = LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=SlowWords(**names, additional_special_tokens=["<image>"]),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    assert not slow.tokenizer.is_fast
    by_words = LocalReader(model, slow, device="cpu")
    found, expected = by_words.read(IMAGES, PROMPTS), reader.read(IMAGES, PROMPTS)
    for row, other in zip(found, expected, strict=True):
        assert row.tokens == other.tokens and row.log_probs == pytest.approx(other.log_probs, abs=1e-12)
    assert [row is None for row in by_words.read(IMAGES[:2], ["a red unicorn", "dog"])] == [True, False]
    assert "SlowWords, which tells no offsets, do not spell a prompt: 'a red unicorn'" in by_words.last_error


# What can't be read


def test_prompts_that_do_not_fit_into_the_context(llava, reader, monkeypatch):
    """16 tokens of an image, 5 of the template."""
    expected = log_probs(reader.read(IMAGES, PROMPTS))
    monkeypatch.setattr(llava[0].config.get_text_config(), "max_position_embeddings", 16 + 5 + 4)
    found = reader.read(IMAGES, PROMPTS)
    assert [row is None for row in found] == [False, True, False, False]
    for row, other in zip(log_probs(found), expected, strict=True):
        assert row is None or row == pytest.approx(other, abs=1e-12)
    assert "a prompt of 26 tokens do not fit into the reader's context of 25" in reader.last_error
    assert reader.read(IMAGES[1:2], PROMPTS[1:2]) == [None]
    pixels = torch.rand(4, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float64)
    assert reader.differentiable(pixels, PROMPTS).isnan().tolist() == [False, True, False, False]


def test_empty_prompts_and_special_tokens_are_no_scores(reader):
    reward = ReadBackReward(reader)
    prompts = ["", "a <image> of a dog", "red </s>", "dog"]
    scores = reward(prompts, images=IMAGES)
    assert [score is None for score in scores] == [True, True, True, False]
    assert scores[3] == reader.read(IMAGES[3:], PROMPTS[3:])[0].score
    assert reward.last_error == "A prompt holds '</s>', which is a special token of the reader."


def test_template_that_changes_a_prompt(llava, monkeypatch):
    model, processor = llava
    monkeypatch.setattr(processor, "chat_template", TEMPLATE.replace("part['text'] +", "part['text'] | upper +"))
    reader = LocalReader(model, processor, device="cpu")
    assert reader.read(IMAGES[:1], ["dog"]) == [None]
    assert reader.last_error == "The reader's chat template does not leave a prompt as it is: 'dog'."


def test_numbers_that_are_none(llava, monkeypatch):
    model, forward = llava[0], llava[0].forward

    def broken(**inputs):
        outputs = forward(**inputs)
        outputs.logits[1] = torch.nan
        return outputs

    monkeypatch.setattr(model, "forward", broken)
    reward = ReadBackReward(LocalReader(*llava, device="cpu", batch_size=2), max_dead_batches=1)
    assert [score is None for score in reward(PROMPTS, images=IMAGES)] == [False, True, False, True]
    assert reward.last_error == "The model reads NaN in torch.float64: try another dtype."


def test_memory_that_runs_out_halves_the_batch(llava, reader, monkeypatch):
    model, forward, sizes = llava[0], llava[0].forward, []
    expected = log_probs(reader.read(IMAGES, PROMPTS))

    def hungry(input_ids, **inputs):
        sizes.append(len(input_ids))
        if len(input_ids) > 1 or len(sizes) == 4:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB.")
        return forward(input_ids=input_ids, **inputs)

    monkeypatch.setattr(model, "forward", hungry)
    found = log_probs(reader.read(IMAGES, PROMPTS))
    assert sizes == [4, 2, 1, 1, 1, 1] and reader.batch_size == 1
    assert found == [pytest.approx(expected[0]), None, pytest.approx(expected[2]), pytest.approx(expected[3])]
    assert reader.last_error == "tried to allocate 20 GiB. Lower max_side=768, or take a smaller model."


@pytest.mark.parametrize("registered", [False, True])
def test_models_that_do_not_read(tmp_path, llava, registered):
    if registered:  # with transformers, as whoever imports the models does
        import trl_unigrpo.models.bagel
        import trl_unigrpo.models.pipeline  # noqa: F401
    model, processor = llava
    with pytest.raises(ValueError, match="LlamaModel with a TokenizersBackend reads no images: expected an image"):
        LocalReader(model.model.language_model, processor.tokenizer)
    with pytest.raises(ValueError, match="processor is missing"):
        LocalReader(model)
    with pytest.raises(ValueError, match="max_side=0: expected at least 1"):
        LocalReader(model, processor, max_side=0)
    for kind in ("llama", "bagel", "unified_pipeline", "never_heard_of"):
        (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}", "llm_config": {{}}}}')
        with pytest.raises(ValueError, match=rf"{kind}.*A unified model .* ReadBackReward\('self'\)"):
            ReadBackReward(str(tmp_path))


def test_folder_of_a_model_is_a_reader(tmp_path, llava, reader):
    for part in llava:
        part.save_pretrained(tmp_path)
    reward = ReadBackReward(str(tmp_path))
    assert reward(PROMPTS, images=IMAGES) == pytest.approx(ReadBackReward(reader)(PROMPTS, images=IMAGES), abs=1e-12)


# The gradient


def tensor_of(images):
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]).double() / 255


def test_differentiable_path_reads_what_the_reader_reads(reader):
    images = [some_image(seed) for seed in range(4)]
    scores = ReadBackReward(reader).differentiable(tensor_of(images), PROMPTS)
    assert scores.tolist() == pytest.approx([row.score for row in reader.read(images, PROMPTS)], abs=1e-6)


@pytest.mark.parametrize("size", [IMAGE_SIZE, 48])
def test_gradient_agrees_with_finite_differences(reader, size):
    generator = torch.Generator().manual_seed(size)
    pixels = 0.2 + 0.6 * torch.rand(3, 3, size, size, generator=generator, dtype=torch.float64)
    prompts = ["a red cat", "", "dog"]
    score = as_reward(ReadBackReward(reader))
    scores = score(pixels.requires_grad_(), prompts)
    assert scores.isnan().tolist() == [False, True, False]
    (gradient,) = torch.autograd.grad(scores[[0, 2]].sum(), pixels)
    assert not gradient[1].any() and gradient[[0, 2]].flatten(1).norm(dim=1).min() > 1e-4
    for row in (0, 2):
        direction = torch.zeros_like(pixels)
        direction[row] = torch.randn(pixels.shape[1:], generator=generator, dtype=torch.float64)
        step, slope = 3e-4, 0.0  # not smaller: the language model's norms compute in float32
        for steps, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):  # exact up to the fifth order
            with torch.no_grad():
                slope += weight * score(pixels + steps * step * direction, prompts)[row].item() / (12 * step)
        assert (gradient * direction).sum() == pytest.approx(slope, rel=1e-3, abs=2e-4)
    assert all(weight.grad is None for weight in reader.model.parameters())


def test_pixels_without_their_prompts(reader):
    with pytest.raises(ValueError, match=r"\(2, 3, 32, 32\) and 1 prompts"):
        reader.differentiable(torch.zeros(2, 3, 32, 32), ["a"])
    images_in_pieces = LocalReader(*tiny_qwen_vl(), device="cpu")
    with pytest.raises(ValueError, match="longest_edge|cuts images into pieces"):
        images_in_pieces.differentiable(torch.zeros(1, 3, 56, 56), ["a"])


@pytest.mark.parametrize(
    ("reader", "name"),
    [("self", "the model that paints"), (EndpointReader("m", "http://localhost:9/v1"), "its EndpointReader")],
)
def test_readers_without_a_gradient_are_named_before_training(reader, name):
    with pytest.raises(TypeError, match=f"ReadBackReward reads by {name}.*ReFL needs a model in this process"):
        as_reward(ReadBackReward(reader))


def test_rewards_stop_a_run_of_which_nothing_can_be_read(reader):
    reward = ReadBackReward(reader, max_dead_batches=2)
    assert reward([""], images=IMAGES[:1]) == [None]
    with pytest.raises(DeadRewardError, match="in 2 batches in a row. Last error: The prompt of row 0 is empty. Mend"):
        reward([""], images=IMAGES[:1])
