"""What a study will take: measured step times × the steps of each cell, and what each number rests on."""

import json
import time

import pytest
import yaml

from studies.cell_folder import CellFolder
from studies.estimates import measure, steps_of, timing_folder
from studies.layers import merge
from studies.spec import read_study
from studies.timing import time_kinds
from tests.test_study import STUDY

HYPERRULE = {"class_path": "HyperRuleSchedule", "init_args": {}}


def finish(folder, seconds, step, n_train, batch=32, rest=4.0):
    """A finished run of `step` steps, which had taken `rest` seconds beside its training."""
    folder.path.mkdir(parents=True, exist_ok=True)
    run = {"seconds": seconds, "step": step, "images_seen": step * batch, "n_train": n_train}
    folder.run.update_summary(state="finished", run=run)
    start = {"time": "2026-01-01T00:00:00+0000", "device": "a device"}
    (folder.path / "environment.json").write_text(json.dumps([start]))
    begun = 1767225600.0
    folder.run.metrics.write_text(json.dumps({"step": step, "time": begun + seconds + rest, "test/loss": 1.0}) + "\n")


def cells_of(study, tmp_path):
    return {cell.name: CellFolder(tmp_path / "tiny" / cell.name) for cell in study.cells}


@pytest.mark.parametrize(
    ("trainer", "schedule", "n_train", "expected"),
    [
        ({"max_steps": 7}, None, None, 7),
        ({"max_epochs": 3}, None, 100, 3 * 3),  # whole batches of 32
        ({"max_epochs": 3}, None, 20, 3),
        ({"max_epochs": 3}, None, None, None),
        ({"max_epochs": 3, "max_steps": 5}, None, 100, 5),
        ({"max_steps": -1}, HYPERRULE, 19_999, 500),
        ({}, HYPERRULE, 20_000, 10_000),
        ({}, HYPERRULE, None, None),
        ({}, {**HYPERRULE, "init_args": {"length": 40}}, None, 40),
        ({}, {**HYPERRULE, "init_args": {"lenght": 40}}, 10, None),  # the run itself says what is wrong
        ({}, None, 10, None),
    ],
)
def test_steps_of_a_run(trainer, schedule, n_train, expected):
    config = {"trainer": trainer, "model": {"init_args": {"lr_scheduler": schedule}}}
    assert steps_of(config, n_train, 32) == expected


def test_steps_of_other_cells_are_scaled(write, tmp_path):
    """Ten epochs: of 1 shot of 3 classes measured, 8 shots follow; of all images nothing is known."""
    block = {**STUDY["blocks"][0], "sources": ["scratch"], "shots": [16, 64, "full"], "seeds": [0]}
    path = write(blocks=[block], protocols={"finetune": {"trainer": {"max_steps": -1, "max_epochs": 10}}})
    study = read_study(path)
    first, second, third = study.cells
    finish(cells_of(study, tmp_path)[first.name], seconds=5.0, step=10, n_train=48)
    known = measure(study, tmp_path)
    assert known.seconds_of(second) == pytest.approx(0.5 * 10 * (192 // 32) + 4.0)
    assert known.seconds_of(third) is None
    estimate = known.estimate([second, third])
    assert (estimate.judged_by, estimate.unknown, estimate.devices) == ({"finished": 1}, [third], {"a device"})
    assert (estimate.sized, estimate.size > 100) == (2, True)


def test_a_network_or_image_size_of_its_own_is_not_guessed(write, tmp_path):
    vary = {"data.init_args.image_size": [16, 32], "model.init_args.frozen_depth": [0, -1]}
    block = {**STUDY["blocks"][0], "sources": ["near"], "shots": [1], "seeds": [0, 1], "vary": vary}
    study = read_study(write(blocks=[block]))
    transfers = [cell for cell in study.cells if cell.kind == "transfer"]
    finish(cells_of(study, tmp_path)[transfers[0].name], 6.0, 2, 3)
    known = measure(study, tmp_path)
    assert [known.seconds_of(cell) is not None for cell in transfers] == [True, True, *[False] * 6]


def test_a_running_cell_tells_and_has_less_left(write, tmp_path):
    study = read_study(write(protocols={"finetune": {"trainer": {"max_steps": 100}}}))
    _, first, second, *_ = study.cells
    folder = cells_of(study, tmp_path)[first.name]
    now = time.time()
    with folder.claim():
        config = merge(first.config, {"data": {"init_args": {"batch_size": 32}}})
        (folder.path / "config.yaml").write_text(yaml.safe_dump(config))
        starts = [time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(now - ago)) for ago in (5000, 60)]
        (folder.path / "environment.json").write_text(json.dumps([{"time": at, "device": "d"} for at in starts]))
        points = ((10, now - 4000), (19, now - 40), (39, now))  # an hour lies between two starts
        lines = [json.dumps({"step": step, "time": at, "train/loss": 1.0}) for step, at in points]
        folder.run.metrics.write_text("\n".join([*lines, '{"step": 59, "ti']))
        known = measure(study, tmp_path)
    assert known.seconds_of(second) == pytest.approx(2.0 * 100)
    assert known.seconds_of(first) == pytest.approx(2.0 * (100 - 39))


def test_timings_fill_what_is_unknown_once(write, tmp_path):
    study = read_study(write())
    timed = []

    def execute(words, cell):
        timed.append(cell.kind)
        folder = timing_folder(study, cell, tmp_path)
        assert words[words.index("--experiment") + 1 :][:3] == [folder.path.parent.name, "--run", cell.name]
        config = yaml.safe_load((folder.path / "cell.yaml").read_text())
        assert config["trainer"]["max_time"]
        if cell.columns.get("shots") == "full":
            raise OSError("no such images")
        finish(folder, 1.0, 10, 36)
        folder.run.checkpoints.mkdir()

    known = measure(study, tmp_path)
    lines = list(time_kinds(study, study.cells, tmp_path, known, execute))
    assert [line.partition(":")[0] for line in lines] == ["timed"] * len(timed)
    assert timed == ["pretrain"]  # the same network, images and batch: nothing else has to be timed
    assert not list((tmp_path / "tiny").glob(".timings/*/checkpoints"))
    again = measure(study, tmp_path)
    assert again.estimate(study.cells).judged_by == {"timed": 9}
    assert list(time_kinds(study, study.cells, tmp_path, again, execute)) == []
    finish(cells_of(study, tmp_path)[study.cells[1].name], 8.0, 2, 3)
    assert measure(study, tmp_path).seconds_of(study.cells[2]) == pytest.approx(8.0 + 4.0)  # real runs come first


def test_a_timing_is_taken_of_real_steps(write, run_cli, tmp_path):
    path = write(blocks=[{**STUDY["blocks"][0], "sources": ["scratch"], "shots": [1], "seeds": [0]}])
    words = ("study", "run", path, "--runs_dir", tmp_path, "--dry-run")
    code, out, err = run_cli(*words, "--measure")
    assert (code, err) == (0, "")
    assert "ms a step of" in out
    assert "1 cells by short timings" in out
    assert not (tmp_path / "tiny" / read_study(path).cells[0].name).exists()
    assert "1 cells by short timings" in run_cli(*words)[1]
