"""What the study has cost."""

import pandas as pd

from studies.estimates import in_bytes, in_time
from studies.page import Section
from studies.sections.material import Material


def cost(material: Material) -> Section | None:
    """Cells, images seen, time, memory and energy by kind of cell, architecture, source and target."""
    cells = material.frame.drop_duplicates("cell")
    if cells.empty:
        return None
    kind = cells["protocol"].eq("pretrain").map({True: "pre-training", False: "transfer"})
    groups = cells.assign(kind=kind).groupby(["kind", "architecture", "target"], dropna=False)
    table = groups.agg(
        cells=("cell", "size"),
        images=("images_seen", "sum"),
        seconds=("seconds", "sum"),
        memory=("peak_memory", "max"),
        energy=("energy", lambda values: values.sum(min_count=1)),
    ).reset_index()
    total = {
        "kind": "all", "architecture": "", "target": "", "cells": table["cells"].sum(), "images": table["images"].sum(),
        "seconds": table["seconds"].sum(), "memory": table["memory"].max(), "energy": table["energy"].sum(min_count=1),
    }  # fmt: skip
    table = pd.concat([table, pd.DataFrame([total])], ignore_index=True)
    shown = pd.DataFrame(
        {
            **{name: table[name] for name in ("kind", "architecture", "target", "cells")},
            "images seen": [f"{int(value):,}" for value in table["images"].fillna(0)],
            "time of training": [in_time(value) for value in table["seconds"]],
            "largest memory": ["–" if pd.isna(value) else in_bytes(value) for value in table["memory"]],
            "energy": ["–" if pd.isna(value) else f"{value / 3.6e6:.2g} kWh" for value in table["energy"]],
        }
    )
    caption = (
        "Cost of the finished cells: training, without loading and evaluation; memory of the device, or of the process "
        "where there is none; energy where the device tells. Trials that chose settings are not in it."
    )
    return Section("Cost", [material.table(shown, "cost", caption)])
