"""Adapters in the formats that transformers and diffusers load by themselves."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig, PeftType, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from ...image_sizes import read_size
from ..reference import adapted_layers
from .sharing import aliases


ADAPTERS = "adapters"
"""Folder of the exported adapters, `adapters/thinker` and `adapters/painter`, beside PEFT's own file of both."""

PARTS = ("thinker", "painter")

KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the adapted weights as they are."""


def save_adapters(model: Any, folder: str | Path) -> list[Path]:
    """
    Write the LoRA of each part as its own library has it: a PEFT folder for the thinker, for the painter what its
    pipeline's `load_lora_weights` reads, or a PEFT folder where it reads none, or not all that is trained.

    Warns of trained weights that are not written.

    Returns:
        The folders written: none without adapters.
    """
    if not adapted_layers(model):
        return []
    reason = unexported(model)
    if reason is not None:
        warnings.warn(
            f"No {ADAPTERS}/ for transformers and diffusers is written: {reason}. PEFT's own file, for the unified "
            "model, has all that is trained; `trl-unigrpo merge` folds it into both halves."
        )
        return []
    adapter = _active(model)[0]
    written: list[Path] = []
    seen: set[int] = set()
    for part in PARTS:
        weights = _weights_of(model, part, adapter)
        seen.update(weight.data_ptr() for weight in weights.values())
        weights = {name: weight.contiguous() for name, weight in weights.items()}
        if weights:
            target = Path(folder) / ADAPTERS / part
            target.mkdir(parents=True, exist_ok=True)
            _write(model, part, weights, _config_of(model, part, adapter), target)
            written.append(target)
    lost = [name for name, p in model.named_parameters() if p.requires_grad and p.data_ptr() not in seen]
    if lost:
        warnings.warn(
            f"{ADAPTERS}/ leaves out {len(lost)} trained weights, such as {lost[0]!r}. PEFT's own file has them."
        )
    return written


def unexported(model: Any) -> str | None:
    """Say why the adapters of a model can't be split into those of its parts; None if they can."""
    active = _active(model)
    if len(active) != 1:
        return f"{len(active)} adapters are active ({', '.join(active)}), expected one"
    config = model.peft_config[active[0]]
    if config.peft_type != PeftType.LORA:
        return f"{type(config).__name__} is not LoRA"
    if config.init_lora_weights not in KEEPS_BASE:
        return f"init_lora_weights={config.init_lora_weights!r} may have changed the weights below the adapters"
    tied = getattr(model.thinker.config, "tie_word_embeddings", False)
    if tied and _adapted(model, "thinker", TrainableTokensWrapper):
        return "its token rows are trained where they are read, and PEFT would tie the thinker's head to them"
    return None


def _active(model: Any) -> list[str]:
    """Names of the adapters that are switched on."""
    return sorted({name for layer in adapted_layers(model) for name in layer.active_adapters})


def _weights_of(model: Any, part: str, adapter: str) -> dict[str, Tensor]:
    """Collect all that PEFT saves of an adapter in one part, by its name there."""
    weights = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    places = [(part, "")] if part == "painter" else [(part, ""), *_shared(model)]
    return {
        f"{name}.{key[len(path) + 1 :]}".lstrip("."): weight
        for path, name in places
        for key, weight in weights.items()
        if key.startswith(f"{path}.")
    }


def _shared(model: Any) -> list[tuple[str, str]]:
    """Find modules of the painter that are the thinker's too: their names in the model and in the thinker."""
    return [(f"painter.{path}", name) for name, path in aliases(model.thinker, model.painter).items()]


def _adapted(model: Any, part: str, kind: type[nn.Module]) -> dict[str, Any]:
    """Find the adapted modules of one part and one kind, by their name in it."""
    modules = dict(getattr(model, part).named_modules())
    if part == "thinker":
        modules |= {name: model.get_submodule(path) for path, name in _shared(model)}
    return {name: module for name, module in modules.items() if isinstance(module, kind)}


def loads_adapters(model: Any) -> bool:
    """Say whether the painter's pipeline reads all that is trained of its transformer with `load_lora_weights`."""
    save = getattr(model.pipeline, "save_lora_weights", None)
    if save is None or "transformer_lora_layers" not in signature(save).parameters:
        return False
    return all(".lora_" in name for name in _weights_of(model, "painter", _active(model)[0]))


