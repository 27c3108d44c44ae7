"""BAGEL (arXiv 2505.14683), a unified model that reads, thinks and paints: own implementation, trainable end to end.

Shapes: B samples, T text tokens, L context tokens, K images, N = h w tokens per image of C numbers each, H hidden
size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..unified import Conditioning, FlowInputs, UnifiedModelMixin, UnifiedOutput
from .attention import Context, Layout
from .autoencoder import AUTOENCODER_WEIGHTS, LatentCodec
from .configuration import BagelConfig
from .layers import BagelLayer, BagelPositionTable, BagelRMSNorm, BagelTimeEmbedder, head_size, rotary_tables
from .loading import load_checkpoint


CHAT_TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>' + m['content'] + '<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>'}}{% endif %}"
)
"""BAGEL's own format: one marked chunk per message, without roles. Not the one of its tokenizer."""

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
        Run both streams, (B, U, H) and (B, G, H) at rotary positions (B, U) and (B, G).

        Returns the normalised streams and every layer's keys and values of the text.
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
    BAGEL with its text and its image-generation paths.

    Args:
        config (`BagelConfig`): sizes.
        codec (`LatentCodec`, *optional*): the VAE, brought by `from_pretrained`; without it the model knows
            only latents.
    """

    config_class = BagelConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BagelLayer"]  # noqa: RUF012 - as transformers declares it
    _supports_sdpa = True
    # The understanding tower of a released checkpoint: not built here.
    _keys_to_ignore_on_load_unexpected = [r"^vit_model\.", r"^connector\.", r"^vit_pos_embed\."]  # noqa: RUF012

    packs_velocities = True
    chat_template = CHAT_TEMPLATE

    def __init__(self, config: BagelConfig, codec: LatentCodec | None = None):
        super().__init__(config)
        width = config.llm_config.hidden_size
        self.language_model = BagelLanguageModel(config)
        self.time_embedder = BagelTimeEmbedder(width)
        self.vae2llm = nn.Linear(config.latent_channels, width)
        self.llm2vae = nn.Linear(width, config.latent_channels)
        self.latent_pos_embed = BagelPositionTable(config.max_latent_size, width)
        self.codec = codec
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.llm_config.initializer_range
        if isinstance(module, BagelPositionTable):
            module.reset()
        elif isinstance(module, BagelRMSNorm):
            nn.init.ones_(module.weight)
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
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | UnifiedOutput:
        """
        Next-token logits (B, T or logits_to_keep, vocabulary) of text rows, with a cache for `generate`.

        Args:
            attention_mask: (B, cached + T), 1 at real tokens. Positions count the real tokens.
            flow: if given, the output is the backbone's instead: hidden states and velocities.
        """
        if flow is not None:
            return self.base_model(input_ids, attention_mask, flow=flow)
        batch, length = input_ids.shape
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
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    def _recomputes(self) -> bool:
        checkpointing = any(layer.gradient_checkpointing for layer in self.language_model.model.layers)
        return checkpointing and self.training and torch.is_grad_enabled()

    def backbone(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
        flow: FlowInputs | None = None,
    ) -> UnifiedOutput:
        """
        Hidden states (B, T, H) of text rows in the padded layout given, and velocities of `flow` from the same call.

        Args:
            attention_mask: (B, T), 1 at the real tokens of each row, which stand side by side.
        """
        if use_cache:
            raise ValueError(
                "The backbone has no cache: call it with use_cache=False, or the model itself to generate."
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        # Rows are moved to the left, where neither positions nor the causal mask need to know of padding.
        start, lengths = attention_mask.long().argmax(1), attention_mask.sum(1)
        if flow is not None:
            lengths = torch.maximum(lengths, flow.context_lengths)
        column = torch.arange(int(lengths.max()), device=input_ids.device)
        ids = input_ids.gather(1, (start[:, None] + column).clamp(max=input_ids.shape[1] - 1))
        if flow is not None:
            # The context is the row itself, and the token that closes a thinking that ran out of length.
            context = flow.context_ids.gather(1, column.clamp(max=flow.context_ids.shape[1] - 1).expand_as(ids))
            ids = torch.where(column < flow.context_lengths[:, None], context, ids)
        hidden, velocity = self._packed(ids, flow)
        back = (torch.arange(input_ids.shape[1], device=ids.device) - start[:, None]).clamp(0, len(column) - 1)
        hidden = hidden.gather(1, back[..., None].expand(-1, -1, hidden.shape[-1]))
        return UnifiedOutput(last_hidden_state=hidden, velocity=velocity)

    # Images

    def encode_context(self, context_ids: Tensor, context_lengths: Tensor) -> Context:
        positions = torch.arange(context_ids.shape[1], device=context_ids.device).expand_as(context_ids)
        layout = Layout(num_text=context_ids.shape[1])
        if context_ids.shape[1] == 0:
            return self._empty_context(context_lengths)
        embedded = self.get_input_embeddings()(context_ids)
        _, _, keys, values = self.language_model.model(embedded, None, positions, None, layout)
        return Context(keys, values, context_lengths, padding_mask(context_lengths, context_ids.shape[1]))

    def predict_velocity(
        self, context: Context, latents: Tensor, timesteps: Tensor, image_size: tuple[int, int]
    ) -> Tensor:
        markers, gen = self._image_streams(latents[:, None], timesteps[:, None], image_size)
        layout = Layout(num_text=0, num_images=1, context=context, context_mask=context.mask)
        positions = context.lengths[:, None]
        _, gen, _, _ = self.language_model.model(
            markers, gen, positions.expand(-1, 2), positions.expand(-1, gen.shape[1]), layout
        )
        return self.llm2vae(gen).float()

    def predict_velocities(self, flow: FlowInputs) -> Tensor:
        _, velocity = self._packed(flow.context_ids, flow)
        assert velocity is not None
        return velocity

    def _packed(self, ids: Tensor, flow: FlowInputs | None) -> tuple[Tensor, Tensor | None]:
        """Hidden states of left-aligned text rows (B, T, H) and, beside them, the velocities of K images each."""
        batch, num_text = ids.shape
        text = self.get_input_embeddings()(ids)
        positions = torch.arange(num_text, device=ids.device).expand(batch, -1)
        if flow is None:
            hidden, _, _, _ = self.language_model.model(text, None, positions, None, Layout(num_text))
            return hidden, None
        images, tokens = flow.latents.shape[1:3]
        markers, gen = self._image_streams(flow.latents, flow.timesteps, flow.image_size)
        at = flow.context_lengths[:, None]  # all tokens of an image share the position behind its context
        layout = Layout(
            num_text=num_text,
            num_images=images,
            context_mask=padding_mask(flow.context_lengths, num_text),
            context_grad=flow.context_grad,
        )
        und, gen, _, _ = self.language_model.model(
            torch.cat([text, markers], dim=1),
            gen,
            torch.cat([positions, at.expand(-1, 2 * images)], dim=1),
            at.expand(-1, images * tokens),
            layout,
        )
        return und[:, :num_text], self.llm2vae(gen).float().unflatten(1, (images, tokens))

    def _image_streams(self, latents: Tensor, timesteps: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Embedded markers (B, 2 K, H) and latents (B, K N, H) of latents (B, K, N, C) at times (B, K)."""
        batch, images = timesteps.shape
        config, dtype = self.config, self.vae2llm.weight.dtype
        ids = torch.tensor([config.vision_start_token_id, config.vision_end_token_id], device=latents.device)
        markers = self.get_input_embeddings()(ids).repeat(batch, images, 1)
        gen = self.vae2llm(latents.to(dtype)) + self.time_embedder(timesteps)[:, :, None]
        return markers, (gen + self.latent_pos_embed(self._grid(image_size)).to(gen.dtype)).flatten(1, 2)

    def _empty_context(self, lengths: Tensor) -> Context:
        llm, weight = self.config.llm_config, self.vae2llm.weight
        empty = weight.new_zeros(len(lengths), llm.num_key_value_heads, 0, self.language_model.model.head_dim)
        return Context([empty] * llm.num_hidden_layers, [empty] * llm.num_hidden_layers, lengths, None)

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

    def context_ids(self, conditioning: Conditioning) -> list[Tensor]:
        config, rows = self.config, []
        for prompt, completion in zip(conditioning.prompt_ids, conditioning.completion_ids, strict=True):
            row = [*prompt, *completion]
            if not completion and row and row[-1] == config.im_start_token_id:
                row.pop()  # the opened chunk of a thinking that does not come
            elif row and row[-1] != config.im_end_token_id:
                row.append(config.im_end_token_id)
            rows.append(torch.tensor(row, dtype=torch.long))
        return rows

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

    def estimate(self, args: Any) -> Any:
        """Memory, FLOPs and the floor in seconds of a run of this model, as it is loaded, with a `UniGRPOConfig`."""
        from ...estimate.report import estimate_run

        return estimate_run(self, args)

    @property
    def default_system_prompt(self) -> str | None:
        return self.config.think_system_prompt

    @property
    def suppressed_token_ids(self) -> Sequence[int]:
        return [self.config.im_start_token_id, self.config.vision_start_token_id, self.config.vision_end_token_id]

    def is_image_parameter(self, name: str) -> bool:
        return "moe_gen" in name or any(part in name for part in ("vae2llm", "llm2vae", "time_embedder"))

    def default_lora_targets(self, experts: str = "both") -> str:
        suffixes: dict[str, Sequence[str]] = {"text": [""], "image": ["_moe_gen"], "both": ["", "_moe_gen"]}
        if experts not in suffixes:
            raise ValueError(f"experts={experts!r}: expected one of {sorted(suffixes)}.")
        linears = "|".join(LINEARS.format(suffix=suffix) for suffix in suffixes[experts])
        return rf"(.*\.)?language_model\.model\.layers\.\d+\.({linears})"


def causal_mask(attention_mask: Tensor, length: int) -> Tensor | None:
    """
    Where the last `length` of S tokens may look: (B, 1, length, S), or None if plain causal attention says it all.

    Args:
        attention_mask: (B, S) True at real tokens.
    """
    total = attention_mask.shape[1]
    if (length == total or length == 1) and bool(attention_mask.all()):
        return None
    causal = torch.ones(length, total, dtype=torch.bool, device=attention_mask.device).tril(total - length)
    mask = causal & attention_mask[:, None, :]
    # A padding token looks at itself, or its softmax would be empty.
    return (mask | torch.eye(total, dtype=torch.bool, device=mask.device)[-length:])[:, None]


def padding_mask(lengths: Tensor, size: int) -> Tensor | None:
    """(B, size) True before each row's length, or None if every row is full."""
    mask = torch.arange(size, device=lengths.device) < lengths[:, None]
    return None if bool(mask.all()) else mask
