"""What the files of one run tell of its cost: seconds a step, images, the disk that it keeps."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from datamodules.errors import DataError
from studies.cell_folder import CellFolder

Origin = Literal["finished", "running", "timed"]
TIMINGS = ".timings"  # folder of short timings (see `studies.timing`), in the study's
TAIL = 1 << 16  # bytes of a metrics file that are read


@dataclass(frozen=True)
class Record:
    """What a run tells of its cost.

    Attributes:
        origin: Whether it is finished, is running, or was a short timing.
        seconds: Of one training step.
        steps: Steps so far.
        batch: Images of a step.
        n_train: Training images; None where a running one does not tell.
        rest: Seconds of a whole run beside its training: start, evaluation; None where unknown.
        size: Bytes that its folder keeps; None where that is not known yet.
        device: What it ran on.
    """

    origin: Origin
    seconds: float
    steps: int
    batch: float
    n_train: int | None
    rest: float | None
    size: float | None
    device: str


def read_record(folder: CellFolder) -> Record | None:
    """What a run tells of its cost; None where it has not come to its second logged step."""
    with suppress(DataError, OSError, ValueError, TypeError, LookupError):  # half-written, or of another kind
        if not folder.path.is_dir():
            return None
        starts, lines = folder.run.read_starts(), last_lines(folder.run.metrics)
        device = str(starts[-1].get("device"))
        summary = folder.run.read_summary()
        run = summary.get("run") if summary.get("state") == "finished" else None
        if run is not None:
            # `step` of a run that selects the best weights is theirs, the last line's is the end.
            steps = max(int(run["step"]), *(int(line.get("step") or 0) for line in lines[-1:]), 1)
            rest = lines[-1]["time"] - _begun(starts[0]) - run["seconds"] if lines and len(starts) == 1 else None
            timed = folder.path.parent.name == TIMINGS
            seconds = (_between(lines) if timed else None) or run["seconds"] / steps
            batch, n_train = run["images_seen"] / run["step"], int(run["n_train"])
            if timed:
                return Record("timed", seconds, steps, batch, n_train, None, None, device)
            rest = None if rest is None else max(0.0, rest)
            return Record("finished", seconds, steps, batch, n_train, rest, _size(folder), device)
        own = [line for line in lines if line["time"] >= _begun(starts[-1])]  # not the time that it lay still
        seconds_running = _between(own)
        if seconds_running is not None:
            batch = yaml.safe_load((folder.path / "config.yaml").read_text())["data"]["init_args"]["batch_size"]
            steps = int(own[-1]["step"])
            return Record("running", seconds_running, steps, batch, _recorded(folder), None, None, device)
    return None


def last_lines(path: Path) -> list[dict[str, Any]]:
    """The last lines of a run's metrics, without one that is cut off; empty where there is none yet."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError, TypeError):
            found.append(dict(json.loads(line)))
    return found


def last_metrics(path: Path) -> dict[str, Any]:
    """The last line of a run's metrics; empty where there is none yet."""
    return next(iter(last_lines(path)[-1:]), {})


def _between(lines: list[dict[str, Any]]) -> float | None:
    """Seconds a step between the first and the last line of training, or None."""
    points = [(line["step"], line["time"]) for line in lines if "train/loss" in line]
    steps = points[-1][0] - points[0][0] if points else 0
    return (points[-1][1] - points[0][1]) / steps if steps > 0 else None


def _begun(start: Mapping[str, Any]) -> float:
    return datetime.strptime(str(start["time"]), "%Y-%m-%dT%H:%M:%S%z").timestamp()


def _recorded(folder: CellFolder) -> int | None:
    """Training images of a run that runs, from its record of them; not where it lists those behind its weights, too."""
    import pyarrow.parquet as pq

    config = yaml.safe_load((folder.path / "config.yaml").read_text())
    path = folder.path / "training_images.parquet"
    bare = not (config["model"].get("init_args") or {}).get("weights")
    return int(pq.read_metadata(path).num_rows) if bare and path.is_file() else None


def _size(folder: CellFolder) -> float:
    return float(sum(path.stat().st_size for path in folder.path.rglob("*") if path.is_file()))
