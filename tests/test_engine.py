"""The study engine: axes become cells, trials choose, several processes share the work, kills cost nothing."""

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml

from studies.cell_folder import ATTEMPTS, CellFolder
from studies.jobs import run_study
from studies.layers import merge
from studies.spec import read_study
from studies.store import collect
from tests.test_study import STUDY

ROOT = Path(__file__).parent.parent
BLOCK = STUDY["blocks"][0]
LR = "model.init_args.optimizer.init_args.lr"
OPTIMIZER = {"model": {"init_args": {"optimizer": {"class_path": "SGDAGC", "init_args": {"lr": 0.1}}}}}


def finish(tmp_path, cell):
    folder = CellFolder(tmp_path / "tiny" / cell.name)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.run.update_summary(state="finished")


def transfers(study):
    return [cell for cell in study.cells if cell.kind == "transfer"]


# Axes ----------------------------------------------------------------------------------------------------------------


def test_a_source_may_vary(write):
    vary = {"data.init_args.fraction": [0.5, 1.0], "model.init_args.label_smoothing": [0.0, 0.1]}
    study = read_study(write(sources={"near": {"vary": vary}}))
    weights = [cell for cell in study.cells if cell.kind == "pretrain"]
    assert [cell.config["data"]["init_args"]["fraction"] for cell in weights] == [0.5, 0.5, 1.0, 1.0]
    # Dials have columns of their own; what has none stands in the source's name, so that nothing is averaged.
    assert {cell.columns["source"] for cell in transfers(study)} == {
        "scratch", "near (label_smoothing=0.0)", "near (label_smoothing=0.1)",
    }  # fmt: skip
    assert len(transfers(study)) == 4 + 4 * 4


def test_a_block_may_vary_any_setting(write):
    study = read_study(write({"sources": ["scratch"], "vary": {"trainer.max_steps": [2, 3]}}))
    assert {cell.columns["protocol"] for cell in study.cells} == {"finetune (max_steps=2)", "finetune (max_steps=3)"}
    assert {cell.config["trainer"]["max_steps"] for cell in study.cells} == {2, 3}


def test_depths_and_folds_are_axes(write):
    study = read_study(write({"sources": ["near"], "depths": [0, {"transfer": 2, "frozen": 1}], "folds": 3}))
    init = [(cell.config["model"]["init_args"], cell.config["data"]["init_args"]) for cell in transfers(study)]
    assert {(model["transfer_depth"], model["frozen_depth"]) for model, _ in init} == {(0, 0), (2, 1)}
    assert {(data["folds"], data["fold"]) for _, data in init} == {(3, 0), (3, 1), (3, 2)}
    assert len(init) == 2 * 3 * 4


def test_given_weights_are_an_axis(write):
    block = {key: value for key, value in BLOCK.items() if key not in ("sources", "architectures")}
    path = write(weights={"in21k": "resnetv2_50x1_bit.goog_in21k"})
    spec = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**spec, "blocks": [{**block, "weights": ["in21k", "resnet18.a1_in1k"]}]}))
    study = read_study(path)
    assert {cell.columns["source"] for cell in study.cells} == {"in21k", "resnet18.a1_in1k"}
    assert {cell.config["model"]["init_args"]["weights"] for cell in study.cells} == {
        "resnetv2_50x1_bit.goog_in21k", "resnet18.a1_in1k",
    }  # fmt: skip
    assert all(not cell.needs and "architecture" not in cell.columns for cell in study.cells)


def test_given_weights_bring_their_architecture_along(write, tmp_path):
    source = write({"sources": ["near"], "shots": [1], "seeds": [0]}, name="first")
    assert run_study(read_study(source), tmp_path) == []
    (weights,) = (tmp_path / "first").glob("pretrain*")
    path = write(name="second", weights={"mine": str(weights)})
    spec = yaml.safe_load(path.read_text())
    spec["blocks"] = [{"weights": ["mine"], "targets": ["far"], "protocols": ["finetune"], "shots": [1], "seeds": [0]}]
    spec["config"] = merge(spec["config"], {"model": {"class_path": "Classification"}})
    path.write_text(yaml.safe_dump(spec))
    assert run_study(read_study(path), tmp_path) == []
    old, new = (collect(tmp_path / name).query("metric == 'accuracy'") for name in ("first", "second"))
    old = old[old["protocol"] == "finetune"]
    assert set(new["architecture"]) == {"test_resnet"}
    assert set(new["source"]) == {"mine"}
    assert new["value"].tolist() == old["value"].tolist()
    assert new["weights_hash"].tolist() == old["weights_hash"].tolist()


