"""`trl-unigrpo merge`: adapters and the model below them as one model, which loads without PEFT."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from ..evaluation.options import BaseOptions
from .options import told_in_a_line


@dataclass(frozen=True)
class MergeOptions:
    """The adapters, and the merged model's folder and dtype."""

    adapters: Annotated[str, typer.Argument(help="Folder of adapters: a run's output folder, or one checkpoint.")]
    output: Annotated[Path, typer.Argument(help="Folder for the merged model; a new or an empty one.")]
    dtype: Annotated[
        str, typer.Option(help="Of the merged weights: float32, bfloat16 or float16; auto for the base's own.")
    ] = "auto"


def merge_command(options: MergeOptions, base: BaseOptions) -> None:
    """Write a model with its adapters folded in, for from_pretrained, eval --model and train --model_name_or_path."""
    with told_in_a_line("merge", ValueError, TypeError, OSError, ImportError):
        parts, dtype = merge_adapters(options, base)
    typer.echo(f"{options.output}: {options.adapters} merged into {' + '.join(parts)}, in {dtype}.")


def merge_adapters(options: MergeOptions, base: BaseOptions) -> tuple[list[str], str]:
    """
    Write the merged model and its tokenizer.

    Returns:
        The names of the models below the adapters, and the dtype of the merged weights.

    Raises:
        OSError, ValueError: before weights are loaded, if there are no adapters, no base or one that is quantised, or
            if the output folder is not empty.
    """
    from ..evaluation.models import ADAPTER, is_adapter, load_model, parts_of, stored_dtype

    with new_folder(options.output.resolve()) as folder:
        if not is_adapter(options.adapters):
            raise ValueError(
                f"{options.adapters!r} holds no adapters ({ADAPTER} is missing): pass the output folder of a run with "
                "adapters, or one of its checkpoints."
            )
        parts = parts_of(options.adapters, **vars(base))
        below = [part for name, part in parts.items() if name != "source"]
        stored = stored_dtype(below)
        dtype = stored if options.dtype == "auto" else options.dtype
        model, tokenizer = load_model(options.adapters, dtype=dtype, device="cpu", **vars(base))
        merged = model.merge_and_unload(safe_merge=True)  # which refuses adapters with numbers that are none
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return below, dtype


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """
    Give a path to write a folder at; it gets its own name when all is written, so that no part passes for a model.

    Raises:
        FileExistsError: if there is something else than an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{str(folder)!r} is not empty: nothing is overwritten. Pass another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as part:
        yield Path(part) / folder.name
        if folder.is_dir():
            folder.rmdir()
        (Path(part) / folder.name).rename(folder)
