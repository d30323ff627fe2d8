"""Time and memory of reading a release's metadata: labels, patients, splits.

    python benchmarks/tables.py CheXpert --root /data/chexpert [--repeats 5]

Reads the table in fresh processes, as a run does, and prints wall time, CPU time and peak memory above the imports.
"""

import argparse
import statistics
import subprocess
import sys

CODE = """
import resource, sys, time
import datamodules
import pyarrow.csv
data_class = getattr(datamodules, sys.argv[1])
megabytes = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, wall, cpu = megabytes(), time.perf_counter(), time.process_time()
rows = len(data_class(root=sys.argv[2]).read_table())
print(rows, time.perf_counter() - wall, time.process_time() - cpu, megabytes() - before, before)
"""


def main():
    """Read the table in fresh processes and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", help="class name, such as PadChest")
    parser.add_argument("--root", required=True, help="folder with the tables; no image is opened")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    command = [sys.executable, "-c", CODE, options.dataset, options.root]
    runs = [
        [float(value) for value in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]
        for _ in range(options.repeats)
    ]
    rows, wall, cpu, memory, imports = (statistics.median(column) for column in zip(*runs, strict=True))
    print(
        f"{options.dataset}: {rows:,.0f} rows in {wall:.2f} s (CPU {cpu:.2f} s; {min(r[1] for r in runs):.2f} to "
        f"{max(r[1] for r in runs):.2f}), {memory:.0f} MB above the {imports:.0f} MB of the imports"
    )


if __name__ == "__main__":
    main()
