"""What every text tower offers, which captions it takes, and how the tower of a checkpoint is rebuilt."""

import inspect
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.errors import ModelError

_PACKAGE = "lightning_modules.text"
# A module of this package and a class in it, so that a checkpoint can name no foreign code.
_CLASS_PATH = re.compile(rf"({re.escape(_PACKAGE)}\.[a-z]\w*)\.([A-Z]\w*)")
# NUL, which texts in UTF-16 are full of, and the halves of surrogate pairs, which UTF-8 cannot hold.
_FORBIDDEN = re.compile(r"[\x00\ud800-\udfff]")
# All other control characters: captions from the web have many, such as U+0092 for the apostrophe of Windows-1252.
_CONTROL = re.compile(r"[\x01-\x1f\x7f-\x9f]")
_SHOWN = 60


class TextTower(nn.Module, ABC):
    """Turns captions into token numbers and those into one vector a caption.

    A tower ends with its features: the projection into the space shared with images belongs to the task.

    Args:
        width: Size of the output.
        context: Longest number of tokens, start and end included.

    Attributes:
        width: Size of the output.
        context: Longest number of tokens, start and end included.
    """

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.width = width
        self.context = context

    @abstractmethod
    def encode(self, captions: list[str]) -> tuple[Tensor, int]:
        """Turn checked captions into tokens as `tokenize_counted` returns them."""

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """Arguments of the class, in plain types, that build this tower anew before its weights are loaded."""

    @abstractmethod
    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens int64 (B, up to context) to features (B, width); how far a row is padded changes nothing."""

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Return the tokens of captions: int64 (B, context) on the CPU, padded with zeros.

        A caption that is longer than the context loses its end; the end token stays.

        Raises:
            ModelError: A caption is empty, no string, or damaged; see `read_captions`.
        """
        return self.tokenize_counted(captions)[0]

    def tokenize_counted(self, captions: Sequence[str]) -> tuple[Tensor, int]:
        """Return what `tokenize` does, and how many captions were longer than the context and lost their end.

        Raises:
            ModelError: A caption is empty, no string, or damaged; see `read_captions`.
        """
        return self.encode(read_captions(captions))

    def describe(self) -> dict[str, Any]:
        """Return plain types from which `build` makes a tower that this one's weights fit."""
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", **self.arguments()}


def read_captions(captions: Sequence[str]) -> list[str]:
    """Check captions and return them in Unicode's form NFKC, without white space around them.

    NFKC makes one spelling of what looks alike: ligatures, full-width letters, accents of one or two code points.
    Control characters, tabs and line ends too, are blanks. Case stays, because published tokenizers differ in it.

    Raises:
        ModelError: A value is no string; or nothing of it can be seen; or it holds NUL or half a surrogate pair. The
            message has the position and the first 60 characters.
    """
    if isinstance(captions, str):
        raise ModelError(f"captions are one string, {_show(captions)}", valid="a list of strings, one a caption")
    return [_read_caption(position, caption) for position, caption in enumerate(captions)]


def _read_caption(position: int, caption: object) -> str:
    if not isinstance(caption, str):
        raise ModelError(
            f"caption {position} is no text but {type(caption).__name__}: {_show(caption)}",
            valid="strings",
            hint="drop the rows without a caption from the data set",
        )
    text = unicodedata.normalize("NFKC", caption)
    if found := _FORBIDDEN.search(text):
        raise ModelError(
            f"caption {position} holds U+{ord(found[0]):04X}, which belongs in no text: {_show(caption)}",
            valid="characters of Unicode but U+0000 and U+D800 to U+DFFF",
            hint="the file is damaged, or was read in another encoding than UTF-8",
        )
    text = _CONTROL.sub(" ", text).strip()
    if not any(map(str.isprintable, text)):
        raise ModelError(
            f"caption {position} is empty: {_show(caption)}", hint="drop the rows without a caption from the data set"
        )
    return text


def _show(value: object) -> str:
    return repr(value[:_SHOWN] if isinstance(value, str | bytes) else value)[: _SHOWN + 3]


def token_counts(tokens: Tensor) -> Tensor:
    """Count the tokens of each row, without its padding: int64 (B, L) → int64 (B,).

    A row ends with its last number above 0: zeros inside it are tokens of tokenizers that number theirs from 0.
    """
    places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    return (tokens.ne(0) * places).amax(dim=1)


def check_counts(**values: object) -> None:
    """Check sizes of a tower.

    Raises:
        ModelError: A value is no whole number of at least 1; the message has its name.
    """
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{name} is {value!r}", valid="a whole number, 1 or more")


def optional_package(name: str) -> Any:
    """Import a package that comes with the extra `text`.

    Raises:
        ModelError: It cannot be imported.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ModelError(
            f"this text tower needs the package {name}, which cannot be imported: {error}",
            hint='pip install "farshot[text]", or use SmallText, which needs nothing',
        ) from error


def build(description: Mapping[str, Any]) -> TextTower:
    """Build a tower with random weights from what `TextTower.describe` returned.

    Args:
        description: `class`, a class path within `lightning_modules.text`, and the arguments of that class.

    Raises:
        ModelError: The class lies elsewhere, does not exist or is no tower, or does not take the arguments.
    """
    arguments = dict(description)
    tower = _tower_class(arguments.pop("class", None))
    try:
        inspect.signature(tower).bind(**arguments)
    except TypeError as error:
        raise ModelError(
            f"{tower.__name__} cannot be built from {_show(arguments)}: {error}",
            valid=list(inspect.signature(tower).parameters),
        ) from error
    return tower(**arguments)


def _tower_class(path: object) -> type[TextTower]:
    found = _CLASS_PATH.fullmatch(path) if isinstance(path, str) else None
    try:
        named = getattr(import_module(found[1]), found[2], None) if found else None
    except ModuleNotFoundError:
        named = None
    if not (isinstance(named, type) and issubclass(named, TextTower)) or inspect.isabstract(named):
        raise ModelError(
            f"there is no text tower {_show(path)}",
            valid=f"the path of a tower's class within {_PACKAGE}, such as {_PACKAGE}.transformer.SmallText",
            hint="a tower of your own becomes loadable as a file of that package",
        )
    return named
