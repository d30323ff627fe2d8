"""Errors about data that tell a user what is wrong, where, what would be right and what to do next."""

import difflib
from collections.abc import Iterable, Sequence


def closest(value: object, candidates: Iterable[object]) -> str | None:
    """Return the candidate spelled most like `value`, or None where nothing is near."""
    names = [str(candidate) for candidate in candidates]
    folded = {name.casefold(): name for name in reversed(names)}
    match = difflib.get_close_matches(str(value).casefold(), folded, n=1, cutoff=0.5)
    return folded[match[0]] if match else None


def shorten(values: Sequence[object], limit: int = 12) -> str:
    """Join values for a message; beyond `limit` of them say how many more there are."""
    shown = ", ".join(str(value) for value in values[:limit])
    more = len(values) - limit
    return f"{shown}, ... ({more} more)" if more > 0 else shown


class DataError(ValueError):
    """A data set, table, file or data setting that cannot be used as asked. Ends the command with exit code 2.

    Args:
        problem: What is wrong, with the offending value.
        where: File and line, index, or the argument's name.
        valid: The values that would be accepted.
        hint: The next step.
    """

    exit_code = 2

    def __init__(
        self,
        problem: str,
        *,
        where: str | None = None,
        valid: Sequence[object] | str | None = None,
        hint: str | None = None,
    ) -> None:
        self.problem = problem
        lines = [problem]
        if where is not None:
            lines.append(f"  where: {where}")
        if valid is not None:
            lines.append(f"  valid: {valid if isinstance(valid, str) else shorten(valid)}")
        if hint is not None:
            lines.append(f"  next:  {hint}")
        super().__init__("\n".join(lines))


class UnreadableImageError(DataError):
    """An image file that exists but cannot be decoded, or is missing at first read."""
