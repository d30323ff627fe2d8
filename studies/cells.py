"""A cell: one run of a study, with what it waits for and what its result rows are to say."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from studies.tuning import Candidate, Tuning

SCRATCH = "scratch"
Kind = Literal["pretrain", "trial", "transfer"]
KINDS: tuple[Kind, ...] = ("pretrain", "trial", "transfer")


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
