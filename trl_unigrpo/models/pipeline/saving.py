"""Adapters in the formats that transformers and diffusers load by themselves."""

import copy
from collections.abc import Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from .sharing import aliases


ADAPTERS = "adapters"
"""Folder of the exported adapters, `adapters/thinker` and `adapters/painter`, beside PEFT's own file of both."""

PARTS = ("thinker", "painter")


def save_adapters(model: Any, folder: str | Path, adapter: str = "default") -> list[Path]:
    """
    Write the LoRA of each part as its own library has it: a PEFT folder for the thinker, for the painter what its
    pipeline's `load_lora_weights` reads, or a PEFT folder too where it reads none.

    Returns:
        The folders written: none without adapters.
    """
    configs = getattr(model, "peft_config", {})
    if not isinstance(configs.get(adapter), LoraConfig):
        return []
    weights = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    written = []
    for part in PARTS:
        layers = _adapted_layers(model, part, adapter)
        own = {
            f"{name}.{rest}": weight.contiguous()
            for name, (path, _) in layers.items()
            for rest, weight in _below(weights, path)
        }
        if own:
            target = Path(folder) / ADAPTERS / part
            target.mkdir(parents=True, exist_ok=True)
            _write(model, part, own, _config_of(model, part, layers, configs[adapter], adapter), target)
            written.append(target)
    return written


def _adapted_layers(model: Any, part: str, adapter: str) -> dict[str, tuple[str, LoraLayer]]:
    """Find the adapted layers of one part, by their name in it: their name in the model, and the layer."""
    network = getattr(model, part)
    layers = {name: (f"{part}.{name}", layer) for name, layer in network.named_modules()}
    if part == "thinker":
        for name, path in aliases(network, model.painter).items():
            layers[name] = (f"painter.{path}", model.painter.get_submodule(path))
    return {
        name: (path, layer)
        for name, (path, layer) in layers.items()
        if isinstance(layer, LoraLayer) and adapter in layer.r
    }


def _below(weights: dict[str, Tensor], path: str) -> list[tuple[str, Tensor]]:
    return [(name[len(path) + 1 :], weight) for name, weight in weights.items() if name.startswith(f"{path}.lora_")]


def loads_adapters(pipeline: Any) -> bool:
    """Say whether a pipeline reads the adapters of its transformer with `load_lora_weights`."""
    save = getattr(pipeline, "save_lora_weights", None)
    return save is not None and "transformer_lora_layers" in signature(save).parameters


def _write(model: Any, part: str, weights: dict[str, Tensor], config: LoraConfig, folder: Path) -> None:
    if part == "painter" and loads_adapters(model.pipeline):
        model.pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=weights,
            transformer_lora_adapter_metadata=config.to_dict(),  # without it, alpha is lost
        )
        return
    named = {f"base_model.model.{name}": weight for name, weight in weights.items()}
    save_file(named, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def _config_of(
    model: Any, part: str, adapted: dict[str, tuple[str, LoraLayer]], config: LoraConfig, adapter: str
) -> LoraConfig:
    """Write the configuration of one part's adapters: its layers by name, and the rank and alpha of each."""
    layers = {name: layer for name, (_, layer) in adapted.items()}
    config = copy.deepcopy(config)
    config.target_modules = set(layers)
    config.rank_pattern = {name: layer.r[adapter] for name, layer in layers.items() if layer.r[adapter] != config.r}
    config.alpha_pattern = {
        name: layer.lora_alpha[adapter]
        for name, layer in layers.items()
        if layer.lora_alpha[adapter] != config.lora_alpha
    }
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = config.modules_to_save = None
    config.task_type = "CAUSAL_LM" if part == "thinker" else None
    config.base_model_name_or_path = model.config.sources.get(part)
    config.inference_mode = True
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
    size, system = painting["image_size"], painting.get("system_prompt", model.config.system_prompt)
    arguments = {**model.painter_arguments, "height": size, "width": size}
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
    if adapted and loads_adapters(model.pipeline):
        # Without the file's name diffusers takes any other of a local folder for it.
        where = f'subfolder="{ADAPTERS}/painter", weight_name="{LORA_WEIGHT_NAME_SAFE}"'
        yield f'pipeline.load_lora_weights("{source}", {where})'
    elif adapted:
        wrapped = f'PeftModel.from_pretrained(pipeline.transformer, "{source}", subfolder="{ADAPTERS}/painter")'
        yield f"pipeline.transformer = {wrapped}.get_base_model()"
