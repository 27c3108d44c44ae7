"""BAGEL's configuration, read from the files of the released folder."""

import json
import math
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig, Qwen2Config, SiglipVisionConfig
from transformers.utils import cached_file

from ..hub import hub_arguments


# The released checkpoint carries no VAE configuration: these are the sizes of its `ae.safetensors` (FLUX's VAE).
RELEASED_VAE = {
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "z_channels": 16,
    "scale_factor": 0.3611,
    "shift_factor": 0.1159,
}
RELEASED_WEIGHTS = "ema.safetensors"
RELEASED_CLASS = "BagelForConditionalGeneration"  # what a released `config.json` names as its architecture
# What `from_pretrained` passes to look for files, beside attributes of the configuration.
_DOWNLOAD_ARGUMENTS = (
    *("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision", "subfolder"),
    *("trust_remote_code", "_from_auto", "_from_pipeline", "_commit_hash"),
)
SPECIAL_TOKENS = {
    "im_start_token_id": "<|im_start|>",
    "im_end_token_id": "<|im_end|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
}

THINK_SYSTEM_PROMPT = (
    "You should first think about the planning process in the mind and then generate the image. \nThe planning "
    "process is enclosed within <think> </think> tags, i.e. <think> planning process here </think> image here"
)
"""The words that the released checkpoint was trained on; the space before the line break belongs to it."""

THINK_ANSWER_SYSTEM_PROMPT = (
    "You should first think about the reasoning process in the mind and then provide the user with the answer. \nThe "
    "reasoning process is enclosed within <think> </think> tags, i.e. <think> reasoning process here </think> answer "
    "here"
)
"""The same for an answer in words, about an image or not."""


