"""Tar shards: written with known offsets, read by random access, indexed from their headers. Nothing is extracted.

A shard is a plain uncompressed tar archive, as WebDataset and `tar` read it. Members are found by (shard, offset, size)
and their names are only ever text: no member name becomes a file's path.
"""

import fcntl
import hashlib
import os
import re
import resource
import stat
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.atomic import clear_temporaries, replace_file
from datamodules.errors import DataError, UnreadableImageError

MAX_BYTES = 256 << 20
"""Largest member that is read, bytes: more is not an image but a damaged or hostile header."""
MAX_NAME_BYTES = 1 << 20  # of an extended header, which holds a long name
BLOCK = tarfile.BLOCKSIZE
_EMPTY = b"\0" * BLOCK
_ABOUT_THE_NEXT = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
"""Types of members that describe the one after them."""
_PROTOCOL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")
_SAMPLE = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_META = re.compile(r"__[^/.]*__(?:[./]|$)")
_FETCH = "copy the shard again, or make it again from the original images"


# Writing -----------------------------------------------------------------------------------------------------------


def write_shard(path: str | Path, members: Iterable[tuple[str, bytes]]) -> NDArray[np.int64]:
    """Write a tar archive (POSIX ustar) whose bytes depend on the members alone: no time, no owner.

    Args:
        path: The file to write.
        members: (name, content), names of at most 100 ASCII characters.

    Returns:
        int64 (N,): where each member's content begins in the file.
    """
    offsets = []
    with open(path, "wb") as file:
        position = 0
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            header = entry.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
            padding = b"\0" * (-len(content) % BLOCK)
            offsets.append(position + len(header))
            position += file.write(header) + file.write(content) + file.write(padding)
        # Two empty blocks end an archive, which fills whole records.
        file.write(b"\0" * (2 * BLOCK + -(position + 2 * BLOCK) % tarfile.RECORDSIZE))
    return np.asarray(offsets, dtype=np.int64)


def checksum(content: bytes) -> int:
    """CRC-32 of a member's content: 7 µs for 25 kB, a fifth of BLAKE2b's time, and enough against damage."""
    return zlib.crc32(content)


# Reading by random access --------------------------------------------------------------------------------------------


class _OpenShard:
    """An open file descriptor, closed when nobody holds it: a thread may still read what the cache let go."""

    def __init__(self, path: str | Path) -> None:
        self.path = path
        file = local_file(path)
        try:
            if not stat.S_ISREG(os.stat(file).st_mode):  # opening a pipe would wait for ever
                raise DataError("a shard is no regular file", where=str(path), hint="move it out of the data set")
            self.descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"a shard cannot be opened: {error.strerror}", where=str(path), hint=_FETCH) from error

    def read(self, size: int, offset: int) -> bytes:
        """Read `size` bytes, fewer only where the file ends; one system call may give less, at a signal or 2 GiB."""
        content = b""
        try:
            while len(content) < size:
                more = os.pread(self.descriptor, size - len(content), offset + len(content))
                if not more:
                    break
                content += more
        except OSError as error:
            where = f"{self.path}, byte {offset + len(content)}"
            raise UnreadableImageError(f"a shard cannot be read: {error.strerror}", where=where, hint=_FETCH) from error
        return content

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class ShardReader:
    """Reads stretches of files by (shard, offset, size); safe for threads and forked processes.

    `os.pread` has no position that processes could share, and unlike a memory map it cannot kill the process where a
    file has been cut short (3.5 µs for 25 kB, a memory map 2.2 µs; decoding takes a hundred times as long). Half of the
    file descriptors that the process may have are kept open.

    Args:
        files: Shards in the order of their numbers; local paths, or URLs that `local_file` copies.
        max_bytes: Largest stretch that is read.
    """

    def __init__(self, files: Sequence[str | Path], *, max_bytes: int = MAX_BYTES) -> None:
        self.files, self.max_bytes = list(files), max_bytes
        most = max(1, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 1 << 16) // 2)
        # The cache's own lock is held by no Python code, so a fork cannot find it taken.
        self._open = lru_cache(maxsize=most)(_OpenShard)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reader, (self.files, self.max_bytes)

    def read(self, shard: int, offset: int, size: int, crc32: int | None = None) -> bytes:
        """Read `size` bytes at `offset` of shard number `shard`.

        Args:
            shard: Number of the file, 0 … number of files − 1.
            offset: First byte.
            size: Number of bytes, 1 … `max_bytes`.
            crc32: Checksum that they must have; None = not checked.

        Raises:
            DataError: There is no such shard or stretch.
            UnreadableImageError: The bytes are not those that were written.
        """
        if not 0 <= shard < len(self.files):
            raise DataError(f"there is no shard number {shard}", valid=f"0 to {len(self.files) - 1}")
        path = self.files[shard]
        if offset < 0 or not 0 < size <= self.max_bytes:
            raise DataError(
                f"{size} bytes at offset {offset} of a shard are impossible",
                where=str(path),
                valid=f"an offset from 0, and 1 to {self.max_bytes} bytes",
                hint="the index or manifest is damaged; make it again",
            )
        file = self._open(path)
        content = file.read(size, offset)
        if len(content) < size:
            raise DataError(
                f"a shard ends at byte {os.fstat(file.descriptor).st_size}, before byte {offset + size} that belongs "
                "to one of its images",
                where=str(path),
                hint="the shard is truncated, or not the one that the manifest was written for; copy it again",
            )
        if crc32 is not None and checksum(content) != crc32:
            raise UnreadableImageError(
                "an image in a shard is not what was written: its checksum differs",
                where=f"{path}, bytes {offset} to {offset + size}",
                hint="the shard is damaged, or not the one that the manifest was written for; copy it again",
            )
        return content


