"""BAGEL (arXiv 2505.14683), a unified model that reads, thinks and paints: own implementation, trainable end to end.

Shapes: B samples, T text tokens, L context tokens, K images, N = h w tokens per image of C numbers each, H hidden
size.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...trajectory import Passage, Steps, Trajectory, in_order
from ..contract import ContextRow, UnifiedModelMixin, UnifiedOutput
from ..recording import Recorded
from .attention import Context, Layout, causal_mask
from .autoencoder import LatentCodec
from .configuration import BagelConfig
from .copies import Copies, lay_out
from .decoder import BagelLanguageModel
from .decoding import DecodingCache, after_context, empty_cache, samples_token_by_token
from .layers import BagelPositionTable, BagelRMSNorm, BagelTimeEmbedder
from .loading import load_checkpoint
from .pixels import BagelPixels
from .segments import ContextImage, Segments, guided_trajectory, segments, text_segments
from .sight import by_sight, together
from .text_rows import TextRows
from .training import BagelTraining
from .vision import BagelPerceptron, BagelVisionTower


CHAT_TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>' + m['content'] + '<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>'}}{% endif %}"
)
"""BAGEL's own format: one marked chunk per message, without roles. Not the one of its tokenizer."""

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""Name of the cache in `generate` and in outputs: the former from transformers 5.24 on."""


class BagelForUnifiedGeneration(BagelTraining, BagelPixels, UnifiedModelMixin, PreTrainedModel, GenerationMixin):
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
    gathered_layers = ("BagelLayer",)  # only some forwards look at images
    _supports_sdpa = True

    packs_velocities = True
    chat_template = CHAT_TEMPLATE
    frozen_modules = ("vit_model", "connector")
    context_types = (ContextRow, ContextImage)

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
        cache: Cache | None = None,
        padded: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """
        Next-token logits (B, T or logits_to_keep, vocabulary) of text rows, with a cache for `generate`.

        Args:
            attention_mask: (B, cached + T), 1 at real tokens. Positions count the real tokens.
            cache: newer transformers' name of `past_key_values`.
            padded: whether `attention_mask` has a 0, where that is known.
        """
        batch, length = input_ids.shape
        past_key_values = past_key_values if cache is None else cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.llm_config)
        if past_key_values is not None and self._recomputes():
            raise ValueError(
                "A cache can't be written while gradient checkpointing recomputes layers: call under torch.no_grad(), "
                "with use_cache=False, or after gradient_checkpointing_disable()."
            )
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
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
        if past and length == 1 and isinstance(past_key_values, DecodingCache):
            logits = past_key_values.decode(input_ids, position_ids.expand(batch, -1), attention_mask)
            return CausalLMOutputWithPast(logits=logits, **{CACHE: past_key_values})
        layout = Layout(num_text=length, text_mask=causal_mask(attention_mask.bool(), length, padded))
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
        mask = kwargs.get("attention_mask")
        if images is None or not any(images):
            padded = None if mask is None else not bool(mask.all())  # looked at once, not at every token
            if samples_token_by_token(self.generation_config, kwargs):
                kwargs[CACHE] = empty_cache(self)
            return super().generate(inputs, *args, **{"padded": padded, **kwargs})
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        rows = zip(ids.cpu(), torch.ones_like(ids).cpu() if mask is None else mask.cpu(), images, strict=True)
        with torch.no_grad():
            # All but the last token, from which transformers goes on.
            context = self.encode_context([ContextRow(row[real > 0][:-1], shown) for row, real, shown in rows])
        return after_context(super().generate, context, ids, empty_cache(self), CACHE, *args, **kwargs)

    def next_logits(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        """Compute the logits (B, 1, vocabulary) of one token of each row, under a mask (B, 1, 1, S) or none."""
        und, layout = self.get_input_embeddings()(ids), Layout(num_text=1, text_mask=mask)
        hidden, _, _, _ = self.language_model.model(und, None, positions, None, layout, cache)
        return self.language_model.lm_head(hidden)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Leave the mask (B, cached + T) as it is for static caches too: `forward` makes its own of it."""
        return attention_mask

    def _recomputes(self) -> bool:
        checkpointing = any(layer.gradient_checkpointing for layer in self.language_model.model.layers)
        return checkpointing and self.training and torch.is_grad_enabled()

    def backbone(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
        images: Sequence[Sequence[ContextImage]] | None = None,
        passages: Sequence[Sequence[Passage]] | None = None,
    ) -> UnifiedOutput:
        """
        Compute hidden states (B, T, H) of text rows in the padded layout given.

        Args:
            attention_mask: (B, T), 1 at the real tokens of each row, which stand side by side.
            images: for each row the images that its placeholders stand for.
            passages: for each row what it is read as, images included; None for the row itself.
        """
        if use_cache:
            raise ValueError(
                "The backbone has no cache: call it with use_cache=False, or the model itself to generate."
            )
        texts = TextRows.of(input_ids, attention_mask, passages)
        rows = texts.with_images(images or ())
        groups = by_sight(rows)
        parts = [self._texts([rows[i] for i in some]) for some in groups]
        return UnifiedOutput(texts.back(*together(groups, parts)))

    def packed_forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        steps: Steps,
        context_grad: bool = False,
        passages: Sequence[Sequence[Passage]] | None = None,
    ) -> UnifiedOutput:
        texts = TextRows.of(input_ids, attention_mask, passages)
        copies = lay_out(texts.hosts(steps.to(self.device)), texts.rows)
        texts = texts.followed(copies.contexts)
        shown = [row.images for row in copies.contexts]
        hidden, velocity, text_index = self._packed(texts.with_images(shown), copies, context_grad)
        return UnifiedOutput(texts.back(hidden, text_index), velocity)

    # Images

    def encode_context(self, contexts: Sequence[ContextRow]) -> Context:
        """
        Encode contexts; one object is encoded once. If all are there K times, side by side, they are held once, too:
        `predict_velocity` takes K images of each.
        """
        own = list({id(context): context for context in contexts}.values())
        number = {id(context): row for row, context in enumerate(own)}
        table, _ = self._segments(own).moved(self.device)
        keys, values = self._empty_context(len(own))
        if table.ids.shape[1]:
            _, _, keys, values = self._read(table)
        positions = [positions[-1] for positions in table.prefix_positions]
        return Context(keys, values, table.lengths, positions).of([number[id(context)] for context in contexts])

    def predict_velocity(
        self, context: Context, latents: Tensor, timesteps: Tensor, image_size: tuple[int, int]
    ) -> Tensor:
        of_each = len(latents) // len(context.lengths)
        copies, times = (x.unflatten(0, (-1, of_each)) for x in (latents, timesteps))
        markers, gen = self._copy_streams(copies, times, image_size)
        positions, lengths = context.placed[..., None]
        visible, there = [[length] * of_each for length in context.lengths], lengths.expand(-1, of_each)
        layout = Layout(num_text=0, num_images=of_each, visible=visible, visible_there=there, context=context)
        _, gen, _, _ = self.language_model.model(
            markers, gen, positions.expand(-1, markers.shape[1]), positions.expand(-1, gen.shape[1]), layout
        )
        return self.llm2vae(gen).float().reshape(latents.shape)

    def velocity_after(self, contexts: Sequence[ContextRow], image_size: tuple[int, int]) -> Callable[..., Tensor]:
        return Recorded(partial(self.predict_velocity, self.encode_context(contexts), image_size=image_size))

    def predict_velocities(self, steps: Steps, context_grad: bool = False) -> Tensor:
        rows = steps.row.unique(return_inverse=True)[1]
        no_texts = [torch.empty(0, dtype=torch.long)] * (int(rows.max()) + 1)
        copies = lay_out(replace(steps.to(self.device), row=rows), no_texts)
        _, velocity, _ = self._packed(copies.contexts, copies, context_grad)
        return velocity

    def _read(self, table: Segments) -> tuple[Tensor, Tensor | None, list[Tensor], list[Tensor]]:
        """Run contexts alone, and return what the decoder does."""
        und, gen = self._context_streams(table)
        layout = Layout(table.ids.shape[1], segments=table)
        return self.language_model.model(und, gen, table.positions, table.image_positions, layout)

    def _texts(self, rows: Sequence[ContextRow]) -> tuple[Tensor, Tensor | None]:
        """Hidden states (R, U, H) of the text stream of rows, and their tokens' places in it."""
        table, _ = self._table(rows).moved(self.device)
        return self._read(table)[0], table.text_index

    def _packed(
        self, rows: Sequence[ContextRow], copies: Copies, context_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """
        Hidden states (R, U, H) of the text stream of R rows, the velocities (S, N, C) of the copies, and the tokens'
        places in the stream; rows that show no image apart from those that do.
        """
        groups = by_sight(rows)
        if len(groups) == 1:
            return self._packed_alike(self._table(rows), copies, context_grad)
        parts, velocities = [], []
        for some in groups:
            steps, own = copies.of(some)
            if not len(steps):
                parts.append(self._texts([rows[i] for i in some]))
                continue
            hidden, velocity, index = self._packed_alike(self._table([rows[i] for i in some]), own, context_grad)
            parts.append((hidden, index))
            velocities.append((steps, velocity))
        hidden, index = together(groups, parts)
        return hidden, in_order(velocities), index

    def _packed_alike(
        self, table: Segments, copies: Copies, context_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute the same of the rows of one table."""
        prefixes = list(zip(copies.visible, table.prefix_lengths, table.prefix_positions, strict=True))
        # All tokens of a copy share the position behind what it sees.
        at = torch.tensor([[positions[n] for n in seen] for seen, _, positions in prefixes])
        visible = [[lengths[n] for n in seen] for seen, lengths, _ in prefixes]
        table, (at, place, visible_there) = table.moved(self.device, at, copies.place, torch.tensor(visible))
        und, gen = self._context_streams(table)
        num_text, number, tokens = table.ids.shape[1], at.shape[1], copies.states.shape[1]
        layout = Layout(num_text, table, None, number, visible, visible_there, context_grad=context_grad)
        timesteps = copies.timesteps.to(self.device)
        markers, latents = self._copy_streams(copies.latents(place), timesteps, copies.image_size)
        und, gen, _, _ = self.language_model.model(
            torch.cat([und, markers], dim=1),
            latents if gen is None else torch.cat([gen, latents], dim=1),
            torch.cat([table.positions, at.repeat_interleave(2, dim=1)], dim=1),
            torch.cat([table.image_positions, at.repeat_interleave(tokens, dim=1)], dim=1),
            layout,
        )
        velocity = self.llm2vae(gen[:, layout.num_latents :]).float().unflatten(1, (number, tokens))
        return und[:, :num_text], velocity[tuple(place)], table.text_index

    def _table(self, rows: Sequence[ContextRow]) -> Segments:
        if any(row.images or self.config.image_token_id in row.ids for row in rows):
            return self._segments(rows)
        return text_segments([row.ids for row in rows])

    def _segments(self, contexts: Sequence[ContextRow]) -> Segments:
        config = self.config
        markers = config.vision_start_token_id, config.vision_end_token_id
        table = segments(contexts, config.image_token_id, markers)
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
            self.check_grid(grid)
            embedded = self.vae2llm(latents.to(und)) + clean + self.latent_pos_embed(grid).to(und.dtype)
            gen[row, start : start + len(latents)] = embedded
        return und, gen

    def _copy_streams(self, latents: Tensor, timesteps: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Embedded markers (B, 2 K, H) and latents (B, K N, H) of noisy copies (B, K, N, C) at times (B, K)."""
        batch, copies = timesteps.shape
        config, dtype = self.config, self.vae2llm.weight.dtype
        ends = config.vision_start_token_id, config.vision_end_token_id
        # Filled on the device: a list would be copied there, at every denoising step.
        ids = torch.cat([torch.full((1,), end, device=latents.device) for end in ends])
        markers = self.get_input_embeddings()(ids).repeat(batch, copies, 1)
        gen = self.vae2llm(latents.to(dtype)) + self.time_embedder(timesteps)[:, :, None]
        return markers, (gen + self.latent_pos_embed(self.grid(image_size)).to(gen.dtype)).flatten(1, 2)

    def _empty_context(self, batch: int) -> tuple[list[Tensor], list[Tensor]]:
        llm, weight = self.config.llm_config, self.vae2llm.weight
        empty = weight.new_zeros(batch, llm.num_key_value_heads, 0, self.language_model.model.head_dim)
        return [empty] * llm.num_hidden_layers, [empty] * llm.num_hidden_layers

    def contexts(self, trajectories: Sequence[Trajectory]) -> list[ContextRow]:
        """Each prompt and all texts that follow it, closed if the last ran out of length, with the prompt's images."""
        config, rows = self.config, []
        for trajectory in trajectories:
            row, text = [*trajectory.prompt_ids, *trajectory.text_ids], trajectory.text_ids
            if not text and row and row[-1] == config.im_start_token_id:
                row.pop()  # the opened chunk of a thinking that does not come
            elif row and row[-1] not in (config.im_end_token_id, config.image_token_id):
                row.append(config.im_end_token_id)
            rows.append(ContextRow(torch.tensor(row, dtype=torch.long), trajectory.images))
        return rows

    def branch_contexts(self, trajectories: Sequence[Trajectory], branch: str) -> list[ContextRow]:
        """
        "text" sees the system message and the finished images, which may be nothing; "image" the prompt to its end,
        without finished images.
        """
        return self.contexts([guided_trajectory(t, branch, self.config.image_token_id) for t in trajectories])
