"""The model card of a trained model: TRL's, with images, rewards, settings, and an example that paints."""

import re
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from ..flow.guidance import Guidance
from ..flow.per_round import of_round
from ..image_sizes import plain_size
from ..models.registry import unified_model
from ..sampling import generate
from .description import (
    base_models,
    is_folder,
    short_name,
    shown_settings,
    trained_parameters,
)
from .pages import readable
from .run_files import (
    FOLDER,
    NoRunError,
    Run,
    ShownSample,
    read_run,
)
from .run_summary import change, evaluations
from .trackers import grid


PACKAGE_QUICK_START = """## Quick start

```python
{imports}

{loading}
sample = generate(model, ["A red cube on a blue table"], {arguments})[0]
print(sample.thinking)
sample.image.save("image.png")
```

"""
CARD_IMAGE = "before_after.jpg"
CARD_COLUMNS = 6  # prompts in the image of the card


def rewrite_card(
    readme: Path, model: Any, args: Any, step: int, rewards: Mapping[str, float], process: Sequence[str], source: str
) -> None:
    """
    Turn the card that TRL wrote into one of a model that paints; its metadata, links to trackers and citations stay.

    Args:
        readme: the card; the image goes beside it, made from the gallery there.
        rewards: function -> weight.
        process: those of them that score the thinking alone.
        source: where others will load the model from.
    """
    if not readme.is_file():
        return
    card = ModelCard(readme.read_text(encoding="utf-8"))
    sections = _sections(card.text)
    try:
        run = read_run(readme.parent)
    except NoRunError:
        run = Run(readme.parent)
    bases = base_models(model)
    on_hub = [name for name in bases if not is_folder(name)]
    data: Any = card.data
    data.base_model = on_hub[0] if len(on_hub) == 1 else on_hub or None
    data.pipeline_tag = "text-to-image"
    own, painting = unified_model(model), painting_of(args)
    environment = Environment(
        loader=PackageLoader("trl_unigrpo.reporting"),
        autoescape=False,  # Markdown: what comes from outside goes through `_code`
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template("model_card.md.jinja").render(
        model_name=data.model_name or readme.resolve().parent.name,
        model_class=type(own).__name__,
        bases=[{"name": _code(short_name(name)), "link": name in on_hub} for name in bases],
        paper_id="2603.23500",
        trained=trained_parameters(model),
        step=step,
        image=_image(run, readme.parent),
        quick_start=own.quick_start(source, painting) or package_quick_start(model, source, painting),
        rewards=[
            {"name": _code(name), "weight": f"{weight:g}", "note": " (of the thinking)" * (name in process)}
            for name, weight in rewards.items()
        ],
        change=change(run),
        alarms=len(run.alarms or []),
        training=sections.get("Training procedure", "## Training procedure\n"),
        settings=shown_settings(args),
        framework=sections.get("Framework versions", ""),
        citations=sections.get("Citations", ""),
    )
    card.text = re.sub(r"\n{3,}", "\n\n", text)
    card.save(readme)


def painting_of(args: Any) -> dict[str, Any]:
    """
    Choose the arguments of `generate` that paint as in training, in the size of evaluation; of most only those that
    are not its own.
    """
    own = signature(generate).parameters
    others = ("thinking", "system_prompt", "temperature", "timestep_shift")
    names = ["num_inference_steps", "max_completion_length"]
    names += [name for name in others if getattr(args, name) != own[name].default]
    painting = {"image_size": plain_size(args.sizes(training=False)[0])}
    painting |= {name: of_round(args, name, 0) for name in names}
    return painting | ({"guidance": Guidance(args.guidance_scale)} if args.guidance_scale > 1 else {})


def package_quick_start(model: Any, source: str, painting: Mapping[str, Any]) -> str:
    """Write an example that thinks and paints with this package; adapters are put on their base model by PEFT."""
    imports = ["from trl_unigrpo.evaluation import generate", "from trl_unigrpo.models import load_unified_model"]
    loading = f'model = load_unified_model("{source}")'
    adapters = getattr(model, "peft_config", None)
    if adapters:
        imports.insert(0, "from peft import PeftModel")
        base = (base_models(model) or ["the-base-model"])[0]
        revision = next(iter(adapters.values())).revision
        where = f'"{base}"' + (f', revision="{revision}"' if revision else "")
        loading = f'model = PeftModel.from_pretrained(load_unified_model({where}), "{source}")'
    if "guidance" in painting:
        imports.append("from trl_unigrpo.flow.guidance import Guidance")
    arguments = ", ".join(f"{name}={value!r}" for name, value in painting.items())
    return PACKAGE_QUICK_START.format(imports="\n".join(imports), loading=loading, arguments=arguments)


def _sections(text: str) -> dict[str, str]:
    """Split the card: title -> section with its title, of the second and third level, each without those below it."""
    parts = re.split(r"^(?=#{2,3} )", text, flags=re.MULTILINE)
    return {part.splitlines()[0].lstrip("# "): part.rstrip() + "\n" for part in parts if part.startswith("#")}


def _code(text: str) -> str:
    """Clean a text for `...` in Markdown: one line, at most 200 characters, without the marks that would end it."""
    return " ".join(readable(text).replace("`", "'").split())[:200]


def _image(run: Run, folder: Path) -> dict[str, Any] | None:
    """
    Write the images of the first evaluation above those of the last, or of the last generation; return file and title.
    """
    evaluated = next((shown for shown in evaluations(run).values() if len(shown) > 1), None)
    trained = [shown for shown in run.shown if shown.mode == "train"]
    if evaluated is not None:
        rows = [evaluated[0].samples, evaluated[-1].samples]
        title = f"Before training (above) and at step {evaluated[-1].step} (below), from the same noise"
        if evaluated[0].step:
            title = title.replace("Before training", f"At step {evaluated[0].step}")
    elif trained:
        rows, title = [trained[-1].groups[0]], f"A group of one prompt at step {trained[-1].step}, the best first"
    else:
        return None
    shown = [[sample for sample in row if sample.image is not None][:CARD_COLUMNS] for row in rows]
    images = [_opened(run, sample) for row in shown for sample in row]
    if not images or len({len(row) for row in shown}) > 1 or None in images:
        return None
    columns = len(shown[0])
    grid([image for image in images if image is not None], columns).save(folder / CARD_IMAGE, quality=85)
    prompts = list(dict.fromkeys(_code(sample.prompt) for sample in shown[0]))
    return {"file": CARD_IMAGE, "title": title, "prompts": prompts}


def _opened(run: Run, sample: ShownSample) -> Image.Image | None:
    try:
        with Image.open(run.folder / FOLDER / str(sample.image)) as image:
            return image.convert("RGB")
    except OSError:
        return None
