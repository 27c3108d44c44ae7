"""The model card of a trained model."""

import re
from pathlib import Path
from typing import Any

from .models.auto import unified_model


QUICK_START = """## Quick start

```python
from trl_unigrpo.evaluation import generate
from trl_unigrpo.models import load_unified_model

model = load_unified_model("{source}")
sample = generate(model, prompts=["A red cube on a blue table"])[0]
print(sample.thinking)
sample.image.save("image.png")
```

"""


def rewrite_quick_start(readme: Path, source: str, example: str | None = None) -> None:
    """Replace the text-generation example of TRL's model card by one that paints, the model's own if it has one."""
    if not readme.is_file():
        return
    card = readme.read_text(encoding="utf-8")
    section = example or QUICK_START.format(source=source)
    readme.write_text(
        re.sub(r"## Quick start\n.*?(?=\n## )", lambda _: section, card, flags=re.DOTALL),
        encoding="utf-8",
    )


def base_models(model: Any) -> list[str]:
    """Names of the models that it was made of: its own, or those of a pipeline's parts."""
    config = unified_model(model).config
    sources = getattr(config, "sources", None) or {}
    names = [getattr(config, "_name_or_path", ""), *sources.values()]
    return list(dict.fromkeys(name for name in names if name))
