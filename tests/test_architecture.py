"""The arrows of the layout, cli → studies → {lightning_modules, datamodules}, and what keeps commands light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "datamodules": {"lightning_modules", "studies", "cli"},
    "lightning_modules": {"datamodules", "studies", "cli"},
    "studies": {"cli"},
}
LEAVES = {
    "datamodules": (
        "errors",
        "few_shot",
        "splits",
        "samplers",
        "transforms",
        "io",
        "table",
        "files",
        "readers",
        "generator",
        "rows",
        "shards",
        "prepared",
        "atomic",
        "hidden_manifold",
        "random_numbers",
        "rendering",
        "hashing",
        "exclusions",
        "dials",
        "source_dials",
        "randaugment",
        "simclr_views",
        "colour",
        "image_text/captions",
        "image_text/label_texts",
        "label_space",
        "arguments",
        "ontology",
        "alignment",
        "assignment",
        "dicom",
        "chest_xray/labels",
        "metadata",
    ),
    "lightning_modules": (
        *("errors", "losses", "metrics", "thresholds", "optimizers", "schedules", "mixup"),
        *("contrastive_losses", "gather", "global_norm", "pair_evaluation", "collapse", "probes"),
        *("text/tower", "text/words", "text/transformer", "text/open_clip", "text/hugging_face"),
    ),
}


def imports(path):
    """Top-level packages that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")[0]


def sources(package):
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", FORBIDDEN)
def test_arrows_point_one_way(package):
    wrong = {(str(path), name) for path in sources(package) for name in imports(path) if name in FORBIDDEN[package]}
    assert not wrong


@pytest.mark.parametrize("package", LEAVES)
def test_leaves_know_no_lightning(package):
    for leaf in LEAVES[package]:
        assert "pytorch_lightning" not in set(imports(ROOT / package / f"{leaf}.py")), leaf


def test_one_importer_of_albumentations():
    pattern = re.compile(r"""^\s*(import|from) albumentations|import_module\("albumentations""", re.MULTILINE)
    found = {path.name for package in FORBIDDEN for path in sources(package) if pattern.search(path.read_text())}
    assert found == {"transforms.py"}


def test_files_stay_small():
    long = {
        str(path): lines
        for package in FORBIDDEN
        for path in sources(package)
        if (lines := len(path.read_text().splitlines())) > 400
    }
    assert not long


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["list", "datasets"],
        ["list", "models"],
        ["list", "datasets", "PadChest"],
        ["study", "status", "configs/studies/quickstart.yaml"],
        ["audit", "--help"],
    ],
)
def test_light_commands_do_not_import_torch(words):
    code = """
import atexit, sys, cli
atexit.register(lambda: print("torch" in sys.modules, "albumentations" in sys.modules))
cli.main(sys.argv[1:])
"""
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


def test_exports_resolve():
    import datamodules
    import lightning_modules
    from lightning_modules import backbones

    for package in (datamodules, lightning_modules, backbones):
        for name in package.__all__:
            assert getattr(package, name).__name__ == name
