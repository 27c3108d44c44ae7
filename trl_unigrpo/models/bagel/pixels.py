"""Between pixels and what BAGEL's experts see of them: latents, grids of tokens, embedded patches.

Shapes: B images, h x w tokens of C numbers each, H hidden size.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ...images import alike_together
from ...trajectory import Image as PaintedImage
from ..memory import fitting, free_memory
from .autoencoder import AUTOENCODER_WEIGHTS, LatentCodec
from .layers import BagelPositionTable
from .processing import checked_rgb, resized, to_pixels, vae_rule, vit_rule
from .segments import ContextImage
from .vision import UNDERSTANDING_MODULES, BagelPerceptron, BagelVisionTower


NO_TOWER = (
    "This model can't read images: it has no understanding tower. Load a checkpoint that holds `vit_model`, "
    "`connector` and `vit_pos_embed`, with a `vit_config` that describes them."
)

# What the mixin is mixed into; a base class in the eyes of the type checker alone.
_Base: Any = PreTrainedModel if TYPE_CHECKING else object


class BagelPixels(_Base):
    """Mixin of BAGEL: its VAE, its understanding tower, and the sizes of images that it knows."""

    codec: LatentCodec | None
    vit_model: BagelVisionTower | None
    connector: BagelPerceptron | None
    vit_pos_embed: BagelPositionTable | None

    def check_grid(self, grid: tuple[int, int]) -> None:
        if max(grid) > self.config.max_latent_size:
            raise ValueError(
                f"An image of {grid[0]} x {grid[1]} tokens does not fit the position table, which has "
                f"{self.config.max_latent_size} to a side. Make the image smaller."
            )

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        unit, limit = self.config.pixels_per_token, self.config.max_latent_size
        if any(side % unit or not 0 < side <= unit * limit for side in image_size):
            raise ValueError(
                f"This model can't paint an image of {image_size[0]} x {image_size[1]} pixels (height x width): each "
                f"side must be a multiple of {unit}, at most {unit * limit}."
            )
        return image_size[0] // unit, image_size[1] // unit

    def latent_shape(self, image_size: tuple[int, int]) -> tuple[int, int]:
        height, width = self.grid(image_size)
        return height * width, self.config.latent_channels

    def images_at_once(self, image_size: tuple[int, int]) -> int | None:
        llm, weight = self.config.llm_config, self.vae2llm.weight
        # A layer's largest moment: four tensors of the MLP's width, eight of the stream's, two of them in float32.
        numbers = 4 * llm.intermediate_size + 8 * llm.hidden_size
        token = numbers * weight.element_size() + 8 * llm.hidden_size
        tokens = self.latent_shape(image_size)[0] + 2
        fits = fitting(free_memory(weight.device), tokens * token)
        return None if fits is None else max(1, fits)

    def embed_vit_image(self, pixels: Tensor) -> Tensor:
        """
        Embed the patches of an image for the text expert, row by row: (N, H).

        Args:
            pixels: (3, height, width) in [-1, 1], as `BagelProcessor.vit_pixels` gives them; or a batch of one size,
                (B, 3, height, width), for embeddings (B, N, H).

        Raises:
            ValueError: if the model has no understanding tower, or can't read an image of this size.
        """
        if self.vit_model is None or self.connector is None or self.vit_pos_embed is None:
            raise ValueError(NO_TOWER)
        tokens = self.connector(self.vit_model(pixels))
        return tokens + self.vit_pos_embed(self.vit_model.grid(pixels)).to(tokens)

    @torch.no_grad()
    def context_image(self, pixels: Tensor | None = None, vit_pixels: Tensor | None = None) -> ContextImage:
        """
        A finished image for a context, to be kept and shown again as it is.

        Args:
            pixels: (3, height, width) in [-1, 1] for the image expert, as `BagelProcessor.vae_pixels` gives them;
                editing needs them.
            vit_pixels: (3, height, width) in [-1, 1] for the text expert, as `BagelProcessor.vit_pixels` gives them.
        """
        latents, grid = None, (0, 0)
        if pixels is not None:
            latents, grid = self.encode_images(pixels[None])[0], self.grid((pixels.shape[-2], pixels.shape[-1]))
        features = None if vit_pixels is None else self.embed_vit_image(vit_pixels)
        return ContextImage(latents, grid, features)

    def read_back(self, images: Sequence[ContextImage], texts: Sequence[Sequence[int]]) -> list[Tensor]:
        config = self.config
        if self.vit_model is None:
            raise ValueError(NO_TOWER)
        if not texts:
            return []
        before = [config.image_token_id, config.im_start_token_id]
        ids = pad_sequence([torch.tensor([*before, *text]) for text in texts], batch_first=True).to(self.device)
        lengths = torch.tensor([len(before) + len(text) for text in texts], device=self.device)
        mask = torch.arange(ids.shape[1], device=self.device) < lengths[:, None]
        hidden = self.backbone(ids, mask, images=[[image] for image in images]).last_hidden_state
        logits = self.get_output_embeddings()(hidden[:, len(before) - 1 : -1])
        log_probs = logits.float().log_softmax(-1).gather(-1, ids[:, len(before) :, None])[..., 0]
        return [row[: len(text)] for row, text in zip(log_probs, texts, strict=True)]

    @torch.no_grad()
    def observe(
        self, images: Sequence[PaintedImage], seen: Sequence[Image.Image], reencode: bool
    ) -> list[ContextImage]:
        with torch.autocast(self.device.type, enabled=False):
            shown = self._shown(seen, None if reencode else [image.latents.float() for image in images])
        return [image.kept() for image in shown]

    edits = True

    @property
    def side_step(self) -> int:
        return int(self.config.pixels_per_token)

    @property
    def longest_side(self) -> int:
        return int(self.config.pixels_per_token * self.config.max_latent_size)

    @torch.no_grad()
    def source_image(self, image: Image.Image, image_size: tuple[int, int]) -> ContextImage:
        """See an image by the VAE and, where there is one, by the understanding tower, each in its own precision."""
        image = image.resize((image_size[1], image_size[0]), Image.Resampling.BICUBIC)
        with torch.autocast(self.device.type, enabled=False):
            return self._shown([image])[0].kept()

    def read_images(self, images: Sequence[Image.Image]) -> list[ContextImage]:
        return self._shown([resized(checked_rgb(image), vae_rule(self.config)) for image in images])

    def _shown(self, images: Sequence[Image.Image], latents: Sequence[Tensor] | None = None) -> list[ContextImage]:
        """Encode images that the VAE takes, unless their latents are given, and have the tower, if any, read them."""

        def encoded(encode: Callable[[Tensor], Tensor], some: Sequence[Image.Image]) -> list[Tensor]:
            def alike(rows: list[int]) -> Tensor:
                return encode(torch.stack([to_pixels(some[i]) for i in rows]).to(self.device))

            return alike_together([image.size for image in some], alike)

        if latents is None:
            latents = encoded(self.encode_images, images)
        features: list[Tensor | None] = [None] * len(images)
        if (rule := vit_rule(self.config)) is not None:
            features = [*encoded(self.embed_vit_image, [resized(image, rule) for image in images])]
        grids = [self.grid((image.height, image.width)) for image in images]
        return [ContextImage(*parts) for parts in zip(latents, grids, features, strict=True)]

    def freeze_understanding(self, frozen: bool = True) -> None:
        """Keep the understanding tower and its connector out of training, or (False) let them in."""
        for name in UNDERSTANDING_MODULES:
            if (module := getattr(self, name)) is not None:
                module.requires_grad_(not frozen)

    def encode_images(self, pixels: Tensor) -> Tensor:
        self.grid((pixels.shape[-2], pixels.shape[-1]))
        return self._codec().encode(pixels)

    def decode_latents(
        self, latents: Tensor, image_size: tuple[int, int], output_type: str = "pil"
    ) -> list[Image.Image] | Tensor:
        return self._codec().decode(latents, self.grid(image_size), output_type)

    def _codec(self) -> LatentCodec:
        if self.codec is None:
            raise ValueError(
                f"This model has no VAE: put `{AUTOENCODER_WEIGHTS}` into the folder that `from_pretrained` loads, or "
                "set `model.codec = LatentCodec(...)`."
            )
        return self.codec