def test_a_scale_replaces_parts_axes_and_settings(write):
    tiny = {
        "axes": {"seeds": [7]},
        "config": {"trainer": {"max_steps": 1}},
        "targets": {"far": {"data": {"init_args": {"classes": 2}}}},
    }
    path = write(scales={"tiny": tiny})
    whole, small = read_study(path), read_study(path, "tiny")
    assert (whole.name, small.name) == ("tiny", "tiny-tiny")
    assert {cell.columns["seed"] for cell in transfers(small)} == {7}
    assert {cell.config["trainer"]["max_steps"] for cell in small.cells} == {1}
    assert {cell.config["data"]["init_args"]["classes"] for cell in transfers(small)} == {2}
    assert {cell.config["data"]["init_args"]["classes"] for cell in transfers(whole)} == {3}


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ({"vary": {"trainer.max_steps": 3}}, "vary should map settings to lists"),
        ({"depths": [{"transferred": 2}]}, "unknown key 'transferred'; did you mean 'transfer'"),
        ({"folds": 1}, "folds: 1"),
        ({"weights": ["x"]}, "either sources or weights"),
        ({"tune": {"settings": {LR: [0.1]}}}, "no metric to choose by"),
        ({"tune": {"settings": {LR: 0.1}, "metric": "accuracy"}}, "settings:"),
        ({"tune": {"setings": {}}}, "did you mean 'settings'"),
    ],
)
def test_mistakes_in_a_block(write, run_cli, block, problem):
    code, _, err = run_cli("study", "status", write(block))
    assert (code, "Traceback" in err) == (2, False)
    assert problem in err


def test_an_unknown_scale_and_filter(write, run_cli, tmp_path):
    code, _, err = run_cli("study", "run", write(scales={"tiny": {}}), "--scale", "tinny")
    assert code == 2
    assert "did you mean 'tiny'" in err
    code, _, err = run_cli("study", "run", write(), "--only", "sauce=near", "--runs_dir", tmp_path)
    assert code == 2
    assert "did you mean 'source'" in err
    code, _, err = run_cli("study", "run", write(), "--only", "source=nowhere", "--runs_dir", tmp_path)
    assert (code, "no cell of tiny fulfils" in err) == (2, True)


# Tuning --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folds", [None, 2])
def test_trials_choose_and_only_the_winner_sees_test_images(write, tmp_path, folds):
    diverging = [] if folds else [1e30]  # a trial without a finite loss is an outcome, not a failure of the study
    tune = {"settings": {LR: [*diverging, 1e-6, 0.1]}, "metric": "loss", **({"folds": folds} if folds else {})}
    shots = {"shots": [4], "seeds": [0], "sources": ["scratch"]}
    longer = {"trainer": {"max_steps": 12}}
    path = write({**shots, "tune": tune, "config": merge(OPTIMIZER, longer)})
    study = read_study(path)
    trials = [cell for cell in study.cells if cell.kind == "trial"]
    assert len(trials) == (2 + len(diverging)) * (folds or 1)
    (winner,) = transfers(study)
    assert set(winner.needs) == {cell.name for cell in trials}
    assert run_study(study, tmp_path) == []
    summaries = {cell.name: CellFolder(tmp_path / "tiny" / cell.name).run.read_summary() for cell in study.cells}
    assert all("test" not in summaries[cell.name] and "rows" not in summaries[cell.name] for cell in trials)
    losses = {}
    for cell in trials:
        rate = cell.config["model"]["init_args"]["optimizer"]["init_args"]["lr"]
        if rate in diverging:
            assert CellFolder(tmp_path / "tiny" / cell.name).failure().diverged
            continue
        (loss,) = (row["value"] for row in summaries[cell.name]["validation"] if row["name"] == "loss")
        losses[rate] = losses.get(rate, 0.0) + loss
    best = min(losses, key=losses.get)
    frame = collect(tmp_path / "tiny")
    assert set(frame["tuned"]) == {f"lr={best}"}
    assert set(frame["trials"]) == {len(trials)}
    assert frame["selection"].str.startswith("settings by loss on").all()
    ran = CellFolder(tmp_path / "tiny" / winner.name).run.read_config()
    assert ran["model"]["init_args"]["optimizer"]["init_args"]["lr"] == best
    assert not list((tmp_path / "tiny").glob("trial*/checkpoints"))


