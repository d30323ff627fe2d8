"""A cell: one run of a study, with what it waits for and what its result rows are to say."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from studies.runs import hash_of

if TYPE_CHECKING:
    from studies.tuning import Candidate, Tuning

SCRATCH = "scratch"
Kind = Literal["pretrain", "trial", "transfer"]
KINDS: tuple[Kind, ...] = ("pretrain", "trial", "transfer")
LONGEST = 180  # bytes of a name's words: a folder's name holds 255, with what is added when a run is replaced
PIECES, PIECE = 64, 1 << 16  # of a weights file that tell it from others, bytes


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        name: Readable, unique, and with a hash of all that decides the result: the run folder's name.
        kind: pretrain, transfer, or trial: a run that helps to choose a transfer's settings and never sees test images.
        config: The run's configuration; weights of a cell and settings chosen by trials are filled in when it runs.
        columns: Result-row columns that the study decides.
        needs: Cells that are finished before it starts.
        weights: The one of them whose weights it starts from, or None.
        tuning: How its settings are chosen, or None.
        candidates: The settings to choose from, each with its trials.
    """

    name: str
    kind: Kind
    config: dict[str, Any]
    columns: dict[str, Any]
    needs: tuple[str, ...] = ()
    weights: str | None = None
    tuning: "Tuning | None" = None
    candidates: tuple["Candidate", ...] = ()


def cell_name(words: list[str], decides: Mapping[str, Any]) -> str:
    """A run folder's name: words that fit into one, and a hash of all that decides the result."""
    text = re.sub(r"^\.|[/\\\x00-\x1f]", "_", "-".join(words))  # hidden folders hold no results
    short = text.encode()[:LONGEST].decode(errors="ignore")
    return f"{short}-{hash_of(decides)[:8]}"


def content_of(weights: str) -> str:
    """What given weights are, wherever they lie: a run by what decided it, a file by its bytes, a name by itself.

    A file is told from others by its size and 64 pieces of it: all of it would take seconds for the largest networks.
    """
    path = Path(weights)
    path = path / "identity.json" if path.is_dir() else path
    if not path.is_file():
        return weights
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with path.open("rb") as file:
        for piece in range(PIECES):
            file.seek(piece * max(size - PIECE, 0) // (PIECES - 1))
            digest.update(file.read(PIECE))
    return digest.hexdigest()
