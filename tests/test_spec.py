"""Mistakes in study files are found when they are read; what would be averaged, lost or mistaken is refused."""

import pytest
import yaml

from studies.layers import StudyError, merge, read_yaml
from studies.spec import read_study
from studies.tuning import Candidate, Tuning, UndecidedError, choose

NET = {"model": {"class_path": "Classification", "init_args": {"backbone": "test_resnet"}}}
DATA = {"data": {"class_path": "Synthetic", "init_args": {"classes": 3}}}
BLOCK = {
    **{"sources": ["scratch", "near"], "architectures": ["net"], "targets": ["far"], "protocols": ["finetune"]},
    **{"shots": [1], "seeds": [0]},
}
STUDY = {
    **{"name": "tiny", "architectures": {"net": NET}, "sources": {"near": {**DATA, "trainer": {"max_epochs": 1}}}},
    **{"targets": {"far": DATA}, "protocols": {"finetune": {"trainer": {"max_steps": 2}}}, "blocks": [BLOCK]},
}
GIVEN = {key: value for key, value in BLOCK.items() if key not in ("sources", "architectures")}
LR = "model.init_args.optimizer.init_args.lr"


@pytest.fixture
def read(tmp_path):
    def call(block=None, **changes):
        blocks = {"blocks": [{**BLOCK, **block}]} if block is not None else {}
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(merge(STUDY, blocks, changes)))
        return read_study(path).cells

    return call


def without(key, **more):
    return {"blocks": [{**{name: value for name, value in BLOCK.items() if name != key}, **more}]}


@pytest.mark.parametrize(
    ("changes", "problem", "where"),
    [
        ({"blocks": 3}, "blocks should be a list, not 3", "line 7, blocks"),
        ({"blocks": [BLOCK, {**BLOCK, "seed": [1]}]}, "unknown key 'seed'; did you mean 'seeds'", "blocks.1.seed"),
        ({"targets": ["far"]}, "targets should map names to settings", "targets"),
        ({"weights": ["far"]}, "weights should map names to settings", "weights"),
        ({"metrics": "accuracy"}, "metrics should map names to settings", "metrics"),
        ({"metrics": {"fra": "loss"}}, "unknown key 'fra'; did you mean 'far'", "metrics.fra"),
        ({"domains": {"neer": "x"}}, "unknown key 'neer'; did you mean 'near'", "domains.neer"),
        ({"published": "cherti2021"}, "'cherti2021'; did you mean 'cherti2022'", "published"),
        ({"prevalence": {"Mass": 5}}, "prevalence: 5", "prevalence.Mass"),
        ({"name": "../x"}, "name: '../x'", "name"),
        ({"config": [{}]}, "config should be a file or a list of files", "study.yaml"),
        ({"config": "nowhere.yaml"}, "no file", "study.yaml"),
        ({"sources": {"near": {"by_architecture": {"nett": {}}}}}, "did you mean 'net'", "by_architecture.nett"),
        ({"sources": {"near": {"by_architecture": "net"}}}, "expected settings, not 'net'", "by_architecture"),
        (without("sources", weights=["x"], architectures=["net"]), "leave architectures out", "architectures"),
        ({"blocks": [{**GIVEN, "weights": ["x"], "pretrain_seeds": [1]}]}, "leave pretrain_seeds", "pretrain_seeds"),
        (without("shots", num_images=[-3]), "num_images: -3", "blocks.0.num_images"),
        (without("shots", fraction=[50]), "fraction: 50", "blocks.0.fraction"),
        (without("shots", fraction=[1, 1.0]), "fraction: 1.0 stands twice", "blocks.0.fraction"),
    ],
)
def test_mistakes_in_a_study(read, changes, problem, where):
    with pytest.raises(StudyError) as error:
        read(**changes)
    assert problem in str(error.value)
    assert where in str(error.value).partition("where: ")[2].splitlines()[0]


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        *(({"shots": [value]}, f"shots: {value!r}") for value in (0, -1, "1", "ful", None, 0.5, True)),
        ({"seeds": ["a"]}, "seeds: 'a'"),
        ({"seeds": [0, 0]}, "seeds: 0 stands twice"),  # it would count as two
        ({"pretrain_seeds": [-1]}, "pretrain_seeds: -1"),
        ({"targets": ["far", "far"]}, "targets: 'far' stands twice"),
        ({"targets": [{"far": 1}]}, "targets: {'far': 1}"),
        ({"depths": []}, "depths should be a list that is not empty"),
        ({"depths": 3}, "depths should be a list that is not empty"),
        ({"depths": ["three"]}, "depths: 'three'"),
        ({"depths": [{"transfer": 1, "frozen": 2}]}, "frozen up to transfer"),
        ({"depths": [2, {"transfer": 2}]}, "depths: "),
        ({"vary": {1: [2]}}, "vary should map settings to lists"),
        ({"vary": {"trainer.max_steps": [2, 2]}}, "trainer.max_steps: 2 stands twice"),
        ({"tune": {"settings": {LR: [0.1, 0.1]}, "metric": "loss"}}, "lr: 0.1 stands twice"),
        ({"tune": {"settings": {}, "metric": "loss"}}, "no settings to choose among"),
    ],
)
def test_values_that_an_axis_cannot_have(read, block, problem):
    with pytest.raises(StudyError) as error:
        read(block)
    assert problem in str(error.value)
    assert f"blocks.0.{next(iter(block))}" in str(error.value)
    assert ", line " in str(error.value)


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 4}\n")
    assert read_yaml(path)["c"] == {"x": 3, "y": 4}
    path.write_text("a: {x: 1}\nb:\n  y: 1\n  z: 2\n  y: 3\n")
    with pytest.raises(StudyError, match="'y' stands twice") as error:
        read_yaml(path)
    assert "line 5" in str(error.value)
    assert "line 3" in str(error.value)


