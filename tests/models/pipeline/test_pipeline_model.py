"""A thinker and a painter together: what the painter is told, what is copied, and what is refused."""

import copy
import json

import diffusers
import pytest
import torch
from transformers.utils import is_torchvision_available

from tests.helpers.painting import prompts_alone, trajectory
from tests.helpers.tiny_painters import PROMPTS, generators, tiny_model, unified
from tests.helpers.tiny_pipelines import FAMILIES, TinyPipeline, qwen3, sd3, tokenizer, vae
from trl_unigrpo.evaluation import generate
from trl_unigrpo.flow.sampler import RolloutPlan
from trl_unigrpo.models import load_unified_model
from trl_unigrpo.models.pipeline import PipelineForUnifiedGeneration, PipelineUnifiedConfig, painter
from trl_unigrpo.models.pipeline.painter import ReplayError
from trl_unigrpo.sampling import paint


# What the painter is told


@pytest.mark.parametrize(
    ("completion", "told"),
    [
        ("<think>two of them</think> two red cubes", "two red cubes"),
        ("no markers at all", "no markers at all"),
        ("<think>a</think> b </think>\nc", "c"),
        ("cut short by the limit</think>", "a cube"),
        ("", "a cube"),
    ],
)
@pytest.mark.parametrize("marker", ["text", "token"])
def test_the_painter_is_told_the_answer(completion, told, marker):
    model, words = tiny_model(), tokenizer()

    def encode(text):
        return words(text, add_special_tokens=False)["input_ids"]

    ids = encode(completion)
    if marker == "token":  # as tokenizers that know `</think>` have it
        pieces = [encode(piece) for piece in completion.split("</think>")]
        ids = [i for k, piece in enumerate(pieces) for i in [*([7] if k else []), *piece]]
    rows = [trajectory([1], [*ids, 5], "a cube")]
    assert model.contexts(rows) == [told]
    model.config.painter_prompt = "prompt_and_answer"
    assert model.contexts(rows) == ["a cube" if told == "a cube" else f"a cube\n{told}"]
    model.config.painter_prompt = "completion"
    assert model.contexts(rows) == [completion or "a cube"]


def test_a_conversation_counts_with_what_the_user_says_last():
    prompts = [
        [{"role": "system", "content": "think"}, {"role": "user", "content": "a cube"}],
        [{"role": "user", "content": [{"type": "text", "text": "a ball"}]}],
    ]
    assert tiny_model().contexts(prompts_alone(prompts)) == ["a cube", "a ball"]


def test_guidance_leaves_the_prompt_or_the_thinking_out():
    model = tiny_model()
    rows = [trajectory([1], tokenizer()("a thought", add_special_tokens=False)["input_ids"], "a cube")]
    assert model.contexts(rows) == ["a thought"]
    assert model.branch_contexts(rows, "text") == [""]
    assert model.branch_contexts(rows, "image") == ["a cube"]


# One model


def test_it_thinks_and_paints_outside_of_training():
    """With the tokenizer that it brings, and the noise of each prompt's place."""
    model = tiny_model()
    options = {"max_completion_length": 3, "num_inference_steps": 2, "image_size": 8, "seed": 3}
    samples = generate(model, PROMPTS[:2], **options)
    assert [sample.image.size for sample in samples] == [(8, 8)] * 2
    assert all(sample.thinking for sample in samples)
    again = generate(model, PROMPTS[:2], **options)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(samples, again, strict=True))
    plain = generate(model, PROMPTS[:2], thinking=False, **options)
    assert not torch.equal(plain[0].latents, samples[0].latents)
    assert [sample.thinking for sample in plain] == ["", ""]


def test_text_is_the_thinkers():
    model, ids = tiny_model(), torch.tensor([[10, 20, 30, 40]])
    torch.testing.assert_close(model(ids).logits, model.thinker(ids).logits, rtol=0, atol=0)
    hidden = model.base_model(ids, torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(model.get_output_embeddings()(hidden), model.thinker(ids).logits, rtol=0, atol=0)
    arguments = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **arguments), model.thinker.generate(ids, **arguments))


