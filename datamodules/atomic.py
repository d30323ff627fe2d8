"""Files that are replaced in one step: readers see the old file or the whole new one, never a part."""

import os
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it and rename it over `path`.

    The file is in the same folder because `os.replace` cannot cross filesystems.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a UTF-8 text file in one step."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline=""))


def clear_temporaries(path: Path) -> None:
    """Delete what killed processes left of `replace_file`; only where a lock says that nobody is writing `path`.

    Args:
        path: The file; its name may have wildcards: `shards/*.tar`.
    """
    for leftover in path.parent.glob(f".{path.stem}.*.tmp{path.suffix}"):
        leftover.unlink()