def _reader(files: Sequence[str | Path], max_bytes: int) -> ShardReader:
    return ShardReader(files, max_bytes=max_bytes)


# Files on an object store --------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Folder of files that can always be made again: `$FARSHOT_CACHE`, else `~/.cache/farshot`."""
    return Path(os.environ.get("FARSHOT_CACHE") or Path.home() / ".cache" / "farshot").expanduser()


def is_remote(path: str | Path) -> bool:
    """Tell whether a path is a URL such as s3://bucket/key."""
    return _PROTOCOL.match(str(path)) is not None


def join(folder: str | Path, name: str) -> str | Path:
    """Name a file in a folder that may be a URL."""
    return f"{str(folder).rstrip('/')}/{name}" if is_remote(folder) else Path(folder) / name


def local_file(path: str | Path) -> Path:
    """Return a local path of a file: its own, or that of a whole copy in the cache.

    The copy is named after the address and what the store says of the file (size, time or ETag), so a changed file is
    copied again. It appears in one step, which fsspec's own caches do not promise: a process that is killed while it
    copies would leave them a short file. Of several processes one copies and the others wait.

    Raises:
        DataError: fsspec or the store's package is not installed, or the file cannot be copied.
    """
    if not is_remote(path):
        return Path(path)
    url = str(path)
    try:
        import fsspec  # type: ignore[import-untyped]

        store, name = fsspec.core.url_to_fs(url)
        state = store.info(name)  # over HTTP `ukey` is the address alone
        version = [store.ukey(name), state.get("size"), state.get("ETag")]
        folder = cache_folder() / "shards"
        folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.blake2b(f"{url}|{version}".encode(), digest_size=16).hexdigest()
        copy = folder / f"{digest}{Path(name).suffix}"
        if copy.is_file():
            return copy
        with open(folder / f"{digest}.lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not copy.is_file():
                clear_temporaries(copy)
                replace_file(copy, lambda temporary: store.get_file(name, str(temporary)))
        return copy
    except ImportError as error:
        raise DataError(f"{error}", where=url, hint="for S3: pip install 'farshot[s3]'") from error
    except Exception as error:  # each store has errors of its own
        raise DataError(
            f"a file cannot be copied from its store: {error!r}",
            where=f"{url} to {cache_folder()}",
            hint="check the address and the credentials, and that FARSHOT_CACHE names a folder with room for shards",
        ) from error


# Indexing ------------------------------------------------------------------------------------------------------------


def index_shards(paths: Sequence[str | Path], *, max_bytes: int = MAX_BYTES) -> Any:
    """List the members of tar shards, reading headers only.

    Members are named as WebDataset does: the key is the name up to the first dot of its last part, the rest is the
    extension; the members of a sample follow each other. Folders, hidden files, `__meta__` members and names without an
    extension are passed over.

    Args:
        paths: Tar files or URLs; a shard's number is its place here.
        max_bytes: Largest member.

    Returns:
        A pyarrow table, a row a member in the order of the shards: key (string), extension (lower-case string),
        shard (int32), offset (int64) and size (int64) of the content in bytes.

    Raises:
        DataError: A file is no tar archive, ends early, or has a member that is a link, too large or impossible.
    """
    import pyarrow as pa

    schema = pa.schema(
        [("key", pa.string()), ("extension", pa.string()), ("shard", pa.int32()), ("offset", "i8"), ("size", "i8")]
    )
    tables = []
    for number, path in enumerate(paths):
        keys, extensions, offsets, sizes = [], [], [], []
        for name, offset, size in _members(path, max_bytes):
            match = _SAMPLE.fullmatch(name)
            if match is None or _META.match(name):
                continue
            keys.append(match[1])
            extensions.append(match[2].lower())
            offsets.append(offset)
            sizes.append(size)
        columns = [keys, extensions, np.full(len(keys), number, np.int32), offsets, sizes]
        tables.append(pa.table(columns, schema=schema))
    return pa.concat_tables(tables) if tables else schema.empty_table()


def _members(path: str | Path, max_bytes: int) -> Iterator[tuple[str, int, int]]:
    """Names, offsets and sizes of the regular files of a tar archive, from its headers.

    tarfile's own walk loops for ever on negative sizes (CVE-2025-8194), keeps every member, and takes four times as
    long (30 µs instead of 8): ImageNet-21k as shards has 28 million headers.
    """
    file = _OpenShard(path)
    end = os.fstat(file.descriptor).st_size
    position = 0
    extended: dict[str, str] = {}
    while True:
        block = file.read(BLOCK, position)
        where = f"{path}, byte {position}"
        if len(block) < BLOCK:
            raise DataError("a tar shard ends early: its end mark is missing", where=where, hint="copy it again")
        if block == _EMPTY:
            return
        try:
            name, size, kind = _parse_header(block)
            name, size = extended.get("path", name), int(extended.get("size", size))
        except ValueError as error:
            raise DataError("not a tar archive, or a damaged one: a header does not parse", where=where) from error
        content = position + BLOCK
        if not 0 <= size <= (MAX_NAME_BYTES if kind in _ABOUT_THE_NEXT else max_bytes):
            raise DataError(f"a member of a tar shard claims {size} bytes", where=where, valid=f"up to {max_bytes}")
        position = content + size + -size % BLOCK
        if position > end:
            raise DataError(f"a tar shard ends early: {name!r} is cut off", where=where, hint="copy it again")
        if kind == tarfile.XHDTYPE:
            extended |= _pax_records(file.read(size, content), where)
        elif kind == tarfile.GNUTYPE_LONGNAME:
            extended["path"] = _text(file.read(size, content).rstrip(b"\0"))
        if kind in _ABOUT_THE_NEXT:
            continue
        extended = {}
        if kind in (tarfile.REGTYPE, tarfile.AREGTYPE):
            yield name, content, size
        elif kind != tarfile.DIRTYPE:
            raise DataError(f"member {name!r} of a tar shard is no regular file", where=where)


def _parse_header(block: bytes) -> tuple[str, int, bytes]:
    """Name, size and type of a header block (POSIX.1-2001, section pax); ValueError where its checksum differs."""
    if sum(block) - sum(block[148:156]) + 8 * ord(" ") != int(block[148:156].strip(b" \0"), 8):
        raise ValueError("checksum")
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    field = block[124:136]
    # GNU writes sizes from 8 GiB as a two's complement with the top bit set.
    binary = field[0] & 0x80
    size = int.from_bytes(field[1:], signed=field[0] == 0xFF) if binary else int(field.strip(b" \0") or b"0", 8)
    return _text(name), size, block[156:157]


def _text(name: bytes) -> str:
    """A member's name; what is no UTF-8 becomes escapes, by which different names stay different."""
    return name.decode("utf-8", "backslashreplace")


def _pax_records(content: bytes, where: str) -> dict[str, str]:
    """Parse the records "length key=value newline" of a POSIX extended header; only path and size matter here."""
    found = {}
    position = 0
    while position < len(content):
        length = content[position : position + 20].partition(b" ")[0]
        end = position + int(length) if length.isdigit() else 0
        if not position + len(length) < end <= len(content):
            raise DataError("a damaged extended header in a tar shard", where=where)
        key, _, value = content[position + len(length) + 1 : end - 1].partition(b"=")
        if key.startswith(b"GNU.sparse."):  # its content is a list of stretches, and then these
            problem = "a sparse member in a tar shard"
            raise DataError(problem, where=where, hint="write the archive again without --sparse")
        if key in (b"path", b"size"):
            found[key.decode()] = _text(value)
        position = end
    return found
