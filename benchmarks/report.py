"""Time to load and report a study of 100,000 rows from its run folders, the first time and again.

Usage: PYTHONPATH=. python benchmarks/report.py [--cells 1000]

Made-up rows of cells of 5 sources x 4 targets x 5 shots x 10 seeds; no predictions, as a study that keeps none.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

from studies.spec import read_study
from studies.store import collect
from studies.study_report import write_study_report

CLASSES = 49  # two metrics each, and two over all classes: 100 rows a cell
STUDY = {
    "name": "many",
    "architectures": {"net": {"model": {"class_path": "Classification"}}},
    "sources": {f"source{number}": {"data": {"class_path": "Synthetic"}} for number in range(4)},
    "targets": {f"target{number}": {"data": {"class_path": "Synthetic"}} for number in range(4)},
    "protocols": {"finetune": {}},
    "blocks": [
        {
            "sources": ["scratch", *(f"source{number}" for number in range(4))],
            "architectures": ["net"],
            "targets": [f"target{number}" for number in range(4)],
            "protocols": ["finetune"],
            "shots": [1, 5, 10, 100, "full"],
            "seeds": list(range(10)),
        }
    ],
}


def write_runs(folder: Path) -> Path:
    """Write the study file and a finished run folder for each cell; returns the file."""
    path = folder / "many.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    rng = np.random.default_rng(0)
    for cell in read_study(path).cells:
        facts = {**cell.columns, "run": cell.name, "image_size": 224, "seconds": 1.0, "n_test": 1000}
        metrics: list[tuple[str, str | None]] = [("accuracy", None), ("mean_auroc", None)]
        metrics += [(name, f"class {number}") for number in range(CLASSES) for name in ("auroc", "average_precision")]
        rows = [
            {**facts, "metric": metric, "class_name": name, "value": float(rng.uniform(0.3, 0.9))}
            for metric, name in (metrics if cell.kind == "transfer" else [])
        ]
        run = folder / "runs" / "many" / cell.name
        run.mkdir(parents=True)
        (run / "summary.json").write_text(json.dumps({"state": "finished", "run": facts, "rows": rows}))
    return path


def main() -> None:
    """Print seconds of collecting and reporting."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = write_runs(Path(scratch))
        study, runs = read_study(path), Path(scratch) / "runs"
        for what in ("first", "again"):
            start = time.process_time()
            frame = collect(runs / "many")
            collected = time.process_time()
            write_study_report(study, runs)
            end = time.process_time()
            print(
                f"{what}: {len(frame):,} rows, collect {collected - start:.1f} s, report {end - collected:.1f} s of CPU"
            )


if __name__ == "__main__":
    main()
