"""BAGEL (arXiv 2505.14683), a unified model that reads, thinks and paints: own implementation, trainable end to end.

Shapes: B samples, T text tokens, L context tokens, K images, N = h w tokens per image of C numbers each, H hidden
size.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..contract import (
    Conditioning,
    ContextRow,
    FlowInputs,
    UnifiedModelMixin,
    UnifiedOutput,
)
from ..memory import fitting, free_memory
from .attention import (
    Context,
    Layout,
    causal_mask,
    left_padded,
)
from .autoencoder import AUTOENCODER_WEIGHTS, LatentCodec
from .configuration import BagelConfig
from .layers import (
    BagelLayer,
    BagelPositionTable,
    BagelRMSNorm,
    BagelTimeEmbedder,
    head_size,
    rotary_tables,
)
from .loading import load_checkpoint
from .processing import check_tokenizer
from .segments import (
    ContextImage,
    Segments,
    padded,
    segments,
    text_segments,
)
from .vision import UNDERSTANDING_MODULES, BagelPerceptron, BagelVisionTower


CHAT_TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>' + m['content'] + '<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>'}}{% endif %}"
)
"""BAGEL's own format: one marked chunk per message, without roles. Not the one of its tokenizer."""

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What transformers calls the cache in `generate` and in outputs: the former from 5.24 on."""

LINEARS = r"self_attn\.[qkvo]_proj{suffix}|mlp{suffix}\.(gate|up|down)_proj"


class BagelDecoder(nn.Module):
    def __init__(self, config: BagelConfig):
        super().__init__()
        llm = config.llm_config
        self.embed_tokens = nn.Embedding(llm.vocab_size, llm.hidden_size)
        self.layers = nn.ModuleList(BagelLayer(llm, i) for i in range(llm.num_hidden_layers))
        self.norm = BagelRMSNorm(llm.hidden_size, llm.rms_norm_eps)
        self.norm_moe_gen = BagelRMSNorm(llm.hidden_size, llm.rms_norm_eps)
        self.theta = llm.rope_parameters["rope_theta"]
        self.head_dim = head_size(llm)

    def forward(
        self,
        und: Tensor,
        gen: Tensor | None,
        positions_und: Tensor,
        positions_gen: Tensor | None,
        layout: Layout,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None, list[Tensor], list[Tensor]]:
        """
        Run both streams, (B, ., H) at rotary positions (B, .).

        Returns the normalised streams and every layer's keys and values of the contexts.
        """
        rotary_und = rotary_tables(positions_und, self.head_dim, self.theta, und.dtype)
        rotary_gen = None
        if gen is not None and positions_gen is not None:
            rotary_gen = rotary_tables(positions_gen, self.head_dim, self.theta, gen.dtype)
        keys, values = [], []
        for layer in self.layers:
            und, gen, k, v = layer(und, gen, rotary_und, rotary_gen, layout, past_key_values)
            keys.append(k)
            values.append(v)
        return self.norm(und), None if gen is None else self.norm_moe_gen(gen), keys, values


class BagelLanguageModel(nn.Module):
    def __init__(self, config: BagelConfig):
        super().__init__()
        self.model = BagelDecoder(config)
        self.lm_head = nn.Linear(config.llm_config.hidden_size, config.llm_config.vocab_size, bias=False)


class BagelForUnifiedGeneration(UnifiedModelMixin, PreTrainedModel, GenerationMixin):
    """
    BAGEL: its text, image-generation and image-understanding paths.

    The understanding tower and its connector are there if the configuration has a `vit_config`. They are frozen until
    `freeze_understanding(False)`, and then belong to the text expert.

    Args:
        config (`BagelConfig`): sizes.
        codec (`LatentCodec`, *optional*): the VAE, brought by `from_pretrained`; without it the model knows
            only latents.
    """

    config_class = BagelConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BagelLayer", "BagelVisionLayer"]  # noqa: RUF012 - as transformers declares it
    _supports_sdpa = True

    packs_velocities = True
    chat_template = CHAT_TEMPLATE
    frozen_modules = ("vit_model", "connector")

    def __init__(self, config: BagelConfig, codec: LatentCodec | None = None):
        super().__init__(config)
        width = config.llm_config.hidden_size
        self.language_model = BagelLanguageModel(config)
        self.time_embedder = BagelTimeEmbedder(width)
        self.vae2llm = nn.Linear(config.latent_channels, width)
        self.llm2vae = nn.Linear(width, config.latent_channels)
        self.latent_pos_embed = BagelPositionTable(config.max_latent_size, width)
        self.vit_model: BagelVisionTower | None = None
        self.connector: BagelPerceptron | None = None
        self.vit_pos_embed: BagelPositionTable | None = None
        if config.vit_config is not None:
            vit, side = config.vit_config, config.vit_max_num_patch_per_side
            self.vit_model = BagelVisionTower(vit, side)
            self.connector = BagelPerceptron(vit.hidden_size, width, width, config.connector_act)
            self.vit_pos_embed = BagelPositionTable(side, width)
        self.codec = codec
        self.post_init()
        self.freeze_understanding()

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.llm_config.initializer_range
        if isinstance(module, BagelPositionTable):
            module.reset()
        elif isinstance(module, (BagelRMSNorm, nn.LayerNorm)):
            nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.Linear):
            if module is getattr(self, "llm2vae", None):
                nn.init.zeros_(module.weight)
            else:
                nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> "BagelForUnifiedGeneration":
        """
        Load a released folder as it is, or one written by `save_pretrained`; hub ids work alike.

        Raises:
            ValueError: if weights are missing, left over or of another shape; the message lists them.
        """
        return load_checkpoint(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.codec is not None and kwargs.get("is_main_process", True):
            self.codec.save(save_directory)

    # Text

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.model.add_module("embed_tokens", value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.language_model.lm_head = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        flow: FlowInputs | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | UnifiedOutput:
        """
        Next-token logits (B, T or logits_to_keep, vocabulary) of text rows, with a cache for `generate`.

        Args:
            attention_mask: (B, cached + T), 1 at real tokens. Positions count the real tokens.
            flow: if given, the output is the backbone's instead: hidden states and velocities.
            cache: newer transformers' name of `past_key_values`.
        """
        if flow is not None:
            return self.base_model(input_ids, attention_mask, flow=flow)
        batch, length = input_ids.shape
        past_key_values = past_key_values if cache is None else cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.llm_config)
        if past_key_values is not None and self._recomputes():
            raise ValueError(
                "A cache can't be written while gradient checkpointing recomputes layers: call under torch.no_grad(), "
                "with use_cache=False, or after gradient_checkpointing_disable()."
            )
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if attention_mask is None:
            attention_mask = input_ids.new_ones(batch, past + length)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
        copies = None
        if past == 0 and isinstance(past_key_values, DynamicCache):
            # The prompts of a group are equal: each is prefilled once.
            rows = torch.cat([input_ids, attention_mask, position_ids.expand(batch, -1)], dim=1)
            rows, copies = rows.unique(dim=0, return_inverse=True)
            input_ids, attention_mask, position_ids = rows.chunk(3, dim=1)
        layout = Layout(num_text=length, text_mask=causal_mask(attention_mask.bool(), length))
        hidden, _, _, _ = self.language_model.model(
            self.get_input_embeddings()(input_ids), None, position_ids, None, layout, past_key_values
        )
        logits = self.language_model.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        if copies is not None and past_key_values is not None:
            past_key_values.batch_select_indices(copies)
            logits = logits[copies]
        return CausalLMOutputWithPast(logits=logits, **{CACHE: past_key_values})

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        images: Sequence[Sequence[ContextImage]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        transformers' `generate`, for prompts that may show images.

        Args:
            inputs: (B, T) prompts, padded on the left, with a placeholder for each image.
            images: for each prompt its images.

        Returns:
            What transformers returns; with images, (B, T + new) tokens.
        """
        if images is None or not any(images):
            return super().generate(inputs, *args, **kwargs)
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        assert ids is not None
        mask = kwargs.pop("attention_mask", None)
        mask = torch.ones_like(ids) if mask is None else mask
        rows = zip(ids.cpu(), mask.bool().cpu(), images, strict=True)
        with torch.no_grad():
            # All but the last token, from which transformers goes on.
            context = self.encode_context([ContextRow(row[real][:-1], shown) for row, real, shown in rows])
        cache, known = DynamicCache(config=self.config.llm_config), left_padded(context)
        for layer, (keys, values) in enumerate(zip(known.keys, known.values, strict=True)):
            cache.update(keys, values, layer)
        size = context.keys[0].shape[2]
        missing = size - torch.tensor(context.lengths, device=ids.device)[:, None]
        column = torch.arange(size + 1, device=ids.device)
        last = torch.tensor(context.positions, device=ids.device)[:, None]
        out = super().generate(
            torch.cat([ids[:, :1].expand(-1, size), ids[:, -1:]], dim=1),
            *args,
            attention_mask=(column >= missing).long(),
            position_ids=last.expand(-1, size + 1).contiguous(),
            **{**kwargs, CACHE: cache, "return_dict_in_generate": False, "use_cache": True},
        )
        return torch.cat([ids, out[:, size + 1 :]], dim=1)

    def _recomputes(self) -> bool:
        checkpointing = any(layer.gradient_checkpointing for layer in self.language_model.model.layers)
        return checkpointing and self.training and torch.is_grad_enabled()

    def backbone(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
        flow: FlowInputs | None = None,
        images: Sequence[Sequence[ContextImage]] | None = None,
    ) -> UnifiedOutput:
        """
        Hidden states (B, T, H) of text rows in the padded layout given, and velocities of `flow` from the same call.

        Args:
            attention_mask: (B, T), 1 at the real tokens of each row, which stand side by side.
            images: for each row the images that its placeholders stand for; those of `flow` by default.
        """
        if use_cache:
            raise ValueError(
                "The backbone has no cache: call it with use_cache=False, or the model itself to generate."
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        # Rows are moved to the left, where neither positions nor the causal mask need to know of padding.
        start, lengths = attention_mask.long().argmax(1), attention_mask.sum(1).tolist()
        if flow is not None:
            lengths = [max(pair) for pair in zip(lengths, map(len, flow.contexts), strict=True)]
            images = images or [row.images for row in flow.contexts]
        column = torch.arange(max(lengths), device=input_ids.device)
        ids = input_ids.gather(1, (start[:, None] + column).clamp(max=input_ids.shape[1] - 1))
        if flow is not None:
            # The context is the row itself, and the token that closes a thinking that ran out of length.
            context, known = padded([row.ids for row in flow.contexts], len(column), ids.device)
            ids = torch.where(known, context, ids)
        if images is not None and any(images):
            rows = zip(ids.cpu(), lengths, images, strict=True)
            table = self._segments([ContextRow(row[:length], shown) for row, length, shown in rows])
        else:
            table = text_segments(ids, lengths)
        hidden, velocity = self._packed(table, flow)
        if table.text_index is not None:
            hidden = hidden.gather(1, table.text_index[..., None].expand(-1, -1, hidden.shape[-1]))
        back = (torch.arange(input_ids.shape[1], device=ids.device) - start[:, None]).clamp(0, hidden.shape[1] - 1)
        hidden = hidden.gather(1, back[..., None].expand(-1, -1, hidden.shape[-1]))
        return UnifiedOutput(last_hidden_state=hidden, velocity=velocity)

    # Images

    def encode_context(self, contexts: Sequence[ContextRow]) -> Context:
        table = self._segments(contexts)
        keys, values = self._empty_context(len(contexts))
        if table.ids.shape[1]:
            und, gen = self._context_streams(table)
            layout = Layout(table.ids.shape[1], segments=table)
            _, _, keys, values = self.language_model.model(und, gen, table.positions, table.image_positions, layout)
        return Context(keys, values, table.lengths, [positions[-1] for positions in table.prefix_positions])

    def predict_velocity(
        self, context: Context, latents: Tensor, timesteps: Tensor, image_size: tuple[int, int]
    ) -> Tensor:
        markers, gen = self._copy_streams(latents[:, None], timesteps[:, None], image_size)
        visible = [[length] for length in context.lengths]
        layout = Layout(num_text=0, num_images=1, visible=visible, context=context)
        positions = torch.tensor(context.positions, device=gen.device)[:, None]
        _, gen, _, _ = self.language_model.model(
            markers, gen, positions.expand(-1, 2), positions.expand(-1, gen.shape[1]), layout
        )
        return self.llm2vae(gen).float()

    def predict_velocities(self, flow: FlowInputs) -> Tensor:
        _, velocity = self._packed(self._segments(flow.contexts), flow)
        assert velocity is not None
        return velocity

    def _packed(self, table: Segments, flow: FlowInputs | None) -> tuple[Tensor, Tensor | None]:
        """Hidden states (B, U, H) of the contexts' text stream and, beside them, the velocities of K copies each."""
        und, gen = self._context_streams(table)
        num_text = table.ids.shape[1]
        layout = Layout(num_text, segments=table)
        if flow is None:
            hidden, _, _, _ = self.language_model.model(und, gen, table.positions, table.image_positions, layout)
            return hidden, None
        copies, tokens = flow.latents.shape[1:3]
        prefixes = list(enumerate(flow.visible_ids))
        layout.num_images, layout.context_grad = copies, flow.context_grad
        layout.visible = [[table.prefix_lengths[i][n] for n in row] for i, row in prefixes]
        # All tokens of a copy share the position behind what it sees.
        at = torch.tensor([[table.prefix_positions[i][n] for n in row] for i, row in prefixes], device=und.device)
        markers, latents = self._copy_streams(flow.latents, flow.timesteps, flow.image_size)
        und, gen, _, _ = self.language_model.model(
            torch.cat([und, markers], dim=1),
            latents if gen is None else torch.cat([gen, latents], dim=1),
            torch.cat([table.positions, at.repeat_interleave(2, dim=1)], dim=1),
            torch.cat([table.image_positions, at.repeat_interleave(tokens, dim=1)], dim=1),
            layout,
        )
        velocity = self.llm2vae(gen[:, layout.num_latents :]).float()
        return und[:, :num_text], velocity.unflatten(1, (copies, tokens))

    def _segments(self, contexts: Sequence[ContextRow]) -> Segments:
        config = self.config
        markers = config.vision_start_token_id, config.vision_end_token_id
        table = segments(contexts, config.image_token_id, markers, self.device)
        longest, limit = max(row[-1] for row in table.prefix_positions), config.llm_config.max_position_embeddings
        if longest >= limit:
            raise ValueError(
                f"A context takes {longest} positions, and its image one more, but the model has {limit}. Shorten the "
                "prompt, or lower `max_completion_length`."
            )
        return table

    def _context_streams(self, table: Segments) -> tuple[Tensor, Tensor | None]:
        """Embedded text stream (B, U, H) of contexts and their image stream (B, G, H), None if there is none."""
        und = self.get_input_embeddings()(table.ids)
        if table.features:
            und = und.clone()
            for row, start, features in table.features:
                und[row, start : start + len(features)] = features.to(und)
        if not table.latents:
            return und, None
        gen = und.new_zeros(*table.image_positions.shape, und.shape[-1])
        clean = self.time_embedder(torch.zeros(1, device=und.device))
        for row, start, latents, grid in table.latents:
            self._check_grid(grid)
            embedded = self.vae2llm(latents.to(und)) + clean + self.latent_pos_embed(grid).to(und.dtype)
            gen[row, start : start + len(latents)] = embedded
        return und, gen

    def _copy_streams(self, latents: Tensor, timesteps: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Embedded markers (B, 2 K, H) and latents (B, K N, H) of noisy copies (B, K, N, C) at times (B, K)."""
        batch, copies = timesteps.shape
        config, dtype = self.config, self.vae2llm.weight.dtype
        ids = torch.tensor([config.vision_start_token_id, config.vision_end_token_id], device=latents.device)
        markers = self.get_input_embeddings()(ids).repeat(batch, copies, 1)
        gen = self.vae2llm(latents.to(dtype)) + self.time_embedder(timesteps)[:, :, None]
        return markers, (gen + self.latent_pos_embed(self._grid(image_size)).to(gen.dtype)).flatten(1, 2)

    def _empty_context(self, batch: int) -> tuple[list[Tensor], list[Tensor]]:
        llm, weight = self.config.llm_config, self.vae2llm.weight
        empty = weight.new_zeros(batch, llm.num_key_value_heads, 0, self.language_model.model.head_dim)
        return [empty] * llm.num_hidden_layers, [empty] * llm.num_hidden_layers

    def _check_grid(self, grid: tuple[int, int]) -> None:
        if max(grid) > self.config.max_latent_size:
            raise ValueError(
                f"An image of {grid[0]} x {grid[1]} tokens does not fit the position table, which has "
                f"{self.config.max_latent_size} to a side. Make the image smaller."
            )

    def _grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        unit, limit = self.config.pixels_per_token, self.config.max_latent_size
        if any(side % unit or not 0 < side <= unit * limit for side in image_size):
            raise ValueError(
                f"This model can't paint an image of {image_size[0]} x {image_size[1]} pixels (height x width): each "
                f"side must be a multiple of {unit}, at most {unit * limit}."
            )
        return image_size[0] // unit, image_size[1] // unit

    def latent_shape(self, image_size: tuple[int, int]) -> tuple[int, int]:
        height, width = self._grid(image_size)
        return height * width, self.config.latent_channels

    def images_at_once(self, image_size: tuple[int, int]) -> int | None:
        llm, weight = self.config.llm_config, self.vae2llm.weight
        # A layer's largest moment: four tensors of the MLP's width, eight of the stream's, two of them in float32.
        numbers = 4 * llm.intermediate_size + 8 * llm.hidden_size
        token = numbers * weight.element_size() + 8 * llm.hidden_size
        tokens = self.latent_shape(image_size)[0] + 2
        fits = fitting(free_memory(weight.device), tokens * token)
        return None if fits is None else max(1, fits)

    def contexts(self, conditioning: Conditioning) -> list[ContextRow]:
        config, rows = self.config, []
        images = conditioning.images or [()] * len(conditioning)
        for prompt, completion, shown in zip(
            conditioning.prompt_ids, conditioning.completion_ids, images, strict=True
        ):
            row = [*prompt, *completion]
            if not completion and row and row[-1] == config.im_start_token_id:
                row.pop()  # the opened chunk of a thinking that does not come
            elif row and row[-1] not in (config.im_end_token_id, config.image_token_id):
                row.append(config.im_end_token_id)
            rows.append(ContextRow(torch.tensor(row, dtype=torch.long), shown))
        return rows

    def guidance_conditioning(self, conditioning: Conditioning, branch: str) -> Conditioning:
        """
        "text" sees the system message and the finished images, which may be nothing; "image" the prompt to its end,
        without finished images.
        """
        nothing: list[list[int]] = [[] for _ in range(len(conditioning))]
        placeholder, images = self.config.image_token_id, conditioning.images or nothing
        if branch == "image":
            prompts = [[token for token in row if token != placeholder] for row in conditioning.prompt_ids]
            return Conditioning(prompts, nothing, conditioning.system_ids)
        if conditioning.system_ids is None:
            raise ValueError(
                "Guidance needs to know which part of a prompt is its system message: set `Conditioning.system_ids`, "
                "to empty rows for prompts without one."
            )
        shown = [[*row, *[placeholder] * len(x)] for row, x in zip(conditioning.system_ids, images, strict=True)]
        return replace(conditioning, prompt_ids=shown, completion_ids=nothing)

    def embed_vit_image(self, pixels: Tensor) -> Tensor:
        """
        What the text expert reads of an image: embeddings (N, H) of its patches, row by row.

        Args:
            pixels: (3, height, width) in [-1, 1], as `BagelProcessor.vit_pixels` gives them; or a batch of one size,
                (B, 3, height, width), for embeddings (B, N, H).

        Raises:
            ValueError: if the model has no understanding tower, or can't read an image of this size.
        """
        if self.vit_model is None or self.connector is None or self.vit_pos_embed is None:
            raise ValueError(
                "This model can't read images: it has no understanding tower. Load a checkpoint that holds "
                "`vit_model`, `connector` and `vit_pos_embed`, with a `vit_config` that describes them."
            )
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
            latents, grid = self.encode_images(pixels[None])[0], self._grid((pixels.shape[-2], pixels.shape[-1]))
        features = None if vit_pixels is None else self.embed_vit_image(vit_pixels)
        return ContextImage(latents, grid, features)

    def freeze_understanding(self, frozen: bool = True) -> None:
        """Keep the understanding tower and its connector out of training, or (False) let them in."""
        for name in UNDERSTANDING_MODULES:
            if (module := getattr(self, name)) is not None:
                module.requires_grad_(not frozen)

    def encode_images(self, pixels: Tensor) -> Tensor:
        self._grid((pixels.shape[-2], pixels.shape[-1]))
        return self._codec().encode(pixels)

    def decode_latents(
        self, latents: Tensor, image_size: tuple[int, int], output_type: str = "pil"
    ) -> list[Image.Image] | Tensor:
        return self._codec().decode(latents, self._grid(image_size), output_type)

    def _codec(self) -> LatentCodec:
        if self.codec is None:
            raise ValueError(
                f"This model has no VAE: put `{AUTOENCODER_WEIGHTS}` into the folder that `from_pretrained` loads, or "
                "set `model.codec = LatentCodec(...)`."
            )
        return self.codec

    # For the trainer

    @property
    def default_system_prompt(self) -> str | None:
        return self.config.think_system_prompt

    @property
    def suppressed_token_ids(self) -> Sequence[int]:
        return [self.config.im_start_token_id, self.config.vision_start_token_id, self.config.vision_end_token_id]

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        check_tokenizer(tokenizer, self.config)

    def is_image_parameter(self, name: str) -> bool:
        return "moe_gen" in name or any(part in name for part in ("vae2llm", "llm2vae", "time_embedder"))

    def default_lora_targets(self, experts: str = "both") -> str:
        suffixes: dict[str, Sequence[str]] = {"text": [""], "image": ["_moe_gen"], "both": ["", "_moe_gen"]}
        if experts not in suffixes:
            raise ValueError(f"experts={experts!r}: expected one of {sorted(suffixes)}.")
        linears = "|".join(LINEARS.format(suffix=suffix) for suffix in suffixes[experts])
        return rf"(.*\.)?language_model\.model\.layers\.\d+\.({linears})"
