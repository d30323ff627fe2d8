"""How deep to transfer."""

from studies.depth_report import depth_section
from studies.page import Section
from studies.sections.material import Material, blocks_of


def depth(material: Material) -> Section | None:
    """The report's part on depth, where depth was varied."""
    paragraphs = depth_section(material.tables.rows, material.folder)
    blocks = blocks_of(paragraphs, material.folder, "The best depth k* and the regret of fixed policies, in points.")
    return Section("Depth of transfer", blocks) if blocks else None
