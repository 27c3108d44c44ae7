"""Rewards of the CLIP family: how well an image fits its prompt, or how well people would like it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor, nn
from transformers import AutoProcessor, CLIPConfig, CLIPModel, PreTrainedModel

from ..common import ImageReward, Scores
from .embedder import ClipEmbedder, at_least_float32
from .weights import from_open_clip, linear_head, load_weights


CLIP_L = "openai/clip-vit-large-patch14"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
HPS_FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}


class ClipReward(ImageReward):
    """
    A score from the embeddings of image and prompt by a CLIP or SigLIP model, e_i and e_t, both of length 1.

    | head | score |
    |---|---|
    | "cosine" | scale · e_i·e_t |
    | "positive" | max(scale · e_i·e_t, 0) |
    | "sigmoid" | 1 / (1 + exp(-scale · e_i·e_t - bias)), the bias SigLIP's own |
    | a module (B, D) -> (B,) or (B, 1) | scale · module(e_i) |

    Args:
        model: id or folder of the model, or the model itself with its `processor`.
        head: see above.
        scale: the factor; `None` for the one that the model was trained with, exp(logit_scale).
        processor, device, dtype, batch_size: see [`ClipEmbedder`].
        name, max_dead_batches: see [`ImageReward`].

    Raises:
        ValueError: for a head that the model cannot have.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        head: Literal["cosine", "positive", "sigmoid"] | nn.Module = "cosine",
        scale: float | None = 1.0,
        processor: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
        name: str | None = None,
        max_dead_batches: int = 3,
    ):
        super().__init__(name, max_dead_batches)
        if not isinstance(head, nn.Module) and head not in ("cosine", "positive", "sigmoid"):
            raise ValueError(f"head={head!r}: expected 'cosine', 'positive', 'sigmoid' or a torch module.")
        self.embedder = ClipEmbedder(model, processor, device, dtype, batch_size)
        clip = self.embedder.model
        if head == "sigmoid" and not hasattr(clip, "logit_bias"):
            raise ValueError(f"head='sigmoid' needs SigLIP's bias, which {type(clip).__name__} lacks: use 'cosine'.")
        if isinstance(head, nn.Module):
            head = head.to(torch.promote_types(dtype, torch.float32)).eval().requires_grad_(False)
        self.head = head
        self.scale = clip.logit_scale.float().exp().item() if scale is None else scale

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str], columns: dict[str, Any]) -> Scores:
        if not images:
            return []
        with torch.inference_mode():
            return self._scores(self.embedder.images(images), prompts).tolist()

    def differentiable(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """
        Score pixels (B, 3, H, W) in [0, 1], with a gradient to them, for ReFL: (B,).

        The images are resized, cropped and normalised in torch, as the image processor would.
        """
        if len(prompts) != len(pixels):
            raise ValueError(f"Got {len(pixels)} images for {len(prompts)} prompts.")
        return self._scores(self.embedder.pixels(pixels), prompts)

    def _scores(self, image_BD: Tensor, prompts: Sequence[str]) -> Tensor:
        if isinstance(self.head, nn.Module):
            with torch.inference_mode(False):
                self.head.to(image_BD.device)
            return self.scale * self.head(image_BD).flatten()
        # Cloned: autograd refuses tensors made in inference mode.
        score = self.scale * (image_BD * self.embedder.texts(prompts).clone()).sum(-1)
        if self.head == "positive":
            return score.clamp(min=0)
        if self.head == "sigmoid":
            return torch.sigmoid(score + at_least_float32(self.embedder.model.logit_bias))
        return score


def clip_score(model: str = CLIP_L, **options: Any) -> ClipReward:
    """
    Make the reward max(cos, 0) in [0, 1]: CLIPScore as max(100 cos, 0), divided by 100 (Hessel et al., arXiv
    2104.08718, who scale by 2.5 instead). `options`: see [`ClipReward`].
    """
    return ClipReward(model, head="positive", **{"name": "clip_score", **options})


def pick_score(model: str = "yuvalkirstain/PickScore_v1", **options: Any) -> ClipReward:
    """
    Make the reward exp(logit_scale) · cos of a CLIP-H trained on people's choices (arXiv 2305.01569), about 15 to 25.
    Several trainers divide it by 26: `scale` is the whole factor, so pass 100 / 26 for that.
    """
    return ClipReward(model, **{"name": "pick_score", "scale": None, **options})


def hps_v2(
    weights: str | Path | None = None, version: Literal["2.0", "2.1"] = "2.1", base: str = CLIP_H, **options: Any
) -> ClipReward:
    """
    Make the reward cos of a CLIP-H trained on people's preferences (HPSv2, arXiv 2306.09341), about 0.2 to 0.35.

    Images that are not square are cropped to their centre, as CLIP does; the official code pads them.

    Args:
        weights: the checkpoint, under open_clip's names; downloaded from `xswu/HPSv2` by default.
        version: which one to download.
        base: id or folder of the CLIP-H whose sizes and processor it has.
        options: see [`ClipReward`].

    Raises:
        ValueError: for an unknown version, or weights that are not this model's.
    """
    if version not in HPS_FILES:
        raise ValueError(f"version={version!r}: expected one of {sorted(HPS_FILES)}.")
    path = weights or hf_hub_download("xswu/HPSv2", HPS_FILES[version])
    model = CLIPModel(CLIPConfig.from_pretrained(base))
    try:
        model.load_state_dict(from_open_clip(load_weights(path)))
    except RuntimeError as error:
        raise ValueError(f"The weights of {str(path)!r} do not fit {base!r}: {error}") from error
    options = {"name": "hps_v2", "processor": AutoProcessor.from_pretrained(base), **options}
    return ClipReward(model, **options)


def siglip_score(model: str = "google/siglip2-so400m-patch14-384", **options: Any) -> ClipReward:
    """
    Make a reward of the probability that image and prompt belong together, by SigLIP. It is close to 0 or 1 for many
    pairs; pass `head="cosine"` for a score that never saturates.
    """
    return ClipReward(model, **{"name": "siglip_score", "head": "sigmoid", "scale": None, **options})


def aesthetic_score(head: str | Path, model: str = CLIP_L, **options: Any) -> ClipReward:
    """
    Make a reward of how well people like an image, about 1 to 10, whatever the prompt: a head on CLIP's image
    embedding.

    Args:
        head: file of the head (.safetensors, .pth, .pt), such as LAION's `sac+logos+ava1-l14-linearMSE.pth`.
        model: the CLIP that the head was trained on.
        options: see [`ClipReward`].

    Raises:
        ValueError: if the head is not made of linear layers, or does not fit the model.
    """
    layers = linear_head(load_weights(head))
    reward = ClipReward(model, head=layers, **{"name": "aesthetic_score", **options})
    width = getattr(reward.embedder.model.config, "projection_dim", None)
    if width not in (None, layers[0].in_features):
        raise ValueError(f"The head takes {layers[0].in_features} numbers, but {model!r} embeds into {width}.")
    return reward
