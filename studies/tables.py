"""Tables of results as CSV, as LaTeX with booktabs, and as the text of cells."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from datamodules.atomic import write_text
from studies.results import write_csv

Side = Literal["left", "right"]

MISSING = "–"
#: A cell that reads as a number: a sign or a bound, then digits ("−2.0", "< 0.001", "41.6 ± 2.9", "+3 [1, 5]").
NUMBER = re.compile(r"[<>≤≥]?\s*[+\-−]?\.?\d")

# pdfLaTeX stops at signs beyond its encodings, so those that results hold are written as mathematics.
LATEX = str.maketrans(
    {
        **{letter: f"\\{letter}" for letter in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "−": "$-$",
        "–": "--",
        "×": r"$\times$",
        "·": r"$\cdot$",
        "→": r"$\to$",
        "≤": r"$\leq$",
        "≥": r"$\geq$",
        "≈": r"$\approx$",
        "α": r"$\alpha$",
        "β": r"$\beta$",
        "ρ": r"$\rho$",
        "σ": r"$\sigma$",
        "τ": r"$\tau$",
        "Δ": r"$\Delta$",
    }
)


def write_table(frame: pd.DataFrame, path_stem: Path | str, caption: str) -> tuple[Path, Path]:
    """Write `<path_stem>.csv`, with exact values, and `.tex`, with the text of the cells; return both paths."""
    csv, tex = Path(f"{path_stem}.csv"), Path(f"{path_stem}.tex")
    write_csv(frame, csv)
    write_text(tex, to_latex(frame, caption))
    return csv, tex


def to_latex(frame: pd.DataFrame, caption: str, sides: Mapping[str, Side] | None = None) -> str:
    """A table of booktabs; every text is escaped, indented lines stay indented.

    Args:
        frame: The table; its index is left out.
        caption: Text above it.
        sides: Column → where its cells stand, instead of `alignment`.
    """
    columns = "".join(side[0] for side in alignment(frame, sides))
    text: str = (
        cell_text(frame)
        .map(escape_latex)
        .rename(columns=lambda name: escape_latex(str(name)))
        .to_latex(index=False, escape=False, caption=escape_latex(caption), column_format=columns)
    )
    return f"% \\usepackage{{booktabs}}\n{text}"


def escape_latex(text: str) -> str:
    """Text as LaTeX prints it, on one line; spaces at its start become an indent."""
    inner = " ".join(text.split())
    start = r"\quad " if text.startswith(" ") else "{}" if inner.startswith("[") else ""  # "\\" takes [ for its option
    return start + inner.translate(LATEX)


def cell_text(frame: pd.DataFrame) -> pd.DataFrame:
    """What a reader sees of each cell: text as it is, reals with four digits, a dash where a value is missing."""
    return frame.astype(object).map(_text)


def alignment(frame: pd.DataFrame, sides: Mapping[str, Side] | None = None) -> list[Side]:
    """Where the cells of each column stand: numbers right, others and the first column left, or as `sides` says."""
    text = cell_text(frame)
    found: list[Side] = []
    for place, name in enumerate(text.columns):
        cells = [cell for cell in text.iloc[:, place] if cell not in ("", MISSING)]
        numbers = place > 0 and all(map(NUMBER.match, cells))
        found.append((sides or {}).get(name, "right" if numbers else "left"))
    return found


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return MISSING
    if isinstance(value, float):
        whole = math.isfinite(value) and abs(value) >= 10_000
        return (f"{value:,.0f}" if whole else f"{value:.4g}").replace("-", "−")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        return f"{value:,}".replace("-", "−")
    return str(value)
