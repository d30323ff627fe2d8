"""Result tables that papers published, as package data; README.md beside them: origin, licence, caveats."""

from importlib.resources import files

import pandas as pd

from datamodules.errors import DataError, closest


def names() -> list[str]:
    """Names that `load` knows."""
    return sorted(file.name.removesuffix(".csv") for file in files(__name__).iterdir() if file.name.endswith(".csv"))


def load(name: str) -> pd.DataFrame:
    """Read a published table as it is: the file's columns and values, one row a run or a best-of-grid cell.

    Args:
        name: "cherti2022" (arXiv 2106.00116, values in [0, 1]) or "entezari2023" (arXiv 2302.13602, in percent).

    Returns:
        The table, with numbers as numbers and shots ("1", "5", ..., "full") as text.

    Raises:
        DataError: For a name that no table has.
    """
    known = names()
    if name not in known:
        near = closest(name, known)
        raise DataError(
            f"no published results are called {name!r}",
            where="studies.published.load",
            valid=known,
            hint=f"did you mean {near!r}?" if near else None,
        )
    text = dict.fromkeys(("shots", "shot"), str)
    with files(__name__).joinpath(f"{name}.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file, dtype=text, float_precision="round_trip")