def test_a_metric_that_no_trial_has_is_named(write, tmp_path):
    tune = {"settings": {LR: [0.1, 0.2]}, "metric": "acuracy"}
    path = write({"shots": [2], "seeds": [0], "sources": ["scratch"], "tune": tune, "config": OPTIMIZER})
    (failure,) = run_study(read_study(path), tmp_path)
    assert "no trial has a validation acuracy" in failure.reason
    assert failure.lasting


# What it says ---------------------------------------------------------------------------------------------------------


def test_dry_run_and_query(write, run_cli, tmp_path):
    path = write({"shots": [1], "seeds": [0]})
    code, out, _ = run_cli("study", "run", path, "--runs_dir", tmp_path, "--dry-run")
    assert code == 0
    assert "3 cells (1 pretrain, 2 transfer), 0 finished" in out
    assert "3 cells cannot be judged" in out
    assert "--measure" in out
    assert not (tmp_path / "tiny").exists()
    only = ("--only", "source=scratch", "kind=transfer")
    assert run_cli("study", "run", path, "--runs_dir", tmp_path, *only)[0] == 0
    code, out, _ = run_cli("study", "run", path, "--runs_dir", tmp_path, "--dry-run")
    assert "1 finished" in out
    assert "for 1 cells, their steps × measured seconds a step" in out
    assert "1 cells by finished runs" in out
    assert "disk: " in out
    code, out, _ = run_cli(
        "study", "query", path, "--runs_dir", tmp_path, "--where", "metric=accuracy,mean_auroc", "value>=0"
    )
    assert (code, "2 rows" in out) == (0, True)
    table = tmp_path / "rows.parquet"
    code, *_ = run_cli(
        "study", "query", path, "--runs_dir", tmp_path, "--where", "class_name=class 0", "--output", table
    )
    assert code == 0
    assert set(pd.read_parquet(table)["class_name"]) == {"class 0"}
    code, _, err = run_cli("study", "query", path, "--runs_dir", tmp_path, "--where", "metrik=accuracy")
    assert (code, "did you mean 'metric'" in err) == (2, True)


def test_status_shows_what_runs(write, run_cli, tmp_path):
    path = write({"sources": ["scratch"], "shots": [1], "seeds": [0, 1]})
    first, _ = read_study(path).cells
    folder = CellFolder(tmp_path / "tiny" / first.name)
    with folder.claim() as mine:
        assert mine
        lines = [{"step": 1, "train/loss": 0.7}, {"step": 2, "train/loss": 0.5}]
        folder.run.metrics.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "tr')
        code, out, _ = run_cli("study", "status", path, "--runs_dir", tmp_path)
    assert code == 0
    assert f"running: {first.name}  step 2, train/loss 0.500" in out


def test_status_knows_what_waits_in_vain_and_ends(write, run_cli, tmp_path):
    path = write({"sources": ["near"], "shots": [1], "seeds": [0, 1]})
    weights = CellFolder(tmp_path / "tiny" / read_study(path).cells[0].name)
    weights.path.mkdir(parents=True)
    for _ in range(ATTEMPTS):
        weights.record_failure("no memory", "", code=1)
    code, out, _ = run_cli("study", "status", path, "--runs_dir", tmp_path, "--watch")
    assert (code, "2 of the waiting cells need one that failed" in out) == (0, True)


def test_query_leaves_out_cells_that_the_file_no_longer_has(write, run_cli, tmp_path):
    for lengths in ([2], [3]):
        path = write({"sources": ["scratch"], "shots": [1], "seeds": [0], "vary": {"trainer.max_steps": lengths}})
        (cell,) = read_study(path).cells
        finish(tmp_path, cell)
        row = {**cell.columns, "metric": "accuracy", "value": 0.5}
        CellFolder(tmp_path / "tiny" / cell.name).run.update_summary(rows=[row])
    query = ("study", "query", path, "--runs_dir", tmp_path)
    code, out, _ = run_cli(*query, "--columns", "protocol, value")
    assert (code, "1 rows" in out, "1 cells that the study's file no longer has" in out) == (0, True, True)
    assert "max_steps=2" not in out
    for words, problem in (
        (("--output", "rows.xlsx"), ".csv, .parquet"),
        (("--output", tmp_path / "nowhere" / "rows.csv"), "cannot write"),
        (("--columns", "sauce"), "did you mean 'source'"),
    ):
        code, _, err = run_cli(*query, *words)
        assert (code, problem in err, "Traceback" in err) == (2, True, False)
