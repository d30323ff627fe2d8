"""Published weights by name: what `known_weights.yaml` says of them, and their download, verified and in one step."""

import errno
import functools
import hashlib
import os
import shlex
import time
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import yaml

from datamodules.atomic import replace_file, write_text
from datamodules.errors import DataError, closest

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

TABLE = Path(__file__).with_name("known_weights.yaml")
FOLDER = Path("weights")
TIMEOUT = 30  # seconds without a byte
RETRIES = 3  # in a row without a byte
PAUSE = 1.0  # seconds before the first of them; the next ones wait longer
_CHUNK = 1 << 20
_LOCAL = {getattr(errno, name) for name in "EACCES EPERM EROFS ENOSPC EDQUOT ENOENT EEXIST ENOTDIR".split()}


@dataclass(frozen=True, kw_only=True)
class KnownWeights:
    """One entry of `known_weights.yaml`, which describes the fields."""

    name: str
    architecture: str
    parameters: float
    input_size: int
    data: str
    licence: str
    page: str
    sha256: str | None
    url: str | None = None
    hub: str | None = None
    file: str | None = None
    in_chans: int = 3
    mean: list[float] | None = None
    std: list[float] | None = None
    patients: bool = False
    note: str | None = None

    @property
    def address(self) -> str:
        """The URL of the file; `HF_ENDPOINT` names a mirror of the Hugging Face hub, as in its own tools."""
        if self.url is not None:
            return self.url
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        return f"{endpoint}/{self.hub}/resolve/main/model.safetensors"

    @property
    def file_name(self) -> str:
        """Name of the file when it is here."""
        return self.file or PurePosixPath(urlsplit(self.address).path).name

    def path(self, folder: Path) -> Path:
        """Where `weights get` puts the file: many releases have one name for all their files."""
        return folder / self.name / self.file_name

    def by_hand(self, folder: Path) -> str:
        """The command that fetches the file without this program."""
        path = self.path(folder)
        if self.url is None:
            return f"hf download {self.hub} {path.name} --local-dir {shlex.quote(str(path.parent))}"
        return f"curl -L --fail --create-dirs -o {shlex.quote(str(path))} {shlex.quote(self.url)}"

    def settings(self, weights: str) -> dict[str, object]:
        """Arguments of `Classification` that use these weights, given where they are."""
        given = {"in_chans": self.in_chans if self.in_chans != 3 else None, "mean": self.mean, "std": self.std}
        kept = {name: value for name, value in given.items() if value is not None}
        return {"backbone": self.architecture, "weights": weights, **kept}


@functools.cache
def known_weights() -> tuple[KnownWeights, ...]:
    """Return all entries in the file's order."""
    table = yaml.load(TABLE.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return tuple(KnownWeights(**entry) for entry in table["weights"])


def find(name: str) -> KnownWeights:
    """Return the entry of a name; `timm:` in front of it is ignored.

    Raises:
        DataError: There is no such entry.
    """
    wanted = name.removeprefix("timm:")
    found = next((entry for entry in known_weights() if entry.name == wanted), None)
    if found is None:
        near = closest(wanted, [entry.name for entry in known_weights()])
        raise DataError(
            f"no known weights {name!r}",
            hint=(f"did you mean {near!r}? " if near else "") + "`python cli.py weights list` lists all",
        )
    return found


def recognise(weights: str) -> KnownWeights | None:
    """Return the entry that a setting `weights` means: by its timm name, its folder or its file's name."""
    path = Path(weights)
    names = {weights.removeprefix("timm:"), weights.removeprefix("hf-hub:timm/"), path.parent.name}
    by_name = [entry for entry in known_weights() if entry.name in names]
    by_file = [entry for entry in known_weights() if entry.file_name == path.name]
    return by_name[0] if by_name else by_file[0] if len(by_file) == 1 else None


@dataclass(frozen=True)
class Download:
    """A file that is here.

    Attributes:
        path: The file; its sha256 is beside it, as `sha256sum --check` reads it.
        sha256: Its digest, 64 hexadecimal digits.
        fetched: Whether it was downloaded now; otherwise it was here before.
        verified: Whether the publisher states a digest, which this one agrees with.
    """

    path: Path
    sha256: str
    fetched: bool
    verified: bool


def get(entry: KnownWeights, folder: Path = FOLDER, *, overwrite: bool = False) -> Download:
    """Download a file, unless it is here, and compare its sha256 with the known one and with that of its first time.

    Raises:
        DataError: No network, no room, an answer that is no weights file, or another sha256; no part of a file is left
            behind then, and a file that was here stays as it is.
    """
    path = entry.path(folder)
    record = path.with_name(f"{path.name}.sha256")
    fetched = overwrite or not path.is_file()
    try:
        if fetched:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, lambda temporary: _fetch_verified(entry, temporary, record))
        digest = _digest(path)
    except OSError as error:
        if error.errno in _LOCAL:  # of the disk; what the network raises has none of these
            raise DataError(
                f"could not write {path}: {error}",
                where="--output",
                hint="choose a folder that can be written, on a disk with room",
            ) from error
        raise DataError(
            f"could not download {entry.name}: {_reason(error)}",
            where=entry.address,
            hint=f"run this where there is a network, and bring the file to {path}:\n"
            f"         {entry.by_hand(folder)}\n"
            f"         then `weights get {entry.name} --output {shlex.quote(str(folder))}` checks it",
        ) from error
    _verify(entry, digest, f"{path} ({path.stat().st_size:,} bytes)")
    recorded = record.read_text().split()[:1] if record.is_file() else []
    if recorded and recorded != [digest]:
        raise DataError(
            f"{path} has changed: its sha256 is {digest}, and was {recorded[0]} when it was first here",
            where=str(record),
            hint="download it again: --overwrite",
        )
    write_text(record, f"{digest}  {path.name}\n")
    return Download(path, digest, fetched, verified=entry.sha256 is not None)