def test_a_copy_shares_what_is_frozen_and_nothing_else():
    model = tiny_model()
    clone = copy.deepcopy(model)
    assert clone.pipeline.transformer is clone.painter is not model.painter
    assert clone.thinker is not model.thinker
    assert clone.pipeline.vae is clone.frozen["vae"] is model.pipeline.vae
    with torch.no_grad():
        next(clone.painter.parameters()).add_(1.0)
    plan = RolloutPlan(model.own_timesteps(2, (8, 8)), (8, 8))
    images = [paint(m, prompts_alone(PROMPTS[:1]), plan, generators(1))[0].latents for m in (model, clone)]
    assert not torch.equal(*images)


def test_the_painter_stays_in_evaluation_mode():
    model = tiny_model().train()
    assert model.thinker.training
    assert not any(module.training for part in (model.painter, model.frozen) for module in part.modules())


def test_a_pipeline_that_changes_states_is_found_out():
    tiny = sd3()
    tiny.arguments["callback_on_step_end"] = lambda pipe, i, t, kwargs: {"latents": kwargs["latents"] + 1e-3}
    with pytest.raises(ReplayError, match="StableDiffusion3Pipeline changed the latents"):
        unified(tiny)


def test_decoded_images_have_the_gradient_of_the_vae():
    model = tiny_model()
    latents = torch.randn(3, *model.latent_shape((8, 8)), generator=torch.Generator().manual_seed(0))
    weights = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    gradients = []
    for decode in (
        lambda x: model.decode_latents(x, (8, 8), "pt"),
        lambda x: model.pipeline.vae.decode(x / 1.5 + 0.06).sample.clamp(-1, 1),
    ):
        x = latents.clone().requires_grad_()
        (decode(x) * weights).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].any()


def test_large_images_are_decoded_a_few_at_a_time(monkeypatch):
    model, sizes = tiny_model(), []
    latents = torch.randn(5, *model.latent_shape((8, 8)))
    together = model.decode_latents(latents, (8, 8), "pt")
    original = model.pipeline.vae.decode
    monkeypatch.setattr(model.pipeline.vae, "decode", lambda z, **k: (sizes.append(len(z)), original(z, **k))[1])
    monkeypatch.setattr(painter, "PIXELS_AT_ONCE", 2 * 64)
    torch.testing.assert_close(model.decode_latents(latents, (8, 8), "pt"), together)
    assert len(model.decode_latents(latents, (8, 8))) == 5
    assert sizes == [2, 2, 1] * 2


# Refusals


class AlwaysGuided(diffusers.StableDiffusion3Pipeline):
    do_classifier_free_guidance = True


def refused(pipeline, size=(8, 8), **arguments):
    return unified(TinyPipeline(pipeline, size, arguments))


def test_a_pipeline_that_always_guides():
    pipeline = AlwaysGuided(**sd3().pipeline.components)
    with pytest.raises(ValueError, match=r"always guides.*'guidance_scale': 0.0}: \[4\]"):
        refused(pipeline)


def test_a_pipeline_that_is_not_flow_matching():
    pipeline = sd3().pipeline
    pipeline.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(ValueError, match="not a flow-matching pipeline: its scheduler is a DDIMScheduler"):
        refused(pipeline)


def test_a_pipeline_without_a_transformer():
    unet = diffusers.UNet2DModel(
        block_out_channels=(8,), norm_num_groups=1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    with pytest.raises(ValueError, match="DDPMPipeline has no `transformer`.*`unet`"):
        refused(diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()))


