"""How deep to transfer."""

from dataclasses import replace

from datamodules.atomic import write_text
from studies.depth_report import depth_section
from studies.page import Section, TableBlock
from studies.sections.material import Material, blocks_of
from studies.tables import to_latex

FILES = ("best_depth.csv", "depth_regret.csv", "depth.csv", "best_depth.tex")
CAPTION = "The best depth k* and the regret of fixed policies, in points, each with its 95 % interval."


def depth(material: Material) -> Section | None:
    """The report's part on depth, where depth was varied."""
    paragraphs = depth_section(material.tables.rows, material.folder, material.colours)
    blocks = blocks_of(paragraphs, material.folder)
    if blocks and isinstance(blocks[-1], TableBlock):  # after a figure: no line of text says what it shows
        blocks[-1] = replace(blocks[-1], caption=CAPTION, files=FILES)
        write_text(material.folder / FILES[-1], to_latex(blocks[-1].frame, CAPTION))
    return Section("Depth of transfer", blocks) if blocks else None