def _fetch_verified(entry: KnownWeights, temporary: Path, record: Path) -> None:
    fetch(entry.address, temporary, entry.name)
    _verify(entry, _digest(temporary), f"{entry.address} ({temporary.stat().st_size:,} bytes)")
    record.unlink(missing_ok=True)  # of the file that is about to be replaced


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(entry: KnownWeights, digest: str, where: str) -> None:
    if entry.sha256 is not None and not digest.startswith(entry.sha256):
        raise DataError(
            f"the file of {entry.name} is not the published one: its sha256 is {digest}, not {entry.sha256}",
            where=where,
            hint="download it again (--overwrite); if that gives the same digest, do not use it",
        )


def fetch(url: str, path: Path, name: str) -> None:
    """Download a URL into a new file, going on where a connection was cut.

    Raises:
        DataError: The server sent a web page.
        OSError: There is no answer, a refusal, or `RETRIES` attempts in a row brought nothing.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from studies.display import console

    bars = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    hidden = not console.is_terminal
    with path.open("wb") as file, Progress(*bars, TimeRemainingColumn(), console=console, disable=hidden) as progress:
        transfer = _Transfer(url, file, progress, progress.add_task(name, total=None))
        failures = 0
        while True:
            before = file.tell()
            try:
                transfer.go_on()
                return
            except HTTPError:
                raise  # an answer, if not the wanted one
            except (OSError, HTTPException) as error:
                failures = failures + 1 if file.tell() <= before else 0
                if failures == RETRIES:
                    raise error if isinstance(error, OSError) else ConnectionError(_reason(error)) from error
                time.sleep(PAUSE * failures)


@dataclass
class _Transfer:
    """A download that may take several connections; `validator` tells a server which version of a file was begun."""

    url: str
    file: IO[bytes]
    progress: "Progress"
    task: "TaskID"
    validator: str = ""

    def go_on(self) -> None:
        """Append what is left, or begin anew where the server cannot tell whether its file is still the same."""
        headers = {"User-Agent": "farshot"}
        if self.file.tell() and self.validator:
            headers |= {"Range": f"bytes={self.file.tell()}-", "If-Range": self.validator}
        with urlopen(Request(self.url, headers=headers), timeout=TIMEOUT) as answer:
            if answer.headers.get_content_type() == "text/html":
                raise DataError(
                    "the server sent a web page instead of the file",
                    where=self.url,
                    hint="open the address in a browser: it may ask for a login, or have moved",
                )
            if answer.headers.get("Content-Range", "").partition("-")[0] != f"bytes {self.file.tell()}":
                self.file.seek(0)
                self.file.truncate()
            etag = answer.headers.get("ETag", "")
            weak = not etag or etag.startswith("W/")
            self.validator = answer.headers.get("Last-Modified", "") if weak else etag
            length = answer.headers.get("Content-Length")
            total = self.file.tell() + int(length) if length is not None else None
            self.progress.update(self.task, total=total, completed=self.file.tell())
            while chunk := answer.read(_CHUNK):
                self.file.write(chunk)
                self.progress.update(self.task, advance=len(chunk))
        if total is not None and self.file.tell() < total:  # urllib takes the end of a connection for the file's end
            raise ConnectionError(f"the connection was cut after {self.file.tell():,} of {total:,} bytes")


def _reason(error: Exception) -> str:
    reason = error.reason if isinstance(error, URLError) and not isinstance(error, HTTPError) else error
    return str(reason) or type(error).__name__