def _write(model: Any, part: str, weights: dict[str, Tensor], config: LoraConfig, folder: Path) -> None:
    if part == "painter" and loads_adapters(model):
        model.pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=weights,
            transformer_lora_adapter_metadata=config.to_dict(),  # without it, alpha is lost
        )
        return
    named = {f"base_model.model.{name}": weight for name, weight in weights.items()}
    save_file(named, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def _config_of(model: Any, part: str, adapter: str) -> LoraConfig:
    """Write the configuration of one part's adapters: its layers by name, and the rank and alpha of each."""
    layers = {name: layer for name, layer in _adapted(model, part, LoraLayer).items() if adapter in layer.r}
    config = copy.deepcopy(model.peft_config[adapter])
    config.target_modules = set(layers)
    config.rank_pattern = {name: layer.r[adapter] for name, layer in layers.items() if layer.r[adapter] != config.r}
    config.alpha_pattern = {
        name: layer.lora_alpha[adapter]
        for name, layer in layers.items()
        if layer.lora_alpha[adapter] != config.lora_alpha
    }
    config.modules_to_save = [*_adapted(model, part, ModulesToSaveWrapper)] or None
    tokens = _adapted(model, part, TrainableTokensWrapper)
    config.trainable_token_indices = {
        name: list(layer.token_adapter.token_indices[adapter]) for name, layer in tokens.items()
    } or None
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.task_type = "CAUSAL_LM" if part == "thinker" else None
    config.base_model_name_or_path = model.config.sources.get(part)
    config.inference_mode = config.init_lora_weights = True
    if part == "painter":
        config.lora_dropout = 0.0  # diffusers leaves new layers in training mode
    return config


QUICK_START = """## Quick start

```python
from diffusers import DiffusionPipeline
{downloads}from peft import PeftModel
from transformers import AutoTokenizer, {language_class}

tokenizer = AutoTokenizer.from_pretrained("{source}")
{loading}
messages = [
    {{"role": "system", "content": {system!r}}},
    {{"role": "user", "content": "A red cube on a blue table"}},
]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
tokens = thinker.generate(**inputs, max_new_tokens={length})
text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

image = pipeline({prompt}, {arguments}).images[0]
image.save("image.png")
```

"""


def quick_start(model: Any, source: str, painting: Mapping[str, Any]) -> str:
    """Write code for the model card that thinks and paints as in training, with transformers and diffusers alone."""
    told = {
        "answer": "text.rpartition('</think>')[2].strip()",
        "prompt_and_answer": "messages[1]['content'] + '\\n' + text.rpartition('</think>')[2].strip()",
        "completion": "text.strip()",
    }
    height, width = read_size(painting["image_size"])
    system = painting.get("system_prompt", model.config.system_prompt)
    arguments = {**model.painter_arguments, "height": height, "width": width}
    arguments["num_inference_steps"] = painting["num_inference_steps"]
    loading = "\n".join(_loading(model, source))
    return QUICK_START.format(
        source=source,
        downloads="from huggingface_hub import snapshot_download\n" if "snapshot_download" in loading else "",
        language_class=type(model.thinker).__name__,
        loading=loading,
        length=painting["max_completion_length"],
        system=system or "",
        prompt=told[model.config.painter_prompt],
        arguments=", ".join(f"{name}={value!r}" for name, value in arguments.items()),
    )


def _loading(model: Any, source: str) -> Iterator[str]:
    """Yield lines that load `thinker` and `pipeline`, with what was trained."""
    adapted, shared = bool(getattr(model, "peft_config", {})), model.config.shared_encoder
    language_class = type(model.thinker).__name__
    if adapted and unexported(model) is not None:
        parts = ("painter",) if shared else PARTS
        names = [f'{part}="{model.config.sources[part]}"' for part in parts]
        arguments = f'"{model.config.name_or_path}"' if model.in_one_folder else ", ".join(names)
        yield "from trl_unigrpo import PipelineForUnifiedGeneration"
        yield f"model = PipelineForUnifiedGeneration.from_pretrained({arguments})"
        yield f'PeftModel.from_pretrained(model, "{source}")'
        yield "thinker, pipeline = model.thinker, model.pipeline"
        return
    if adapted and not model.in_one_folder:
        thinker, painter = (f'"{model.config.sources[part]}"' for part in PARTS)
    else:
        home = model.config.name_or_path if adapted else source
        thinker, painter = (f'"{home}/{part}"' for part in PARTS)
        if not Path(home).is_dir():  # diffusers reads no pipeline out of a part of a repository
            yield f'home = snapshot_download("{home}")'
            thinker, painter = (f'f"{{home}}/{part}"' for part in PARTS)
    if shared:
        yield f'thinker = {language_class}.from_pretrained({painter}, subfolder="text_encoder")'
    else:
        yield f"thinker = {language_class}.from_pretrained({thinker})"
    if adapted:
        yield f'thinker = PeftModel.from_pretrained(thinker, "{source}", subfolder="{ADAPTERS}/thinker")'
    encoder = ""
    if shared:
        bare = model.pipeline.text_encoder is not model.thinker
        inside = "thinker.get_base_model()" if adapted else "thinker"
        encoder = f", text_encoder={inside}" + (f".{model.thinker.base_model_prefix}" if bare else "")
    yield f"pipeline = DiffusionPipeline.from_pretrained({painter}{encoder})"
    if adapted and loads_adapters(model):
        # Without the file's name diffusers takes any other of a local folder for it.
        where = f'subfolder="{ADAPTERS}/painter", weight_name="{LORA_WEIGHT_NAME_SAFE}"'
        yield f'pipeline.load_lora_weights("{source}", {where})'
    elif adapted:
        wrapped = f'PeftModel.from_pretrained(pipeline.transformer, "{source}", subfolder="{ADAPTERS}/painter")'
        yield f"pipeline.transformer = {wrapped}.get_base_model()"
