"""Checkpoints that are whole: each gets its name when all of it is written, and a run goes on from no other.

A folder that is not whole is still met: where the machine lost power, a copy was cut off or a disk was full.
"""

import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainerControl, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints


UNFINISHED = "_unfinished"
"""Folder of a checkpoint that is being written. What begins so, Trainer's uploads leave out."""

_ROOM = "Make room there (`save_total_limit` keeps fewer checkpoints), or take another `output_dir`"
_WRITABLE = "Make it writable, or take another `output_dir`"
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _ROOM),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST), _WRITABLE),
    errno.ENOENT: "Put it back where it was",
    errno.EIO: "Look after the disk",
}
"""Remedies for errors of the file system, by their number."""


class WholeCheckpoints(Trainer):
    """The hooks of transformers' `Trainer` that write checkpoints, and choose the one to go on from."""

    control: TrainerControl

    _saving = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Train as `Trainer` does.

        Raises:
            ValueError: if there is no checkpoint to resume from, or it is not whole.
            OSError: if a file can't be written or read, with what to do about it.
        """
        output = self.args.output_dir
        if resume_from_checkpoint is True:
            resume_from_checkpoint = _newest(output)
        elif resume_from_checkpoint:
            _check(resume_from_checkpoint)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except OSError as error:
            if error.errno not in REMEDIES:
                raise
            newest = next((folder for folder in checkpoints(output) if fault_of(folder) is None), None)
            kept = "No checkpoint had been saved yet" if newest is None else f"{newest} is whole"
            how = "`train()`" if newest is None else "`train(resume_from_checkpoint=True)`"
            problem = f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
            raise OSError(
                error.errno,
                f"Training ended after step {self.state.global_step}. {problem}. {kept}. {REMEDIES[error.errno]}, and "
                f"go on with {how}.",
            ) from error

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._saving else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saving:  # it is not whole yet, and would be gone before the upload ends
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        args, run = self.args, Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        begun, whole = run / UNFINISHED / name, run / name
        self._once_per_disk(partial(shutil.rmtree, begun.parent, ignore_errors=True))
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
            self._add_to_checkpoint(begun)
            best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if self.state.best_global_step and (best == whole or best.is_dir()):
                self.state.best_model_checkpoint = str(best)
            if args.should_save:
                self.state.save_to_json(str(begun / TRAINER_STATE_NAME))  # with the best one's final name
        except (OSError, RuntimeError, SafetensorError) as error:
            failed = _of_disk(error, begun)
            if failed is None:
                raise
            shutil.rmtree(begun.parent, ignore_errors=True)  # room for what else is written
            raise failed from None if failed is error else error
        finally:
            self._saving = False
        self._once_per_disk(partial(_finish, begun, whole))
        if args.push_to_hub:
            self._push_from_checkpoint(str(whole))
        if args.should_save:
            _drop_oldest(run, args.save_total_limit, self.state.best_model_checkpoint)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        if self.args.should_save:  # a kill after the last checkpoint had its name has left this to do
            run, best = Path(self._get_output_dir(trial)), self.state.best_model_checkpoint
            _drop_oldest(run, self.args.save_total_limit, best)
        return super()._finalize_training(trial, *args, **kwargs)

    def save_unsaved(self) -> None:
        """Save the steps since the last checkpoint, where a run that has them must end and is one process."""
        step, args = self.state.global_step, self.args
        whole = Path(self._get_output_dir(None)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if args.save_strategy != "no" and args.world_size == 1 and step and not whole.is_dir():
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(args, self.state, self.control)

    def _add_to_checkpoint(self, folder: Path) -> None:
        """Write what a trainer keeps in a checkpoint beside what `Trainer` does."""

    def _once_per_disk(self, work: Callable[[], None]) -> None:
        """Do it in the first process, then in the first of each machine, which may have a disk of its own."""
        self.accelerator.wait_for_everyone()
        for chosen in (self.args.process_index == 0, self.args.local_process_index == 0):
            if chosen:
                work()
            self.accelerator.wait_for_everyone()


def _finish(begun: Path, whole: Path) -> None:
    """Give a checkpoint its name. One of that name is from before the run went back."""
    if begun.is_dir():
        with suppress(FileNotFoundError):
            whole.rename(begun.parent / "replaced")
        begun.rename(whole)
        shutil.rmtree(begun.parent, ignore_errors=True)


def _drop_oldest(run: Path, limit: int | None, best: str | None) -> None:
    """
    Delete a run's oldest checkpoints but the best and the newest, as transformers' `rotate_checkpoints` does: but take
    their names first. One that a kill left half deleted would be the last that was changed, which is the newest to it.
    """
    ordered = sort_checkpoints(str(run), use_mtime=True)
    spared = {*ordered[-1:], best} & set(ordered)
    old = [folder for folder in ordered if folder not in spared]
    surplus = len(ordered) - max(limit, len(spared)) if limit and limit > 0 else 0
    for folder in map(Path, old[: max(0, surplus)]):
        gone = run / UNFINISHED / f"old-{folder.name}"
        gone.parent.mkdir(exist_ok=True)
        folder.rename(gone)
    shutil.rmtree(run / UNFINISHED, ignore_errors=True)


def _of_disk(error: Exception, folder: Path) -> OSError | None:
    """Tell the error of the file system behind one that was met while saving; None if there is none."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"os error (\d+)", str(error))  # of safetensors
    if number is None and not re.search("PytorchStreamWriter|unexpected pos|iostream error", str(error)):
        return None
    code = int(number[1]) if number else errno.ENOSPC  # torch does not say what it was
    return OSError(code, os.strerror(code), str(folder))


