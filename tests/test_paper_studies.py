"""The studies of the papers: their grids are the published ones, and they run at a tiny scale on generated images."""

from pathlib import Path

import pytest

from studies import published
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


@pytest.mark.parametrize(
    ("name", "only", "cells"),
    [
        ("cherti2022", ["target=tuberculosis", "source=imagenet1k,nih"], 3 + 3),
        ("gerace2023", ["target=nih", "seed=0", "cell=*scratch*,*imagenet1k*-k1-*,*chexpert*-k5f5-*"], 2 + 3),
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
    assert frame["run"].nunique() == cells
    assert (tmp_path / f"{name}-tiny" / "report" / "results.csv").is_file()
