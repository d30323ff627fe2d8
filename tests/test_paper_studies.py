"""The studies of the papers: their grids are the published ones, and they run at a tiny scale on generated images."""

import re
from pathlib import Path

import pytest

from studies import published
from studies.overlay import entezari2023_rows
from studies.spec import read_study
from studies.store import collect

STUDIES = Path(__file__).parent.parent / "configs" / "studies"


def test_the_grid_of_paper_a_is_the_published_one():
    study = read_study(STUDIES / "cherti2022.yaml")
    weights = [cell for cell in study.cells if cell.kind == "pretrain"]
    transfers = [cell.columns for cell in study.cells if cell.kind == "transfer"]
    assert (len(weights), len(transfers)) == (15, 1445)
    ours = {
        tuple(str(row[name]) for name in ("target", "source", "architecture", "shots", "seed")) for row in transfers
    }
    assert len({row[:4] for row in ours}) == 289
    frame = published.load("cherti2022")
    targets = frame["target"].replace({"covidx_cxr2": "covidx", "padchest": "padchest_cl"})
    keys = frame.assign(target=targets)[["target", "source", "architecture", "shots", "seed"]].astype(str)
    theirs = set(keys.itertuples(index=False, name=None))
    assert theirs <= ours
    # The five that the paper did not publish, named in the file's header.
    pets = {("oxford_pets", "imagenet1k", "resnetv2_50x1_bit", shots, "4") for shots in ("1", "5", "10", "full")}
    assert ours - theirs == pets | {("padchest_cl", "chexpert+mimic", "resnetv2_50x1_bit", "10", "4")}


def test_the_grid_of_paper_b_is_the_published_one():
    study = read_study(STUDIES / "entezari2023.yaml")
    transfers = [cell for cell in study.cells if cell.kind == "transfer"]
    keys = ["target", "source", "architecture", "protocol", "shots"]
    ours = {tuple(str(cell.columns[name]) for name in keys) for cell in transfers}
    theirs = set(entezari2023_rows()[keys].astype(str).itertuples(index=False, name=None))
    # Named in the file's header: mixed architectures, a second set of captions, weights that are given.
    missing = {row[1] for row in theirs - ours}
    assert missing == {
        *("clip_laion0m", "clip_laion2b", "clip_in_1k_clip_captions", "clip_laion400m", "clip_openai400m")
    }
    ours_alone = {(row[1], row[3]) for row in ours - theirs}
    assert {source for source, protocol in ours_alone if protocol == "finetune"} == {
        *("scratch", "imagenet1k", "clip_in1k-captions")
    }
    assert {cell.columns["seed"] for cell in transfers} == {0, 1, 2}
    for cell in transfers:  # whatever a target's own file says
        data = cell.config["data"]["init_args"]
        assert (data["batch_size"], data["image_size"], data["transform"]) == (128, 224, "entezari2023")


def test_every_source_of_paper_b_has_its_size_and_its_views():
    """A data set's class in a later file drops the settings below it."""
    study = read_study(STUDIES / "entezari2023.yaml")
    folders = {cell.name: cell for cell in study.cells if cell.kind == "pretrain"}
    sources = {cell.columns["source"]: folders[cell.weights] for cell in study.cells if cell.weights in folders}
    assert len(sources) == len(folders) == 19
    for name, cell in sources.items():
        data = cell.config["data"]["init_args"]
        size = re.search(r"([\d.]+)m$", name)
        if name.endswith(("cc12m", "cc3m")):
            assert data["num_images"] == 2_700_000
        elif name == "clip_yfcc15m":
            assert data["num_images"] is None  # all of them
        elif size:
            assert data["num_images"] == round(float(size[1]) * 1e6)
        simclr = name.startswith("simclr")
        assert (data.get("augmented_views") == 2) == simclr
        assert (data.get("transform") == "simclr") == simclr


@pytest.mark.parametrize(
    ("name", "only", "cells"),
    [
        ("cherti2022", ["target=tuberculosis", "source=imagenet1k,nih"], 3 + 3),
        ("gerace2023", ["target=nih", "seed=0", "cell=*scratch*,*imagenet1k*-k1-*,*chexpert*-k5f5-*"], 2 + 3),
        ("entezari2023", ["target=dtd", "protocol=lp_ft", "source=simclr_cc12m"], 1 + 4 + 1),
    ],
)
def test_a_paper_study_runs_at_a_tiny_scale(run_cli, tmp_path, name, only, cells):
    words = (STUDIES / f"{name}.yaml", "--scale", "tiny", "--runs_dir", tmp_path)
    code, out, _ = run_cli("study", "run", *words, "--dry-run")
    assert code == 0
    assert "cells cannot be judged" in out
    code, out, err = run_cli("study", "run", *words, "--only", "kind=transfer", *only)
    assert (code, err) == (0, "")
    assert f"{cells}/" in out
    frame = collect(tmp_path / f"{name}-tiny")
    # Pre-training by SimCLR has nothing to test, and the four trials never see a test image.
    assert frame["run"].nunique() == (cells if name != "entezari2023" else 1)
    if name == "entezari2023":
        assert set(frame["method"]) == {"simclr"}
    assert (tmp_path / f"{name}-tiny" / "report" / "results.csv").is_file()
