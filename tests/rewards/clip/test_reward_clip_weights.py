"""Weights published for other code: open_clip's, against its architecture written down here, and heads."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import CLIPModel

from tests.helpers.tiny_perception import SIDE, smooth_image, tiny_clip
from trl_unigrpo.rewards import aesthetic_score, hps_v2
from trl_unigrpo.rewards.clip.weights import from_open_clip, linear_head, load_weights


class Block(nn.Module):
    """open_clip's residual attention block."""

    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, inner))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(inner, width))

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    def __init__(self, *sizes: int):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(*sizes) for _ in range(2))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Vision(nn.Module):
    def __init__(self, sizes, patch: int, tokens: int, out: int):
        super().__init__()
        width = sizes[0]
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(tokens + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Blocks(*sizes)
        self.proj = nn.Parameter(torch.randn(width, out))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """CLIP as open_clip lays it out."""

    def __init__(self, config):
        super().__init__()
        text, vision = config.text_config, config.vision_config
        tokens = (vision.image_size // vision.patch_size) ** 2
        sizes = (vision.hidden_size, vision.num_attention_heads, vision.intermediate_size)
        self.visual = Vision(sizes, vision.patch_size, tokens, config.projection_dim)
        width = text.hidden_size
        self.token_embedding = nn.Embedding(text.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(text.max_position_embeddings, width))
        self.transformer = Blocks(width, text.num_attention_heads, text.intermediate_size)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, config.projection_dim))
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def encode_text(self, ids):
        mask = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding, mask)
        return self.ln_final(x)[torch.arange(len(ids)), ids.argmax(1)] @ self.text_projection


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


@pytest.fixture(scope="module")
def open_clip(clip):
    torch.manual_seed(0)
    model = OpenClip(clip[0].config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 0:
            nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def test_open_clips_weights_give_open_clips_embeddings(clip, open_clip):
    model = CLIPModel(clip[0].config).eval()
    model.load_state_dict(from_open_clip(open_clip.state_dict()), strict=True)
    pixels = torch.randn(2, 3, SIDE, SIDE)
    torch.testing.assert_close(
        model.get_image_features(pixels).pooler_output, open_clip.visual(pixels), rtol=1e-4, atol=1e-5
    )
    ids = clip[1].tokenizer(["a cat", "two dogs"], padding="max_length", return_tensors="pt").input_ids
    torch.testing.assert_close(
        model.get_text_features(ids).pooler_output, open_clip.encode_text(ids), rtol=1e-4, atol=1e-5
    )
    assert model.logit_scale == 3.0


def test_unknown_weights_are_an_error():
    for name in ("text.transformer.resblocks.0.ln_1.weight", "transformer.resblocks.0.ls_1.gamma"):
        with pytest.raises(ValueError, match=f"{name}.*expected one of open_clip's CLIP"):
            from_open_clip({name: torch.zeros(1)})


def test_hps_v2_is_the_cosine_under_its_weights(clip, open_clip, tmp_path):
    clip[0].config.save_pretrained(tmp_path)
    clip[1].save_pretrained(tmp_path)
    torch.save({"state_dict": open_clip.state_dict(), "epoch": 3}, tmp_path / "hps.pt")
    prompts, images = ["a cat", "two dogs"], [smooth_image(i, 20, 20) for i in range(2)]
    reward = hps_v2(tmp_path / "hps.pt", base=str(tmp_path))
    with torch.no_grad():
        pixels = clip[1].image_processor(images, return_tensors="pt")["pixel_values"]
        ids = clip[1].tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        cos = F.cosine_similarity(open_clip.visual(pixels), open_clip.encode_text(ids))
    assert reward(prompts=prompts, images=images) == pytest.approx(cos.tolist(), abs=1e-5)
    assert reward.__name__ == "hps_v2" and cos.std() > 0.01
    with pytest.raises(ValueError, match="version='3': expected one of"):
        hps_v2(version="3")
    smaller = {name: x for name, x in open_clip.state_dict().items() if name != "visual.proj"}
    torch.save(smaller, tmp_path / "smaller.pt")
    with pytest.raises(ValueError, match="(?s)smaller.pt' do not fit .*visual_projection.weight"):
        hps_v2(tmp_path / "smaller.pt", base=str(tmp_path))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_aesthetic_head_of_several_layers(clip, tmp_path, suffix):
    clip[0].save_pretrained(tmp_path)
    clip[1].save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(0)
    # By name, "layers.10" would come before "layers.2".
    shapes = {"layers.0": (8, 24), "layers.2": (5, 8), "layers.10": (1, 5)}
    state = {}
    for name, (rows, width) in shapes.items():
        state[f"{name}.weight"] = torch.randn(rows, width, generator=generator)
        state[f"{name}.bias"] = torch.randn(rows, generator=generator)
    path = tmp_path / f"head{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    images = [smooth_image(i, 16, 16) for i in range(3)]
    with torch.no_grad():
        pixels = clip[1].image_processor(images, return_tensors="pt")["pixel_values"]
        x = clip[0].get_image_features(pixels).pooler_output
        x = x / x.norm(dim=1, keepdim=True)
        for name in shapes:
            x = x @ state[f"{name}.weight"].T + state[f"{name}.bias"]
    found = aesthetic_score(path, str(tmp_path))(prompts=["a"] * 3, images=images)
    assert found == pytest.approx(x.flatten().tolist(), abs=1e-5)


def test_head_of_one_layer():
    head = linear_head({"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])})
    assert head(torch.tensor([[10.0, 20.0]])).item() == 53.0


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, "gives 2 numbers: expected 1"),
        ({"weight": torch.zeros(1, 3)}, r"Layer '' of the head: expected a weight \(out, in\) and a bias"),
        ({}, "gives None numbers: expected 1"),
        (
            {
                "0.weight": torch.zeros(2, 3),
                "0.bias": torch.zeros(2),
                "1.weight": torch.zeros(1, 4),
                "1.bias": torch.zeros(1),
            },
            "Layer '1' of the head takes 4 numbers, the one before gives 2",
        ),
    ],
)
def test_wrong_heads(state, message):
    with pytest.raises(ValueError, match=message):
        linear_head(state)


def test_head_that_does_not_fit_the_model(clip, tmp_path):
    clip[0].save_pretrained(tmp_path)
    clip[1].save_pretrained(tmp_path)
    save_file({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match="takes 768 numbers, but .* embeds into 24"):
        aesthetic_score(tmp_path / "head.safetensors", str(tmp_path))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*none.pth.*expected weights"):
        load_weights(tmp_path / "none.pth")
