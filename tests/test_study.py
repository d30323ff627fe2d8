"""Studies: blocks become cells with stable names; weights feed transfers; finished cells stay; failures stand apart."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml

from studies.cell_folder import CellFolder
from studies.jobs import run_study
from studies.layers import merge
from studies.runs import RunFolder
from studies.spec import read_study

ROOT = Path(__file__).parent.parent

STUDY = {
    "name": "tiny",
    "config": {"trainer": {"accelerator": "cpu", "devices": 1, "log_every_n_steps": 1}},
    "architectures": {"net": {"model": {"class_path": "Classification", "init_args": {"backbone": "test_resnet"}}}},
    "sources": {
        "near": {
            "trainer": {"max_epochs": 1},
            "data": {"class_path": "Synthetic", "init_args": {"num_train": 40, "num_test": 20, "image_size": 16}},
        }
    },
    "targets": {
        "far": {
            "data": {
                "class_path": "Synthetic",
                "init_args": {"role": "target", "num_train": 40, "num_test": 20, "image_size": 16, "classes": 3},
            }
        }
    },
    "protocols": {"finetune": {"trainer": {"max_steps": 2}}},
    "blocks": [
        {
            "sources": ["scratch", "near"],
            "architectures": ["net"],
            "targets": ["far"],
            "protocols": ["finetune"],
            "shots": [1, "full"],
            "seeds": [0, 1],
        }
    ],
}


@pytest.fixture
def write(tmp_path):
    def call(**changes):
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(merge(STUDY, changes)))
        return path

    return call


def test_cells_are_the_product_and_weights_come_first(write):
    cells = read_study(write()).cells
    assert [cell.kind for cell in cells] == ["pretrain"] + ["transfer"] * 8
    assert {cell.weights for cell in cells if cell.columns["source"] == "near"} == {cells[0].name}
    assert {(cell.columns.get("shots"), cell.columns.get("seed")) for cell in cells[1:]} == {
        (shots, seed) for shots in ("1", "full") for seed in (0, 1)
    }
    assert len({cell.name for cell in cells}) == 9


def names(path):
    return {cell.name for cell in read_study(path).cells}


def test_names_hold_what_decides_a_result_and_nothing_else(write):
    plain = names(write())
    workers = {"targets": {"far": {"data": {"init_args": {"num_workers": 2, "root": "/elsewhere"}}}}}
    assert names(write(**workers)) == plain
    assert names(write(config={"trainer": {"accelerator": "gpu", "strategy": "ddp"}})) == plain
    rate = {"protocols": {"finetune": {"trainer": {"max_steps": 3}}}}
    changed = names(write(**rate))
    assert {name for name in changed & plain if not name.startswith("pretrain")} == set()
    # Other weights are other cells; transfers from scratch stay what they were.
    source = names(write(sources={"near": {"trainer": {"max_epochs": 2}}}))
    assert {name for name in plain - source if "from-scratch" in name} == set()
    assert len(source & plain) == 4


def test_a_block_may_override(write):
    blocks = [{**STUDY["blocks"][0], "config": {"trainer": {"max_steps": 5}}}]
    cells = read_study(write(blocks=blocks)).cells
    assert {cell.config["trainer"].get("max_steps") for cell in cells if cell.kind == "transfer"} == {5}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"protocolls": {}}, "unknown key 'protocolls'; did you mean 'protocols'"),
        ({"blocks": [{**STUDY["blocks"][0], "sources": ["neer"]}]}, "sources has no 'neer'; did you mean 'near'"),
        ({"blocks": [{**STUDY["blocks"][0], "shot": [1]}]}, "unknown key 'shot'; did you mean 'shots'"),
        ({"blocks": [{**STUDY["blocks"][0], "fraction": [0.5]}]}, "exactly one of shots, num_images, fraction"),
        ({"blocks": [{**STUDY["blocks"][0], "seeds": []}]}, "seeds should be a list that is not empty"),
        ({"targets": {"far": {"config": "nowhere.yaml"}}}, "no file"),
    ],
)
def test_mistakes_in_a_study_file(write, run_cli, changes, problem):
    code, _, err = run_cli("study", "status", write(**changes))
    assert code == 2
    assert problem in err
    assert "Traceback" not in err


def test_broken_study_file_names_its_line(tmp_path, run_cli):
    path = tmp_path / "broken.yaml"
    path.write_text("name: x\nblocks: [1, 2\nsources: {}\n")
    code, _, err = run_cli("study", "run", path)
    assert code == 2
    assert "broken.yaml, line" in err


def test_study_runs_reports_and_resumes(write, run_cli, tmp_path):
    path, runs = write(), tmp_path / "runs"
    code, out, err = run_cli("study", "run", path, "--runs_dir", runs)
    assert (code, err) == (0, "")
    report = runs / "tiny" / "report"
    assert {"results.csv", "summary.md", "few_shot.png", "few_shot.svg", "report.md"} <= {
        entry.name for entry in report.iterdir()
    }
    results = pd.read_csv(report / "results.csv", dtype={"shots": str})
    transfers = results[results["protocol"] == "finetune"]
    accuracy = transfers[transfers["metric"] == "accuracy"]
    assert len(accuracy) == 8
    assert set(accuracy["source"]) == {"scratch", "near"}
    assert set(accuracy.loc[accuracy["source"] == "near", "source_n"]) == {36}
    assert accuracy["weights_hash"].notna().sum() == 4
    assert not list((runs / "tiny").glob("far-*/checkpoints"))  # transfer cells keep rows and predictions only
    assert list((runs / "tiny").glob("far-*/predictions.parquet"))
    # Again: nothing is trained anew.
    stamps = {entry: entry.stat().st_mtime_ns for entry in (runs / "tiny").glob("*/summary.json")}
    code, out, _ = run_cli("study", "run", path, "--runs_dir", runs)
    assert code == 0
    assert "9 cells, 9 finished already" in out
    assert stamps == {entry: entry.stat().st_mtime_ns for entry in (runs / "tiny").glob("*/summary.json")}
    code, out, _ = run_cli("study", "status", path, "--runs_dir", runs)
    assert re.search(r"transfer +8 +– +– +– +–", out)
    # A source cell tested on other data, without training there, is part of the study's report.
    (source,) = (folder.parent for folder in (runs / "tiny").glob("*/checkpoints"))
    assert run_cli("test", "--run", source, "--data", "Synthetic", "--data.init_args.num_test", "20")[0] == 0
    assert run_cli("study", "report", path, "--runs_dir", runs)[0] == 0
    assert "direct" in set(pd.read_csv(report / "results.csv")["protocol"])


def test_a_failed_cell_is_reported_and_does_not_stop_the_others(write, run_cli, tmp_path):
    # 100 shots do not exist among 40 images.
    path, runs = write(blocks=[{**STUDY["blocks"][0], "sources": ["scratch"], "shots": [1, 100]}]), tmp_path / "runs"
    code, out, err = run_cli("study", "run", path, "--runs_dir", runs)
    assert code == 1
    assert "2 of 4 cells failed" in err
    assert "class 0" in err
    assert "Traceback" not in err
    text = (runs / "tiny" / "report" / "report.md").read_text()
    assert "shots100" in text
    code, out, _ = run_cli("study", "status", path, "--runs_dir", runs)
    assert re.search(r"transfer +2 +– +– +2 +–", out)


def test_transfers_of_failed_weights_do_not_start(write, tmp_path):
    study = read_study(write())
    started = []

    def execute(words, cell):
        started.append(cell.name)
        if cell.kind == "pretrain":
            raise RuntimeError("no memory")
        RunFolder(tmp_path / "tiny" / cell.name).update_summary(state="finished")

    failures = run_study(study, tmp_path, execute)
    assert len(started) == 4 + 3  # the weights are tried three times
    assert {failure.reason for failure in failures} == {"no memory", f"what it needs failed: {study.cells[0].name}"}
    assert json.loads((tmp_path / "tiny" / study.cells[0].name / "failed.json").read_text())["reason"] == "no memory"


def test_interrupted_study_goes_on_where_it_was(write, tmp_path):
    study = read_study(write())
    done = []

    def execute(words, cell):
        if len(done) == 3 and "again" not in done:
            done.append("again")
            raise KeyboardInterrupt
        done.append(cell.name)
        RunFolder(tmp_path / "tiny" / cell.name).update_summary(state="finished")

    with pytest.raises(KeyboardInterrupt):
        run_study(study, tmp_path, execute)
    assert run_study(study, tmp_path, execute) == []
    cells = [name for name in done if name != "again"]
    assert sorted(cells) == sorted(cell.name for cell in study.cells)  # every cell once
    assert all(CellFolder(tmp_path / "tiny" / name).finished() for name in cells)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "studies").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_studies_parse(path):
    study = read_study(path)
    assert study.name == path.stem
    assert len({cell.columns["source"] for cell in study.cells if cell.kind == "transfer"}) > 1


def test_a_mistake_in_a_cell_is_the_reason_of_its_failure(write, run_cli, tmp_path):
    changes = {"targets": {"far": {"data": {"init_args": {"btch_size": 3}}}}}
    path, runs = write(**changes), tmp_path / "runs"
    code, _, err = run_cli("study", "run", path, "--runs_dir", runs)
    assert code == 2  # at once: a transfer would find out when its pre-training is done
    assert "did you mean batch_size" in err
    assert not (runs / "tiny").exists()
    code, _, err = run_cli("study", "run", path, "--runs_dir", runs, "--only", "source=scratch", "target=far")
    assert code == 1  # what needs no other cell is tried
    assert "of 9 cells failed" in err
    assert "btch_size" in err
    _, out, _ = run_cli("study", "status", path, "--runs_dir", runs)
    assert "did you mean batch_size" in out
