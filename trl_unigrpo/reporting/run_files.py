"""
The files of a run for its galleries: `<output_dir>/gallery/`, read back by the page and by `trl-unigrpo report`.

    run.json           what is trained, with which settings
    records.jsonl      one JSON object a line, only ever added to: starts, logged metrics, shown generations, the end
    images/*.jpg       what the generations' lines name

A crash loses at most the line that was being written. A run that is resumed adds a line "start" at its step, and a
reader then forgets what the interrupted one wrote after that step.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ..monitoring.alarm import ALARMS_FILE
from ..monitoring.files import replace_file


FOLDER = "gallery"


@dataclass(frozen=True)
class ShownRound:
    """
    One round of a trajectory that has several.

    Attributes:
        text: that was sampled.
        reward: of the image that stands after it, None where it has none.
        advantage: of its text and image.
        kept: whether it kept the image that it began with.
        image: file of the image that it painted, in the folder `gallery`; None where it painted none.
        origin: index of the sample whose image it began with, where that is another one's.
        begun: file of that image.
        asked: the user's turn that the round answers, in a story.
    """

    text: str
    reward: float | None
    advantage: float
    kept: bool = False
    image: str | None = None
    origin: int | None = None
    begun: str | None = None
    asked: str = ""


@dataclass(frozen=True)
class ShownSample:
    """
    One trajectory of a shown generation.

    Attributes:
        index: its place in the generation batch, which alarms name.
        reward: weighted sum of the rewards, None where it has none.
        rewards: function -> its value.
        extra: what reward functions logged about it, such as a judge's answers.
        image: file in the folder `gallery`; None where only the numbers were kept.
        sources: files of the images that it edits.
        rounds: where there are several.
    """

    index: int
    prompt: str
    thinking: str
    reward: float | None
    advantage: float
    rewards: Mapping[str, float | None]
    extra: Mapping[str, Any]
    image: str | None = None
    sources: Sequence[str] = ()
    rounds: Sequence[ShownRound] = ()

    @property
    def files(self) -> list[str]:
        """All its images."""
        of_rounds = [name for part in self.rounds for name in (part.begun, part.image)]
        return [name for name in dict.fromkeys([*self.sources, *of_rounds, self.image]) if name is not None]


@dataclass(frozen=True)
class Shown:
    """
    A generation batch in the gallery.

    Attributes:
        step: optimizer steps before it.
        mode: "train" or "eval".
        dataset: name of the evaluation's dataset, "" if it has none.
        group_size: samples per prompt, which lie side by side.
        total: samples in the batch, of which `samples` are shown.
        side: pixels of its images' longer side, as they are kept.
    """

    step: int
    mode: str
    dataset: str
    group_size: int
    total: int
    side: int
    samples: Sequence[ShownSample]

    @property
    def groups(self) -> list[list[ShownSample]]:
        """The samples of each prompt, the best first."""
        size = self.group_size
        groups = [self.samples[start : start + size] for start in range(0, len(self.samples), size)]
        return [sorted(group, key=_rank, reverse=True) for group in groups]


def _rank(sample: ShownSample) -> tuple[float, float]:
    return -math.inf if sample.reward is None else sample.reward, sample.advantage


@dataclass(frozen=True)
class GivenAlarm:
    """
    An alarm that was given: at a step, about the samples of these indices of its generation batch.

    Attributes:
        mode: "train" or "eval", what the indices count samples of.
        stopped: whether it stopped the run.
    """

    step: int
    name: str
    message: str
    indices: Sequence[int] = ()
    mode: str = "train"
    stopped: bool = False


@dataclass
class Run:
    """
    A run, as far as its folder tells.

    Attributes:
        info: of run.json; empty without one.
        metrics: one per log, each with "step".
        shown: generations in the order of their steps, training and evaluation.
        finished: whether training came to its end.
        problems: what could not be read.
    """

    folder: Path
    info: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)
    alarms: list[GivenAlarm] = field(default_factory=list)
    finished: bool = False
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def step(self) -> int:
        return max([0, *(row["step"] for row in self.metrics), *(shown.step for shown in self.shown)])


class NoRunError(ValueError):
    """A folder holds no run."""


class Records:
    """
    The lines of `gallery/records.jsonl`, which are only ever added to.

    Args:
        output_dir: of the run.
        session: tells the lines of this process from those of an earlier one that wrote into the same folder.
    """

    def __init__(self, output_dir: str | Path, session: str):
        self.folder, self.session = Path(output_dir) / FOLDER, session
        self._file: TextIO | None = None

    def info(self, info: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.folder / "run.json", json.dumps(json_value(info), indent=2) + "\n")

    def add(self, kind: str, step: int, **values: Any) -> None:
        """Write a line, whole and at once."""
        line = json.dumps(json_value({"kind": kind, "step": step, "session": self.session, **values}))
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.folder / "records.jsonl"
            torn = file.is_file() and not file.read_bytes().endswith(b"\n")
            self._file = file.open("a", encoding="utf-8")
            self._file.write("\n" if torn else "")  # a line that a crash cut off must not swallow this one
        self._file.write(line + "\n")
        self._file.flush()

    def show(self, shown: Shown, files: Mapping[str, bytes]) -> None:
        """Write a generation: the images (file in the folder -> JPEG), then the line that names them."""
        for name, jpeg in files.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(jpeg)
        values = asdict(shown)
        for sample in values["samples"]:
            for name in ("sources", "rounds"):  # most runs have neither
                if not sample[name]:
                    del sample[name]
        self.add("shown", values.pop("step"), **values)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def json_value(value: Any) -> Any:
    """The value as JSON has it: numbers that are not finite become null, what JSON does not know its text."""
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [json_value(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        return str(value)
    return number if math.isfinite(number) else None


def read_run(folder: str | Path) -> Run:
    """
    Read what a folder tells of its run, whether that is finished, still going on, or broke off.

    Reads `gallery/`; without one the logs in the newest `trainer_state.json`, of the folder or of its checkpoints.

    Raises:
        NoRunError: if there is neither.
    """
    run = Run(Path(folder))
    if not run.folder.is_dir():
        raise NoRunError(f"{folder} is not a folder: expected the output_dir of a training run.")
    records = run.folder / FOLDER / "records.jsonl"
    if records.is_file():
        _read_records(run, records)
    if not run.metrics and (state := newest_state(run.folder)) is not None:
        _read_state(run, state)
    elif not records.is_file():
        raise NoRunError(
            f"{folder} holds no run: expected {FOLDER}/records.jsonl, or trainer_state.json in it or in one of its "
            "checkpoints. Give the output_dir of a training run."
        )
    info = run.folder / FOLDER / "run.json"
    if info.is_file():
        try:
            run.info = dict(json.loads(info.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            run.problems.append(f"{FOLDER}/run.json: {error}")
    alarms = run.folder / ALARMS_FILE
    for number, row in _json_lines(alarms, run.problems) if alarms.is_file() else ():
        try:
            indices = [int(i) for i in row["indices"]]
            given = GivenAlarm(int(row["step"]), row["alarm"], row["message"], indices, row["mode"], row["stopped"])
            run.alarms.append(given)
        except (KeyError, TypeError, ValueError) as error:
            run.problems.append(f"{ALARMS_FILE}, line {number}: {type(error).__name__} {error}")
    return run


def _read_records(run: Run, file: Path) -> None:
    rows: list[tuple[int, dict[str, Any]]] = []
    for number, row in _json_lines(file, run.problems):
        if not isinstance(row.get("step"), int) or not isinstance(row.get("kind"), str):
            run.problems.append(f"{file.name}, line {number}: no step or no kind.")
            continue
        if row["kind"] == "start":
            rows = [
                (n, old)
                for n, old in rows
                if old.get("session") == row.get("session") or (0 < row["step"] >= old["step"] and not _sums_up(old))
            ]
            run.finished = False
        run.finished = run.finished or row["kind"] == "end"
        rows.append((number, row))
    latest: dict[tuple[int, str, str], Shown] = {}
    for number, row in rows:
        if row["kind"] == "metrics":
            run.metrics.append({"step": row["step"], **(row.get("values") or {})})
        elif row["kind"] == "shown":
            try:
                shown = _shown(row)
            except (KeyError, TypeError) as error:
                run.problems.append(f"{file.name}, line {number}: {type(error).__name__} {error}")
                continue
            latest[shown.step, shown.mode, shown.dataset] = shown
    run.shown = sorted(latest.values(), key=lambda shown: shown.step)


def _sums_up(row: Mapping[str, Any]) -> bool:
    """Say whether a line is what a run logs when it ends: a run that goes on has not ended there."""
    return "train_runtime" in (row.get("values") or {})


def _shown(row: Mapping[str, Any]) -> Shown:
    samples = [
        ShownSample(**{**sample, "rounds": [ShownRound(**part) for part in sample.get("rounds", ())]})
        for sample in row["samples"]
    ]
    names = ("step", "mode", "dataset", "group_size", "total", "side")
    return Shown(**{name: row[name] for name in names}, samples=samples)


def _json_lines(file: Path, problems: list[str]) -> Iterable[tuple[int, dict[str, Any]]]:
    """Yield number and object of each line; name what can't be read, but for a last line that is being written."""
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"{type(row).__name__} instead of an object")
        except ValueError as error:
            if number < len(lines):
                problems.append(f"{file.name}, line {number}: {error}")
            continue
        yield number, row


def newest_state(folder: Path) -> Path | None:
    """Find `trainer_state.json` of the folder, or of its newest checkpoint."""
    if (folder / "trainer_state.json").is_file():
        return folder / "trainer_state.json"
    steps = {
        int(file.parent.name.removeprefix("checkpoint-")): file
        for file in folder.glob("checkpoint-*/trainer_state.json")
        if file.parent.name.removeprefix("checkpoint-").isdecimal()
    }
    return steps[max(steps)] if steps else None


def _read_state(run: Run, file: Path) -> None:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        run.metrics = [dict(row) for row in state["log_history"]]
        run.finished = 0 < state["max_steps"] <= state["global_step"]
    except (ValueError, KeyError, TypeError) as error:
        raise NoRunError(
            f"{file} can't be read ({type(error).__name__}: {error}): it is damaged. Give a folder whose "
            "trainer_state.json is whole, such as an earlier checkpoint."
        ) from error