def test_a_pipeline_that_fails_says_why():
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline fails in a dry run: .*max_sequence_length"):
        refused(sd3().pipeline, max_sequence_length=1000)


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_a_pipeline_that_needs_torchvision(tmp_path):
    parts = {
        "transformer": diffusers.OmniGenTransformer2DModel(
            hidden_size=16,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=32,
            num_layers=1,
            in_channels=4,
            time_step_dim=4,
            rope_scaling={"long_factor": [1, 2], "short_factor": [1, 2]},
            vocab_size=300,
            pad_token_id=0,
        ),
        "vae": vae(4),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),
        "tokenizer": tokenizer(),
    }
    index = {"_class_name": "OmniGenPipeline", "_diffusers_version": diffusers.__version__}
    for name, part in parts.items():
        part.save_pretrained(tmp_path / name)
        library = "transformers" if name == "tokenizer" else "diffusers"
        index[name] = [library, "PreTrainedTokenizerFast" if name == "tokenizer" else type(part).__name__]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ImportError, match="torchvision most often"):
        PipelineForUnifiedGeneration.from_pretrained(thinker=qwen3(language_head=True), painter=str(tmp_path))


def test_a_thinker_that_can_not_think():
    words, pipeline = tokenizer(), sd3().pipeline
    with pytest.raises(ValueError, match="Qwen3Model can't write text: it has no language head"):
        PipelineForUnifiedGeneration(qwen3(), words, pipeline)
    larger = tokenizer()
    larger.add_tokens([f"<{i}>" for i in range(100)])
    with pytest.raises(ValueError, match="The tokenizer has 364 tokens, but the thinker Qwen3ForCausalLM knows 300"):
        PipelineForUnifiedGeneration(qwen3(language_head=True), larger, pipeline)
    words.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        PipelineForUnifiedGeneration(qwen3(language_head=True), words, pipeline)


@pytest.mark.parametrize(("family", "size"), [("qwen_image", (36, 32)), ("sana", (20, 32)), ("flux1", (9, 8))])
def test_an_image_size_that_the_pipeline_would_round(family, size):
    model = tiny_model(family)
    with pytest.raises(ValueError, match=rf"can't paint an image of {size[0]} x {size[1]} pixels \(height x width\)"):
        model.latent_shape(size)
    assert model.latent_shape(FAMILIES[family]().size)


def test_arguments_that_leave_something_out():
    with pytest.raises(ValueError, match="painter=... with thinker=..."):
        PipelineForUnifiedGeneration.from_pretrained(thinker=qwen3(language_head=True))
    with pytest.raises(
        ValueError, match="painter_prompt='everything': expected one of 'answer', 'prompt_and_answer', "
    ):
        PipelineUnifiedConfig(painter_prompt="everything")
    with pytest.raises(ValueError, match=r"experts='vision': expected one of \['both', 'image', 'text'\]"):
        tiny_model().default_lora_targets("vision")
    with pytest.raises(ValueError, match="output_type='np': expected 'pil' or 'pt'"):
        tiny_model().decode_latents(torch.zeros(1, 4, 8, 8), (8, 8), "np")


# What `from_pretrained` is told


@pytest.mark.parametrize("thinks", [False, True])
def test_the_attention_asked_for_is_the_thinkers(tmp_path, thinks):
    """Alone, as a painter's own text encoder, and of a saved model."""
    if thinks:
        parts = {"painter": FAMILIES["z_image"]().pipeline}
    else:
        qwen3(language_head=True).save_pretrained(tmp_path / "thinker")
        tokenizer().save_pretrained(tmp_path / "thinker")
        parts = {"thinker": str(tmp_path / "thinker"), "painter": FAMILIES["sd3"]().pipeline}
    for asked in ("eager", "sdpa"):
        model = PipelineForUnifiedGeneration.from_pretrained(**parts, dtype=torch.float32, attn_implementation=asked)
        assert model.thinker.config._attn_implementation == asked
    model.save_pretrained(tmp_path / "whole")
    read = load_unified_model(str(tmp_path / "whole"), dtype=torch.float32, attn_implementation="eager")
    assert read.thinker.config._attn_implementation == "eager"


def test_arguments_that_nobody_gets_are_refused():
    with pytest.raises(TypeError, match="variant='fp16' does nothing for a pipeline"):
        PipelineForUnifiedGeneration.from_pretrained(painter="somewhere", variant="fp16")