def check_writable(args: TrainingArguments) -> None:
    """Raise OSError if there will be checkpoints that can't be written: a run would find out at the first of them."""
    folder = args.output_dir
    if args.save_strategy == "no":
        return
    place = Path(folder).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        code = errno.ENOTDIR
    elif not os.access(place, os.W_OK | os.X_OK):
        code = errno.EACCES
    else:
        return
    raise OSError(code, f"output_dir={folder!r} can't be written to: {os.strerror(code)}: {place}. {_WRITABLE}.")


def checkpoints(folder: str | Path) -> list[Path]:
    """Find a run's checkpoints, the newest first."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    found = [one for one in Path(folder).glob(f"{prefix}*") if one.name.removeprefix(prefix).isdecimal()]
    return sorted(found, key=lambda one: int(one.name.removeprefix(prefix)), reverse=True)


def fault_of(checkpoint: Path) -> str | None:
    """Say by what a checkpoint shows that it is not whole; None if it shows nothing."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {TRAINER_STATE_NAME}"
    except ValueError:
        return f"{TRAINER_STATE_NAME} is cut off"
    for file in sorted(checkpoint.rglob("*")):
        if file.suffix == ".safetensors":
            try:
                safe_open(file, "pt")
            except SafetensorError as error:
                return f"{file.name} is cut off ({error})"
        elif file.suffix in (".pt", ".pth") and not is_zipfile(file):
            return f"{file.name} is cut off"
    return None


def _newest(output: str) -> str:
    """Find the newest checkpoint that is whole for all processes, and warn of later ones."""
    folders = checkpoints(output)
    found = {folder.name: fault_of(folder) for folder in folders}
    passed = [f"{one}: the run ended while it was written" for one in checkpoints(Path(output) / UNFINISHED)]
    everywhere: list[dict[str, str | None]] = gather_object([found])
    for folder in folders:
        faults = [own.get(folder.name, "a process does not see it") for own in everywhere]
        fault = next(filter(None, faults), None)
        if fault is None:
            if passed:
                warnings.warn(f"Training goes on from {folder}. Not whole, and passed over: {'; '.join(passed)}.")
            return str(folder)
        passed.append(f"{folder}: {fault}")
    what = f" ({'; '.join(passed)})" if passed else ""
    raise ValueError(
        f"resume_from_checkpoint=True, but {output} holds no whole checkpoint{what}. Train without it, or name a "
        "checkpoint's folder."
    )


def _check(checkpoint: str | bool) -> None:
    """Raise ValueError if a checkpoint that was named is not whole for all processes."""
    fault = next(filter(None, gather_object([fault_of(Path(str(checkpoint)))])), None)
    if fault is not None:
        raise ValueError(
            f"resume_from_checkpoint={str(checkpoint)!r} is not a whole checkpoint: {fault}. Name an earlier one, or "
            "say True for the newest that is whole."
        )