class BagelConfig(PreTrainedConfig):
    """
    Configuration of [`BagelForUnifiedGeneration`].

    Args:
        llm_config (`dict` or `Qwen2Config`):
            Sizes of the decoder. Both experts have them; q and k are always normalised per head (qk-norm).
        vae_config (`dict`):
            Sizes of the VAE: FLUX's, with the names of its own configuration, or those of a
            [`~trl_unigrpo.models.patch_autoencoder.PatchAutoencoderKL`], marked by `_class_name`.
        latent_patch_size (`int`):
            Side of the square of VAE latents that makes one image token.
        max_latent_size (`int`):
            Image tokens along one side that the position table has room for.
        timestep_shift (`float`):
            Shift of the schedule that the checkpoint was trained with (informative).
        think_system_prompt (`str`, *optional*):
            System prompt that asks for a thinking before the image; None if the model needs none.
        im_start_token_id, im_end_token_id (`int`):
            The tokens that open and close a chunk of text.
        vision_start_token_id, vision_end_token_id (`int`):
            The two marker tokens around an image.
        image_token_id (`int`):
            The token that stands for a finished image in a context. It has no embedding of its own.
        vit_config (`dict` or `SiglipVisionConfig`, *optional*):
            Sizes of the understanding tower; None for a model that reads no images. As in the released
            `vit_config.json`, `num_hidden_layers` counts one layer more than are built and stored.
        vit_max_num_patch_per_side (`int`):
            Patches along one side that the understanding tower has room for.
        connector_act (`str`):
            Activation between the two layers of the connector from the tower to the decoder.
    """

    model_type = "bagel"
    sub_configs: ClassVar[dict[str, type]] = {"llm_config": Qwen2Config, "vit_config": SiglipVisionConfig}

    llm_config: Any = None
    vae_config: Any = None
    vit_config: Any = None
    vit_max_num_patch_per_side: int = 70
    connector_act: str = "gelu_pytorch_tanh"
    latent_patch_size: int = 2
    max_latent_size: int = 64
    timestep_shift: float = 1.0
    think_system_prompt: str | None = THINK_SYSTEM_PROMPT
    im_start_token_id: int = 151644
    im_end_token_id: int = 151645
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    image_token_id: int = 151655

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.llm_config, PreTrainedConfig):
            self.llm_config = Qwen2Config(**(self.llm_config or {}))
        if self.vit_config is not None and not isinstance(self.vit_config, PreTrainedConfig):
            self.vit_config = SiglipVisionConfig(**self.vit_config)
        vae = dict(self.vae_config or {})
        # A released `config.json` may name a few of FLUX's sizes only.
        self.vae_config = vae if "_class_name" in vae else {**RELEASED_VAE, **vae}
        self._check_vision()
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = self.llm_config.tie_word_embeddings = False

    def _check_vision(self) -> None:
        vit, side = self.vit_config, self.vit_max_num_patch_per_side
        if vit is None:
            return
        places = vit.image_size // vit.patch_size
        if side > places:
            raise ValueError(
                f"vit_max_num_patch_per_side={side}, but vit_config has places for {places} patches along one side "
                f"(image_size={vit.image_size}, patch_size={vit.patch_size}). Take both from the same checkpoint."
            )

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Qwen2Config:
        return self.llm_config

    @property
    def vae_downsample(self) -> int:
        """Pixels along one side of one VAE latent."""
        if "strides" in self.vae_config:
            return math.prod(self.vae_config["strides"])
        return 2 ** (len(self.vae_config["ch_mult"]) - 1)

    @property
    def pixels_per_token(self) -> int:
        """Pixels along one side of one image token; image sides must be multiples of it."""
        return self.vae_downsample * self.latent_patch_size

    @property
    def latent_channels(self) -> int:
        """Numbers in one image token."""
        channels = self.vae_config.get("z_channels") or self.vae_config["latent_channels"]
        return self.latent_patch_size**2 * channels

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Assemble the dictionary from `config.json` or, for a released folder, from its separate files."""
        source, hub = pretrained_model_name_or_path, hub_arguments(kwargs)
        config_dict: dict[str, Any] = {}
        if _read_json(source, "config.json", hub) is not None:
            config_dict, kwargs = super().get_config_dict(source, **kwargs)
        else:
            kwargs = {key: value for key, value in kwargs.items() if key not in _DOWNLOAD_ARGUMENTS}
        return cls._complete(config_dict, source, hub), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        # transformers' auto classes read `config.json` only, and say where it lies in `name_or_path`.
        if _is_released(config_dict) and kwargs.get("name_or_path"):
            config_dict = cls._complete(config_dict, kwargs["name_or_path"], {})
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def _complete(cls, config_dict: dict[str, Any], source: str | Path, hub: dict[str, Any]) -> dict[str, Any]:
        """Add what a released folder keeps in other files than `config.json`."""
        if not _is_released(config_dict):
            return config_dict
        llm_config = _read_json(source, "llm_config.json", hub) or config_dict.get("llm_config")
        if llm_config is None:
            raise FileNotFoundError(
                f"{str(source)!r} is not a BAGEL checkpoint: expected `llm_config.json`, or a `config.json` with an "
                "`llm_config` entry. Pass the folder or the hub id of a released BAGEL, or a folder written by "
                "`save_pretrained`."
            )
        tokenizer = _read_json(source, "tokenizer_config.json", hub)
        if tokenizer is None:
            raise FileNotFoundError(
                f"{str(source)!r} has no `tokenizer_config.json`, which says where BAGEL's special tokens are. "
                "Download the checkpoint again, with its tokenizer."
            )
        names = {token["content"]: int(i) for i, token in tokenizer.get("added_tokens_decoder", {}).items()}
        # Left out: what describes the official classes, and the type that a file was once saved in.
        ignored = ("architectures", "visual_gen", "visual_und", "dtype", "torch_dtype")
        return {
            **{key: value for key, value in config_dict.items() if key not in ignored},
            **{key: names[token] for key, token in SPECIAL_TOKENS.items() if token in names},
            "llm_config": llm_config,
            "vit_config": _read_json(source, "vit_config.json", hub) or config_dict.get("vit_config"),
            "transformers_weights": RELEASED_WEIGHTS,
        }


def _is_released(config_dict: dict[str, Any]) -> bool:
    return "llm_config" not in config_dict or RELEASED_CLASS in (config_dict.get("architectures") or ())


def _read_json(source: str | Path, name: str, hub: dict[str, Any]) -> dict[str, Any] | None:
    path = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Download or save the checkpoint again.") from error
