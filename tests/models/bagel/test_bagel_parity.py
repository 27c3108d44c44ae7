"""The official implementation's recorded tensors, reproduced; tests/fixtures/bagel/README.md says what they are."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from tests.helpers.painting import steps_at
from trl_unigrpo.models.bagel.attention import Layout, attend_streams
from trl_unigrpo.models.bagel.segments import text_segments
from trl_unigrpo.models.contract import ContextRow


TOLERANCE = 1e-4  # of max(1, largest recorded entry)
GRADIENT_TOLERANCE = 1e-3  # of the tensor's largest recorded entry


def assert_recorded(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    if expected.is_floating_point():
        torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * max(1.0, expected.abs().max().item()))
    else:
        assert torch.equal(actual, expected)


@pytest.fixture
def context_ids(recorded) -> Tensor:
    """System prompt, prompt and thinking."""
    return torch.cat([recorded["prefill/input_ids"], recorded["think/context_ids"]])


@pytest.fixture
def image_size(recorded) -> tuple[int, int]:
    return tuple(recorded["flow/image_hw"].tolist())


def encode(model, ids: Tensor):
    return model.encode_context([ContextRow(ids)])


def velocities(model, ids: Tensor, recorded, image_size) -> Tensor:
    """Velocity of each recorded copy, alone with its context."""
    context = encode(model, ids)
    copies = zip(recorded["flow/x_t"].split(1), recorded["flow/t"].split(1), strict=True)
    return torch.cat([model.predict_velocity(context, x, t, image_size) for x, t in copies])


def test_tokenizer_and_chat_template_give_the_recorded_prompt(model, checkpoint, recorded, recorded_meta):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    messages = [
        {"role": "system", "content": model.default_system_prompt},
        {"role": "user", "content": recorded_meta["prompt"]},
    ]
    ids = tokenizer.apply_chat_template(messages, chat_template=model.chat_template, return_dict=False)
    assert ids == recorded["prefill/input_ids"].tolist()
    opened = tokenizer.apply_chat_template(
        messages, chat_template=model.chat_template, add_generation_prompt=True, return_dict=False
    )
    assert opened == ids + [recorded_meta["special_ids"]["bos_token_id"]]


def test_configuration_has_the_recorded_special_tokens(model, recorded_meta):
    config, special = model.config, recorded_meta["special_ids"]
    assert (config.im_start_token_id, config.im_end_token_id) == (special["bos_token_id"], special["eos_token_id"])
    assert config.vision_start_token_id == special["start_of_image"]
    assert config.vision_end_token_id == special["end_of_image"]


@torch.no_grad()
def test_prefill(model, recorded):
    ids = recorded["prefill/input_ids"]
    streams = []
    for layer in model.language_model.model.layers:
        layer.register_forward_hook(lambda module, inputs, outputs: streams.append(outputs[0][0]))
    context = encode(model, ids)
    for index, stream in enumerate(streams):
        assert_recorded(stream, recorded[f"prefill/layer_{index}_out"])
    assert len(streams) == 4
    assert_recorded(context.keys[0][0].transpose(0, 1), recorded["prefill/key_cache_layer0"])
    assert_recorded(context.keys[-1][0].transpose(0, 1), recorded["prefill/key_cache_last"])
    assert_recorded(model.base_model(ids[None]).last_hidden_state[0], recorded["prefill/final_hidden"])
    assert_recorded(model(ids[None]).logits[0], recorded["prefill/logits"])


@torch.no_grad()
def test_teacher_forced_thinking(model, recorded, context_ids):
    start = len(recorded["prefill/input_ids"])
    logits = model(context_ids[None]).logits[0, start:]
    assert_recorded(logits, recorded["think/logits"])
    log_probs = logits[:-1].log_softmax(-1).gather(-1, context_ids[start + 1 :, None])[:, 0]
    assert_recorded(log_probs, recorded["think/token_logprobs"])


@pytest.mark.parametrize("training", [False, True])
def test_greedy_generation_with_cache(model, recorded, recorded_meta, training):
    prompt = torch.cat([recorded["prefill/input_ids"], recorded["think/greedy_tokens"][:1]])[None]
    unused = recorded["prefill/logits"].shape[-1] - 1  # never sampled: an end token that does not come
    new_tokens = recorded_meta["max_length"] - 1
    arguments = {"do_sample": False, "eos_token_id": unused, "max_new_tokens": new_tokens}
    tokens = model.train(training).generate(prompt, attention_mask=torch.ones_like(prompt), **arguments)
    assert_recorded(tokens[0, prompt.shape[1] - 1 :], recorded["think/greedy_tokens"])


def test_greedy_generation_stops_at_the_end_token(model, recorded):
    prompt = torch.cat([recorded["prefill/input_ids"], recorded["think/early_stop_tokens"][:1]])[None]
    end = recorded["think/early_stop_end_token"].item()
    arguments = {"do_sample": False, "eos_token_id": end, "max_new_tokens": 23}
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), **arguments)[0, prompt.shape[1] - 1 :]
    assert tokens[-1] == end
    assert_recorded(tokens[:-1], recorded["think/early_stop_tokens"])


@torch.no_grad()
def test_velocity(model, recorded, context_ids, image_size):
    copies, x0, eps = recorded["flow/t"][:, None, None], recorded["flow/x0"], recorded["flow/eps"]
    assert_recorded((1 - copies) * x0 + copies * eps, recorded["flow/x_t"])
    assert len(context_ids) == recorded["flow/image_rope_position"].item()
    assert_recorded(velocities(model, context_ids, recorded, image_size), recorded["flow/velocity"])


@torch.no_grad()
def test_velocity_of_the_plain_prompt(model, recorded, context_ids, image_size, checkpoint, recorded_meta):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    special = recorded_meta["special_ids"]
    ids = [special["bos_token_id"], *tokenizer.encode(recorded_meta["prompt"]), special["eos_token_id"]]
    actual = velocities(model, torch.tensor(ids), recorded, image_size)
    assert_recorded(actual, recorded["flow/velocity_plain_prompt"])


@torch.no_grad()
def test_velocity_without_context(model, recorded, image_size):
    actual = velocities(model, torch.zeros(0, dtype=torch.long), recorded, image_size)
    assert_recorded(actual, recorded["flow/velocity_unconditional"])


@torch.no_grad()
def test_second_sample_of_the_batch(model, recorded):
    context = encode(model, recorded["batch/prompt_b_ids"])
    size = tuple(recorded["batch/hw_b"].tolist())
    actual = model.predict_velocity(context, recorded["batch/x_b"][None], recorded["flow/t"][1:2], size)
    assert_recorded(actual[0], recorded["batch/velocity_b"])


@torch.no_grad()
def test_euler_rollout(model, recorded, context_ids, image_size):
    context, times = encode(model, context_ids), recorded["rollout/timesteps"]
    x = recorded["rollout/init_noise"]
    for i, (t, t_next) in enumerate(pairwise(times)):
        assert_recorded(x, recorded["rollout/x"][i])
        velocity = model.predict_velocity(context, x[None], t[None], image_size)[0]
        assert_recorded(velocity, recorded["rollout/velocity"][i])
        x = x + (t_next - t) * velocity
    assert_recorded(x, recorded["rollout/x"][-1])
    assert_recorded(x, recorded["rollout/final"])


@torch.no_grad()
def test_autoencoder(model, recorded, image_size):
    pixels, vae = recorded["vae/pixel_values"], model.codec.vae
    posterior = vae.encode(pixels).latent_dist
    assert_recorded(posterior.parameters, recorded["vae/moments"])
    clean = recorded["vae/encode_mean_latent"]
    tokens = model.encode_images(pixels)[0].unflatten(0, (4, 6)).unflatten(-1, (2, 2, 16))  # (h, w, p, q, C)
    assert_recorded(tokens.permute(4, 0, 2, 1, 3).reshape(clean.shape), clean)
    decoded = model.decode_latents(recorded["rollout/final"][None], image_size, "pt")
    assert_recorded(decoded, recorded["vae/decode_output"])
    latents = recorded["vae/decode_input_latent"]
    scaling, shift = vae.config.scaling_factor, vae.config.shift_factor
    assert_recorded(vae.decode(latents / scaling + shift).sample, recorded["vae/decode_output"])


@pytest.fixture
def training_call(model, recorded, context_ids, image_size):
    """The packed call of the recorded training step: (think logits, velocities)."""
    copies = recorded["train/x_t"][None], recorded["train/t"][None]
    steps = steps_at([ContextRow(context_ids)], *copies, image_size)
    output = model.base_model(context_ids[None], steps=steps, context_grad=True)
    start = len(recorded["prefill/input_ids"])
    return model.get_output_embeddings()(output.last_hidden_state)[0, start:-1], output.velocity


def training_losses(training_call, recorded) -> tuple[Tensor, Tensor]:
    """Cross-entropy per token and squared error per element."""
    logits, velocity = training_call
    cross_entropy = torch.nn.functional.cross_entropy(logits, recorded["think/context_ids"][1:], reduction="none")
    return cross_entropy, (velocity - (recorded["flow/eps"] - recorded["flow/x0"])).square()


def test_training_forward(training_call, recorded, recorded_meta):
    logits, velocity = training_call
    assert_recorded(logits, recorded["train/think_logits"])
    assert_recorded(velocity, recorded["train/velocity"])
    cross_entropy, squared_error = training_losses(training_call, recorded)
    assert_recorded(cross_entropy, recorded["train/ce_per_token"])
    assert_recorded(squared_error, recorded["train/mse_per_element"])
    assert cross_entropy.mean().item() == pytest.approx(recorded_meta["train_loss"]["text_ce_mean"], abs=TOLERANCE)
    assert squared_error.mean().item() == pytest.approx(recorded_meta["train_loss"]["image_mse_mean"], abs=TOLERANCE)


def official_order(num_text: int, images: int, tokens: int) -> Tensor:
    """Where each token of the official sequence ([text][start, latents, end]...) stands in our und and gen streams."""
    order = list(range(num_text))
    for image in range(images):
        marker, latents = num_text + 2 * image, num_text + 2 * images + image * tokens
        order += [marker, *range(latents, latents + tokens), marker + 1]
    return torch.tensor(order)


def test_training_positions(model, recorded, request):
    seen = {}
    model.language_model.model.register_forward_hook(
        lambda module, inputs, outputs: seen.update(positions=inputs[2:4])
    )
    _, velocity = request.getfixturevalue("training_call")
    und, gen = seen["positions"]
    order = official_order(len(recorded["train/position_ids"]) - 78, *velocity.shape[:2])
    assert_recorded(torch.cat([und[0], gen[0]])[order], recorded["train/position_ids"])


def test_training_visibility(recorded):
    """Attention over our two streams is dense attention under the recorded mask."""
    mask = recorded["train/attention_mask"]
    num_text, images, tokens = len(mask) - 78, 3, 24
    order = official_order(num_text, images, tokens)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, len(mask), 16, generator=generator) for heads in (4, 2, 2))
    split = num_text + 2 * images
    und, gen = (tuple(x[:, :, part] for x in (q, k, v)) for part in (slice(split), slice(split, None)))
    table = text_segments([torch.zeros(num_text, dtype=torch.long)])
    layout = Layout(num_text, segments=table, num_images=images, visible=[[num_text] * images])
    out_und, out_gen, _, _ = attend_streams(und, gen, layout, 0, None)
    q, k, v = (x[:, :, order] for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
    expected = (q @ k.mT / 4).masked_fill(~mask, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(torch.cat([out_und, out_gen], 2)[:, :, order], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("which", ["text", "image"])
def test_gradients(model, training_call, recorded, recorded_gradients, gradients, which):
    cross_entropy, squared_error = training_losses(training_call, recorded)
    actual = gradients(model, (cross_entropy if which == "text" else squared_error).mean())
    prefix = f"{which}/"
    expected = {key.removeprefix(prefix): value for key, value in recorded_gradients.items() if key.startswith(prefix)}
    assert len(expected) > 100
    for name, gradient in expected.items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(
            actual.pop(name),
            gradient,
            rtol=0,
            atol=GRADIENT_TOLERANCE * largest,
            msg=lambda text, n=name: f"{n}: {text}",
        )
    # What is left was recorded without a gradient.
    assert all(gradient.count_nonzero() == 0 for gradient in actual.values())


@pytest.fixture
def placeholder(model) -> Tensor:
    return torch.tensor([model.config.image_token_id])


@torch.no_grad()
def test_understanding(model, recorded, placeholder):
    shown = model.context_image(vit_pixels=recorded["und/pixel_values"])
    ids = torch.cat([placeholder, recorded["und/question_ids"]])[None]
    hidden = model.base_model(ids, images=[[shown]]).last_hidden_state[0, 1:]
    assert_recorded(model.get_output_embeddings()(hidden), recorded["und/question_logits"])
    prompt = torch.cat([ids, recorded["und/greedy_tokens"][None, :1]], dim=1)
    unused = recorded["prefill/logits"].shape[-1] - 1
    arguments = {"do_sample": False, "eos_token_id": unused, "max_new_tokens": len(recorded["und/greedy_tokens"]) - 1}
    tokens = model.generate(prompt, images=[[shown]], **arguments)
    assert_recorded(tokens[0, prompt.shape[1] - 1 :], recorded["und/greedy_tokens"])


@pytest.mark.parametrize("which", ["und/question", "edit/text"])
@torch.no_grad()
def test_texts_read_back_from_images(model, recorded, which):
    """Log-probs of a text behind an image's vision tokens alone, and behind its latents and vision tokens."""
    latents = recorded["vae/pixel_values"][0] if which == "edit/text" else None
    shown, other = (model.context_image(latents, recorded["und/pixel_values"]) for _ in range(2))
    ids = recorded[f"{which}_ids"].tolist()
    text = ids[1:-1]  # between the start and the end marker
    expected = recorded[f"{which}_logits"].log_softmax(-1)[: len(text)].gather(-1, torch.tensor(text)[:, None])[:, 0]
    found, short, none = model.read_back([shown, other, shown], [text, text[:2], []])
    assert_recorded(found, expected)
    assert_recorded(short, expected[:2])  # padding and the others of the batch change nothing
    assert none.shape == (0,)


@torch.no_grad()
def test_editing(model, recorded, image_size, placeholder):
    source = model.context_image(recorded["vae/pixel_values"][0], recorded["und/pixel_values"])
    row = ContextRow(torch.cat([placeholder, recorded["edit/text_ids"]]), [source])
    hidden = model.base_model(row.ids[None], images=[row.images]).last_hidden_state[0, 1:]
    assert_recorded(model.get_output_embeddings()(hidden), recorded["edit/text_logits"])
    context = model.encode_context([row])
    assert context.positions == recorded["edit/image_rope_position"].tolist()
    velocity = model.predict_velocity(context, recorded["flow/x_t"][1:2], recorded["flow/t"][1:2], image_size)
    assert_recorded(velocity[0], recorded["edit/velocity"])