def test_numbers_are_those_of_the_command_line(tmp_path):
    path = tmp_path / "numbers.yaml"
    path.write_text("a: [1e-3, 2.5E+2, .5e1, 1.e2, -1e0, 1e, e1, r50x1, 12]\n")
    assert read_yaml(path)["a"] == [0.001, 250.0, 5.0, 100.0, -1.0, "1e", "e1", "r50x1", 12]


def test_files_that_cannot_be_read(tmp_path, read):
    (tmp_path / "loop.yaml").write_text("config: again.yaml\n")
    (tmp_path / "again.yaml").write_text("config: [loop.yaml]\n")
    with pytest.raises(StudyError, match=r"loop.yaml names itself by config"):
        read(config="loop.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    with pytest.raises(StudyError, match=r"cannot read .*latin.yaml"):
        read(config="latin.yaml")
    (tmp_path / "control.yaml").write_text("a: \x07\n")
    with pytest.raises(StudyError, match=r"cannot read .*control.yaml"):
        read(config="control.yaml")


# Cells ----------------------------------------------------------------------------------------------------------------


def test_depth_means_nothing_from_scratch(read):
    """Else equal runs, each under a depth of its own, would count as several seeds."""
    cells = read({"depths": [1, 2, {"frozen": 1}]})
    assert [cell.columns["source"] for cell in cells if cell.kind == "transfer"] == ["scratch"] + ["near"] * 3
    assert any("-kallf1-" in cell.name for cell in cells)


def test_cells_that_would_be_averaged_are_refused(read):
    longer = {"config": {"trainer": {"max_steps": 9}}}
    with pytest.raises(StudyError, match=r"differ in trainer.max_steps \(2, 9\)") as error:
        read(blocks=[BLOCK, {**BLOCK, **longer}])
    assert "blocks.1" in str(error.value)
    # What result rows show may differ, equal cells are one, and volatile settings make none.
    for other in (
        {**BLOCK, "shots": [2], **longer},
        {**BLOCK, "config": {"data": {"init_args": {"label_noise": 0.1}}}},
        {**BLOCK, "config": {"model": {"init_args": {"frozen_depth": 2}}}, "sources": ["near"]},
        {**BLOCK, "tune": {"settings": {LR: [0.1]}, "metric": "loss"}},
    ):
        assert len(read(blocks=[BLOCK, other])) > 3
    assert len(read(blocks=[BLOCK, {**BLOCK, "config": {"data": {"init_args": {"num_workers": 3}}}}])) == 3


def test_what_varies_is_what_runs(read):
    """Labels of variants are true, whatever else sets the same key."""
    vary = {"vary": {"trainer.max_epochs": [1, 2]}, "by_architecture": {"net": {"trainer": {"max_epochs": 5}}}}
    weights = [cell for cell in read(sources={"near": vary}) if cell.kind == "pretrain"]
    assert [cell.config["trainer"]["max_epochs"] for cell in weights] == [1, 2]
    steps = {"protocols": {"finetune": {"vary": {"trainer.max_steps": [3, 4]}}}}
    cells = read({"sources": ["scratch"], "config": {"trainer": {"max_steps": 7}}}, **steps)
    assert {cell.columns["protocol"]: cell.config["trainer"]["max_steps"] for cell in cells} == {
        "finetune (max_steps=3)": 3,
        "finetune (max_steps=4)": 4,
    }


def test_settings_of_an_architecture_reach_its_variants(read):
    variants = {"net": {**NET, "vary": {"model.init_args.pool": ["avg", "max"]}}}
    own = {"near": {"by_architecture": {"net": {"trainer": {"max_epochs": 5}}}}}
    weights = [cell for cell in read(architectures=variants, sources=own) if cell.kind == "pretrain"]
    assert [cell.config["trainer"]["max_epochs"] for cell in weights] == [5, 5]
    assert [cell.config["model"]["init_args"]["pool"] for cell in weights] == ["avg", "max"]


def test_a_method_of_pre_training_keeps_the_net(read):
    other = {"model": {"class_path": "SimCLR", "init_args": {"temperature": 0.2}}}
    weights, *transfers = read(sources={"near": other})
    assert weights.config["model"] == {
        "class_path": "SimCLR",
        "init_args": {"temperature": 0.2, "backbone": "test_resnet"},
    }
    assert {cell.config["model"]["class_path"] for cell in transfers} == {"Classification"}


def test_names_of_cells_are_names_of_folders(read):
    vary = {"data.init_args.noise_confusion": ["a/b.csv", "c/d.csv"], "trainer.note": ["x" * 300]}
    changes = {"targets": {".a/b": DATA}}
    names = [cell.name for cell in read({"targets": [".a/b"], "vary": vary}, **changes)]
    assert len(set(names)) == 5
    assert not any("/" in name or name.startswith(".") or len(name.encode()) > 190 for name in names)


# Given weights --------------------------------------------------------------------------------------------------------


def test_given_weights_count_by_content(read, tmp_path):
    def name(path, content):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        (cell,) = read(weights={"mine": str(path)}, blocks=[{**GIVEN, "weights": ["mine"]}])
        return cell.name

    large = bytes(range(256)) * 40_000
    first = name(tmp_path / "a" / "net.ckpt", large)
    assert name(tmp_path / "b" / "copy.ckpt", large) == first
    assert name(tmp_path / "a" / "net.ckpt", large[:-1] + b"x") != first
    assert name(tmp_path / "a" / "net.ckpt", large + b"x") != first
    assert name(tmp_path / "a" / "net.ckpt", b"") != name(tmp_path / "a" / "net.ckpt", b"x")
    run = tmp_path / "run"
    run.mkdir()
    (run / "identity.json").write_text("{}")
    names = []
    for _ in range(2):
        (cell,) = read(weights={"mine": str(run)}, blocks=[{**GIVEN, "weights": ["mine"]}])
        names.append(cell.name)
        (run / "identity.json").write_text('{"lr": 1}')
    assert len(set(names)) == 2


def test_weights_of_one_name_are_not_mistaken_for_each_other(read, tmp_path):
    paths = [tmp_path / folder / "last.ckpt" for folder in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_text(str(path))
    with pytest.raises(StudyError, match=r"would be called last.ckpt in the results") as error:
        read(blocks=[{**GIVEN, "weights": [str(path) for path in paths]}])
    assert "weights: {NAME: PATH}" in str(error.value)
    for name in ("near", "scratch"):  # a source's name
        with pytest.raises(StudyError, match=f"would be called {name} in the results"):
            read(weights={name: "resnet18"}, blocks=[{**GIVEN, "weights": [name]}])


# Choosing -------------------------------------------------------------------------------------------------------------


def decide(metric, *values):
    """Choose among candidates 0, 1, ... with these values, one a trial."""
    candidates, evaluations = [], {}
    for index, trials in enumerate(values):
        names = [f"{index}.{fold}" for fold in range(len(trials))]
        candidates.append(Candidate({"x": index}, tuple(names)))
        for name, value in zip(names, trials, strict=True):
            rows = [{"name": "accuracy", "class_name": "", "value": value}]
            evaluations[name] = [*rows, {"name": "accuracy", "class_name": "a", "value": 9}] if value != "none" else []
    return choose(Tuning({"x": [*range(len(values))]}, metric, None), tuple(candidates), evaluations)["x"]


def test_the_first_of_equal_settings_is_chosen_and_undefined_ones_are_not():
    assert decide("accuracy", [0.5, 0.7], [0.7, 0.7], [0.8, 0.6]) == 1
    assert decide("accuracy", [0.9, None], [0.2, 0.3], [float("nan"), 1.0]) == 1


def test_why_nothing_could_be_chosen():
    with pytest.raises(UndecidedError, match="defined in all of their trials"):
        decide("accuracy", [None, 0.5], [0.5, None])
    with pytest.raises(UndecidedError, match="no trial has a validation acuracy; did you mean accuracy"):
        decide("acuracy", [0.5])
    with pytest.raises(UndecidedError, match="val_fraction"):
        decide("accuracy", ["none"])
