"""A language model that thinks and a diffusers pipeline that paints, as one unified model.

Shapes: B samples, T text tokens, H hidden size, `latent` the dimensions of the state that the pipeline's loop keeps.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

from ...messages import user_text
from ...trajectory import Trajectory
from ..contract import ContextRow, UnifiedModelMixin, UnifiedOutput
from ..quantization import keep_trainable_layout
from ..tokenizer import read_tokenizer
from .blocks import linear_names, recomputed_blocks
from .checks import check_pipeline, check_thinker
from .configuration import PipelineUnifiedConfig
from .editing import edits_images, side_step
from .encodings import EditPrompt, Encodings
from .eyes import PipelineEyes
from .gradients import check_gradients
from .latents import LatentMap
from .loading import (
    hardware_dtype,
    hub_alone,
    load_painter,
    load_thinker,
    local_folder,
    painters_own_thinker,
)
from .painter import Painter
from .saving import ADAPTERS, quick_start, save_adapters
from .sharing import share_weights, whole_state


END_OF_THINKING = "</think>"
MEDIA = ("image", "video", "vision", "audio")


class PipelineForUnifiedGeneration(PipelineEyes, UnifiedModelMixin, PreTrainedModel, GenerationMixin):
    """
    Any causal language model and any flow-matching text-to-image pipeline of diffusers.

    The thinker's text is the painter's prompt. The two have no weights in common, unless the painter's text encoder
    is the thinker itself.

    Args:
        thinker (`PreTrainedModel`): a causal language model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, with a chat template.
        pipeline (`DiffusionPipeline`): with a `transformer` and a flow-matching scheduler.
        config (`PipelineUnifiedConfig`, *optional*): what goes between the two.

    Raises:
        ValueError: if one of them can't be used, with the reason. What only a dry run tells comes by [`try_out`], or
            when it paints first, if there is an accelerator and the painter is not on it yet.
    """

    config_class = PipelineUnifiedConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True

    frozen_modules = ("frozen",)
    context_types = (ContextRow, EditPrompt)
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        thinker: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pipeline: Any,
        config: PipelineUnifiedConfig | None = None,
    ):
        check_thinker(thinker, tokenizer)
        check_pipeline(pipeline)
        shared = share_weights(thinker, pipeline.transformer)
        config = copy.deepcopy(config) or PipelineUnifiedConfig()
        config.thinker_config = thinker.config
        config._name_or_path = config._name_or_path or thinker.config._name_or_path  # where the tokenizer is found
        own = {"thinker": thinker.config._name_or_path, "painter": getattr(pipeline, "name_or_path", "")}
        config.sources = {**{part: str(source or "") for part, source in own.items()}, **config.sources}
        parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        trained = {*thinker.modules(), pipeline.transformer}
        config.shared_encoder = any(part in trained for name, part in parts.items() if name != "transformer")
        super().__init__(config)
        self.thinker = thinker
        self.painter = pipeline.transformer
        self.frozen = nn.ModuleDict({name: part for name, part in parts.items() if part not in trained})
        self.frozen.requires_grad_(False)
        self._shared = shared
        self.tokenizer = tokenizer
        self.generation_config = thinker.generation_config
        keep_trainable_layout(self)  # before the dry run
        self._pipeline = pipeline
        self._latent_maps: dict[tuple[int, int], LatentMap] = {}
        self._recomputes = False
        self.train(False)
        if self.painter.device.type != "cpu" or not torch.accelerator.is_available():
            self.try_out(self.painter.device)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any = None,
        *,
        thinker: Any = None,
        painter: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype | str | None = None,
        quantization_config: Any = None,
        config: PipelineUnifiedConfig | None = None,
        painter_prompt: str | None = None,
        painter_arguments: dict[str, Any] | None = None,
        system_prompt: str | None = None,
        attn_implementation: str | None = None,
        **hub: Any,
    ) -> "PipelineForUnifiedGeneration":
        """
        Put a language model and a pipeline together, or load what `save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: folder or hub id of a saved unified model; None with a `painter`.
            thinker: folder or hub id of a causal language model, or the model; None for the painter's own text
                encoder, where that is a language model: one copy in memory.
            painter: folder or hub id of a diffusers pipeline, or the pipeline.
            tokenizer: the thinker's; from its folder by default.
            dtype: by default bfloat16 where the hardware has it, which suits adapters; fine-tuning all weights needs
                `torch.float32`.
            quantization_config: a `BitsAndBytesConfig` for the linear layers of both.
            painter_prompt, painter_arguments, system_prompt: see [`PipelineUnifiedConfig`].
            attn_implementation: of the thinker, as transformers names it. The painter has diffusers' own.
            hub: `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            TypeError: for an argument that neither half would get.
        """
        if (pretrained_model_name_or_path is None) == (painter is None):
            raise ValueError("Pass either the folder of a saved unified model, or painter=... with thinker=... .")
        hub = hub_alone(hub)
        if painter is None:
            folder = local_folder(pretrained_model_name_or_path, **hub)
            config, hub = config or PipelineUnifiedConfig.from_pretrained(folder), {}
            painter, thinker = folder / "painter", None if config.shared_encoder else folder / "thinker"
            tokenizer = tokenizer or read_tokenizer(folder, padding_side="left")
        config = copy.deepcopy(config) or PipelineUnifiedConfig()
        given = {"painter_prompt": painter_prompt, "painter_arguments": painter_arguments}
        for name, value in {**given, "system_prompt": system_prompt}.items():
            if value is not None:
                setattr(config, name, value)
        if not isinstance(dtype, torch.dtype):
            dtype = hardware_dtype() if dtype in (None, "auto") else getattr(torch, dtype)
        pipeline = load_painter(painter, dtype, quantization_config, thinks=thinker is None, **hub)
        check_pipeline(pipeline)
        thinker, own = load_thinker(thinker, dtype, quantization_config, **hub), None
        if thinker is None:
            thinker, own = painters_own_thinker(pipeline)
        attention = attn_implementation or getattr(config, "_attn_implementation", None)
        if attention is not None:
            thinker.set_attn_implementation(attention)
        tokenizer = tokenizer or own or read_tokenizer(thinker.config.name_or_path, **hub)
        return cls(thinker, tokenizer, pipeline, config)

    def save_pretrained(self, save_directory: Any, *args: Any, is_main_process: bool = True, **kwargs: Any) -> None:
        """Write `thinker/`, a folder of transformers, and `painter/`, one of diffusers, beside the configuration."""
        if not is_main_process:
            return
        folder = Path(save_directory)
        self.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if self.image_processor is not None:
            self.image_processor.save_pretrained(folder)
        if not self.config.shared_encoder:
            self.thinker.save_pretrained(folder / "thinker", state_dict=whole_state(self.thinker))
            self.tokenizer.save_pretrained(folder / "thinker")
        self.pipeline.save_pretrained(folder / "painter")

    def load_checkpoint(self, folder: str | Path) -> bool:
        """Take over the weights of a folder of `save_pretrained`; False where it holds none, but adapters."""
        if not (Path(folder) / "painter").is_dir():
            return False
        dtype = next(self.painter.parameters()).dtype
        self.load_state_dict(type(self).from_pretrained(folder, dtype=dtype).state_dict())
        return True

    def save_adapters(self, folder: str | Path) -> None:
        """
        Write the LoRA of each half as its own library has it, `adapters/thinker` and `adapters/painter`, and beside
        them what a model that is in no folder of its own was put together from.
        """
        save_adapters(self, folder)
        if getattr(self, "peft_config", None) and not self.in_one_folder:
            self.config.save_pretrained(Path(folder) / ADAPTERS)

    @property
    def in_one_folder(self) -> bool:
        """True for a model that `save_pretrained` wrote, False for one that was put together from its two halves."""
        return self.config.name_or_path != self.thinker.config.name_or_path

    def quick_start(self, source: str, painting: Mapping[str, Any]) -> str:
        return quick_start(self, source, painting)

    def try_out(self, device: torch.device) -> None:
        self.to(device)
        _ = self._runner

    @cached_property
    def _runner(self) -> Painter:
        # Its dry run waits for the accelerator, if there is one: on a CPU it takes minutes with billions of weights.
        return Painter(self._pipeline, self.config.painter_arguments)

    @property
    def pipeline(self) -> Any:
        """The painter's pipeline, with its own scheduler: what it paints is what the painter has learnt."""
        return self._pipeline

    @property
    def painter_arguments(self) -> dict[str, Any]:
        """Arguments with which the pipeline paints as it was trained: those given, and what leaves guidance out."""
        return self._runner.arguments

    def __deepcopy__(self, memo: dict[int, Any]) -> "PipelineForUnifiedGeneration":
        # Frozen parts are shared by all copies.
        memo.update({id(module): module for module in self.frozen.modules()})
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return clone

    def train(self, mode: bool = True) -> "PipelineForUnifiedGeneration":
        """Set the thinker's mode; the painter always computes as it does when it paints."""
        super().train(mode)
        self.painter.eval()
        self.frozen.eval()
        return self

    # Text

    def get_input_embeddings(self) -> nn.Module:
        return self.thinker.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.thinker.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.thinker.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.thinker.set_output_embeddings(value)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Call the thinker's own forward."""
        return self.thinker(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the thinker's `generate`."""
        return self.thinker.generate(*args, **kwargs)

    def backbone(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> UnifiedOutput:
        outputs = self.thinker.base_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache, **kwargs
        )
        return UnifiedOutput(outputs.last_hidden_state, router_logits=getattr(outputs, "router_logits", None))

    # Images

    def contexts(self, trajectories: Sequence[Trajectory]) -> list[str | EditPrompt]:
        """The painter's prompts: each user's prompt, and the answer of the last text; with the images to edit."""
        answers = [self._answer(t.rounds[-1].text_ids if t.rounds else []) for t in trajectories]
        prompts = [
            self._painter_prompt(user_text(t.prompt), answer) for t, answer in zip(trajectories, answers, strict=True)
        ]
        return [
            EditPrompt(prompt, t.images) if t.images else prompt
            for t, prompt in zip(trajectories, prompts, strict=True)
        ]

    def branch_contexts(self, trajectories: Sequence[Trajectory], branch: str) -> list[str | EditPrompt]:
        """ "text" sees an empty prompt, as diffusers' own guidance does; "image" the user's prompt."""
        if branch == "text":
            empty = self._painter_prompt("", "")
            return [EditPrompt(empty, t.images) if t.images else empty for t in trajectories]
        return self.contexts([replace(trajectory, rounds=[]) for trajectory in trajectories])

    def _answer(self, completion_ids: Sequence[int]) -> str:
        ids = list(completion_ids)
        if self.config.painter_prompt == "completion":
            return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        end = self.tokenizer.convert_tokens_to_ids(END_OF_THINKING)
        if end is not None and end != self.tokenizer.unk_token_id and end in ids:
            ids = ids[len(ids) - ids[::-1].index(end) :]  # it may be a special token, which decoding leaves out
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.rpartition(END_OF_THINKING)[2].strip()

    def _painter_prompt(self, prompt: str, answer: str) -> str:
        both = self.config.painter_prompt == "prompt_and_answer"
        return f"{prompt}\n{answer}" if both and answer else answer or prompt

    def encode_context(self, contexts: Sequence[str | EditPrompt]) -> Encodings:
        edits = [EditPrompt(context, []) if isinstance(context, str) else context for context in contexts]
        sources = [edit.images for edit in edits]
        texts = [edit.text for edit in edits]
        return Encodings(texts, torch.is_grad_enabled(), sources if any(sources) else ())

    @cached_property
    def edits(self) -> bool:  # type: ignore[override]
        return edits_images(self._runner)

    @cached_property
    def side_step(self) -> int:
        return side_step(self._runner)

    @property
    def painter_name(self) -> str:
        return type(self.pipeline).__name__

    def source_image(self, image: Image.Image, image_size: tuple[int, int]) -> Tensor:
        """Keep the pixels (height, width, 3), bytes, which the pipeline encodes itself; the thinker sees none."""
        resized = image.resize((image_size[1], image_size[0]), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(resized))

    def predict_velocity(
        self, context: Encodings, latents: Tensor, timesteps: Tensor, image_size: tuple[int, int]
    ) -> Tensor:
        with recomputed_blocks(self.painter, self._recomputes):
            return self._runner.velocity(context, latents, timesteps, image_size)

    def initial_latents(self, image_size: tuple[int, int], generators: Sequence[torch.Generator]) -> Tensor:
        return self._runner.start(len(generators), image_size, generators)

    def own_timesteps(self, num_inference_steps: int, image_size: tuple[int, int]) -> Tensor:
        """
        Return (num_inference_steps + 1,) float64 times from 1 to 0 of the pipeline's own schedule for an image size.
        """
        return self._runner.own_times(num_inference_steps, image_size)

    def latent_shape(self, image_size: tuple[int, int]) -> tuple[int, ...]:
        return self._runner.latent_shape(image_size)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        size = (pixels.shape[-2], pixels.shape[-1])
        if size not in self._latent_maps:
            self._latent_maps[size] = LatentMap.of(self._runner, size)
        found, vae = self._latent_maps[size], self.pipeline.vae
        pixels = pixels.to(vae.dtype)
        frames = pixels[:, :, None] if len(found.vae_shape) == 4 else pixels  # a VAE of videos
        encoded = vae.encode(frames)
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        return found.latents(latents)

    def decode_latents(
        self, latents: Tensor, image_size: tuple[int, int], output_type: str = "pil"
    ) -> list[Image.Image] | Tensor:
        if output_type not in ("pil", "pt"):
            raise ValueError(f"output_type={output_type!r}: expected 'pil' or 'pt'.")
        images = self._runner.decode(latents, image_size, output_type)
        return 2 * images.float() - 1 if output_type == "pt" else images

    # For the trainer

    @property
    def default_system_prompt(self) -> str | None:
        return self.config.system_prompt

    @property
    def suppressed_token_ids(self) -> list[int]:
        """Give the tokens that stand for images and the like: thinkers that read these name them in their settings."""
        named = self.thinker.config.to_dict().items()
        media = [i for name, i in named if name.startswith(MEDIA) and name.endswith(("_token_id", "_token_index"))]
        return [i for i in media if isinstance(i, int)]

    def served_thinker(self) -> PreTrainedModel:
        if self._shared or self.config.shared_encoder:
            raise ValueError(
                "use_vllm=True: this thinker shares its weights with the painter, whose adapters and folder are not "
                "those of a language model. Leave it out, or pass a thinker of its own."
            )
        return self.thinker

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        check_thinker(self.thinker, tokenizer)

    def check_trained_weights(self) -> None:
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad and self.is_image_parameter(name)}
        if trained:
            check_gradients(trained, self._runner.probe)

    def is_image_parameter(self, name: str) -> bool:
        _, inside, path = name.rpartition("painter.")
        return bool(inside) and not any(path.startswith(f"{module}.") for module in self._shared)

    def default_lora_targets(self, experts: str = "both") -> str:
        networks: dict[str, list[str]] = {
            "text": ["thinker"],
            "image": ["painter"],
            "both": ["thinker", "painter"],
        }
        if experts not in networks:
            raise ValueError(f"experts={experts!r}: expected one of {sorted(networks)}.")
        names = [name for part in networks[experts] for name in self._linears(part)]
        return rf"(.*\.)?({'|'.join(names)})"

    def _linears(self, part: str) -> list[str]:
        """
        Write regular expressions of the linear layers of one part's blocks; those that both use are the thinker's.
        """
        names = linear_names(self.painter)
        shared = [name for name in names if any(re.fullmatch(name, module) for module in self._shared)]
        if part == "painter":
            return [rf"painter\.{name}" for name in names if name not in shared]
        decoder = self.thinker.get_decoder()  # a thinker may also have a tower that reads images
        prefix = next(name for name, module in self.thinker.named_modules() if module is decoder)
        own = [rf"thinker\.{name}" for name in linear_names(decoder, prefix)]
        return own + [rf"painter\.{name}" for name in shared]

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.thinker.gradient_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)
        self._recomputes = True

    def gradient_checkpointing_disable(self) -> None:
        self.thinker.gradient_checkpointing_disable()
        self._recomputes = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self._recomputes

    is_activation_checkpointing = is_gradient_checkpointing
