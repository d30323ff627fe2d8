"""A report as one HTML file: text, figures and tables. It needs no network and knows nothing of what they say."""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote
from xml.etree import ElementTree

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from datamodules.errors import DataError
from studies.tables import Side, alignment, cell_text

MAX_ROWS = 200  # of a table on the page; its files hold the others
LINE = 12  # letters of a heading or a column's cells that stay on one line
KINDS = {".tex": "LaTeX"}  # endings of files whose names for readers are not the ending in capitals
INTERVAL = re.compile(r"\[([+\-−]?[\d.]+), ([+\-−]?[\d.]+)\]")
PIXELS = {"pt": 4 / 3, "px": 1.0, "": 1.0, "in": 96.0}  # CSS: an inch is 96 pixels or 72 points


@dataclass(frozen=True)
class Prose:
    """Paragraphs, parted by empty lines. One whose lines all start with "- " is a list."""

    text: str
    kind: ClassVar[str] = "prose"

    @property
    def parts(self) -> list[str | list[str]]:
        """Each paragraph, or the entries of each list."""
        found = [part.strip().splitlines() for part in re.split(r"\n\s*\n", self.text) if part.strip()]
        return [
            [line[2:] for line in lines] if all(line.startswith("- ") for line in lines) else " ".join(lines)
            for lines in found
        ]


@dataclass(frozen=True)
class FigureBlock:
    """A figure of SVG, put into the page as a picture: no script, style or id of it can meet those of others.

    Args:
        svg: The text of an SVG document, or its path.
        caption: What it shows, under it.
        alt: What it says, for readers who do not see it.
        files: Paths of the same figure in other formats, relative to the page.
    """

    svg: str | Path
    caption: str
    alt: str
    files: Sequence[str] = ()
    kind: ClassVar[str] = "figure"

    @property
    def picture(self) -> tuple[str, int, int]:
        """A data address, the width and the height in CSS pixels.

        Raises:
            DataError: The SVG cannot be read.
        """
        name = str(self.svg) if isinstance(self.svg, Path) else self.caption
        try:
            text = self.svg.read_text(encoding="utf-8") if isinstance(self.svg, Path) else self.svg
            root = ElementTree.fromstring(text)
            width, height = (_pixels(root.attrib[side]) for side in ("width", "height"))
        except (OSError, ElementTree.ParseError, KeyError, ValueError) as error:
            raise DataError(
                f"a figure that cannot be shown: {type(error).__name__} {error}",
                where=name,
                valid="an SVG document with width and height",
                hint="draw the figure again",
            ) from error
        data = base64.b64encode(text.encode()).decode()
        return f"data:image/svg+xml;base64,{data}", width, height


@dataclass(frozen=True)
class TableBlock:
    """A table; beyond `MAX_ROWS` rows only the first ones are shown.

    Args:
        frame: Text or numbers; the index is left out. The first column names the rows.
        caption: What it shows, above it.
        sides: Column → where its cells stand, instead of `tables.alignment`.
        sortable: Whether readers may sort it; never where rows are left out, which would show the wrong first ones.
        files: Paths of the same table in full, relative to the page.
    """

    frame: pd.DataFrame
    caption: str
    sides: Mapping[str, Side] = field(default_factory=dict)
    sortable: bool = True
    files: Sequence[str] = ()
    kind: ClassVar[str] = "table"

    @property
    def columns(self) -> list[tuple[str, Side, int]]:
        """Name and side of each column, and the letters of its longest cell."""
        text = cell_text(self._shown)
        longest = [max(map(len, text.iloc[:, place]), default=0) for place in range(text.shape[1])]
        return list(zip(map(str, text.columns), alignment(text, self.sides), longest, strict=True))

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The text of the cells that are shown."""
        return list(cell_text(self._shown).itertuples(index=False, name=None))

    @property
    def is_cut(self) -> bool:
        """Whether rows are left out."""
        return len(self.frame) > MAX_ROWS

    @property
    def _shown(self) -> pd.DataFrame:
        return self.frame.head(MAX_ROWS)


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away under one line."""

    summary: str
    blocks: "Sequence[Block]"
    kind: ClassVar[str] = "details"


Block = Prose | FigureBlock | TableBlock | Details


@dataclass(frozen=True)
class Section:
    """A part of the page with an entry in the table of contents."""

    heading: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A page.

    Args:
        title: The heading, and the name of the browser's tab.
        answer: Sentences that answer the question of the study; shown first and large.
        facts: Name → value in small print.
        sections: The rest, in order.
    """

    title: str
    answer: Sequence[str]
    facts: Mapping[str, str]
    sections: Sequence[Section]


def render_page(page: Page) -> str:
    """The page as one HTML document that loads nothing: not from the network, and no file beside it.

    All text is escaped. Figures and tables are numbered in their order. Files are linked by relative addresses.

    Raises:
        DataError: A figure cannot be read.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_keep_together,
    )
    environment.filters |= {"digest": _digest, "address": _address, "link_names": _link_names}
    return environment.get_template("page.html.j2").render(page=page, max_rows=MAX_ROWS, line=LINE)


def _keep_together(value: object) -> object:
    """Text whose "95 %", "2.0 ± 0.3" and "[1.0, 5.0]" no line may break."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    value = INTERVAL.sub("[\\1,\u00a0\\2]", value)
    return value.replace(" %", "\u00a0%").replace(" ± ", "\u00a0±\u00a0")


def _pixels(length: str) -> int:
    """A length of SVG in CSS pixels, such as "496.8pt"."""
    number = length.rstrip("abcdefghijklmnopqrstuvwxyz%")
    return round(float(number) * PIXELS[length[len(number) :]])


def _digest(text: str) -> str:
    """What a Content-Security-Policy calls an inline script whose text is this and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _address(path: str) -> str:
    """A relative address: a colon or two slashes at the start would lead elsewhere."""
    return f"./{quote(path.lstrip('/'))}"


def _link_names(paths: Sequence[str]) -> list[tuple[str, str]]:
    """Each path and what its link says: CSV, LaTeX; the file's name where two are of one kind."""
    kinds = [KINDS.get(ending, ending[1:].upper()) for ending in (Path(path).suffix for path in paths)]
    return [
        (path, kind if kind and kinds.count(kind) == 1 else Path(path).name)
        for path, kind in zip(paths, kinds, strict=True)
    ]
