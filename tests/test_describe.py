"""Table 1, the exclusion flow and the counts, against slow computations; DATA on the command line."""

import re
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from datamodules.errors import DataError
from datamodules.exclusions import Exclusion
from datamodules.table import Table, split_column, strings
from studies import description
from studies.commands import describe
from studies.data_argument import build_data, read_data
from tests.data import nih, tables

NAMES = ["Edema", "Pleural_Thickening"]


@pytest.fixture
def nih_root(tmp_path):
    return nih.create(tmp_path / "nih")


@pytest.fixture
def table():
    """400 rows of every optional column, with unknown, uncertain and conflicting values."""
    random = np.random.default_rng(0)
    n = 400
    patient = random.integers(0, 90, n)
    labels = random.choice(np.array([0, 1, np.nan, 0.7], dtype=np.float32), (n, 2), p=[0.5, 0.2, 0.2, 0.1])
    age = np.where(random.random(n) < 0.1, np.nan, random.integers(1, 95, n)).astype(np.float32)
    return Table(
        paths=strings([f"{row}.png" for row in range(n)]),
        labels=labels,
        groups=strings([f"p{number}" for number in patient]),
        split=split_column(np.array(["train", "validation", "test", ""])[patient % 4]),
        metadata={
            "sex": np.array(["F", "M", ""], dtype=object)[np.where(random.random(n) < 0.02, 0, patient % 3)],
            "age": age,
            "view": random.choice(np.array(["PA", "AP", "", "unknown"], dtype=object), n),
            "scanner": np.array([f"scanner_{number}" for number in random.integers(0, 12, n)], dtype=object),
            "date": np.array([f"{2001 + year}-05-03" if year else "" for year in patient % 7], dtype=object),
            "source": np.array(["nih", "padchest"], dtype=object)[patient % 2],
        },
    )


@pytest.fixture
def frame(table):
    """The same table for slow computations, of used rows alone."""
    metadata = {name: np.asarray(column) for name, column in table.metadata.items()}
    whole = pd.DataFrame({"patient": np.asarray(table.groups), "split": np.asarray(table.split), **metadata})
    whole[NAMES] = table.labels
    return whole[whole["split"] != ""]


def rows_of(table):
    return {split: table.rows(split) for split in ("train", "validation", "test")}


def parts_of(frame):
    return {**dict(iter(frame.groupby("split"))), "all used": frame}


def number(cell):
    return int(cell.split(" ")[0].replace(",", ""))


# Table 1 -------------------------------------------------------------------------------------------------------------


def test_table_one_counts_images_and_patients(table, frame):
    first = description.table_one(table, rows_of(table), NAMES)
    assert list(first.columns) == ["train", "validation", "test", "all used"]
    for column, part in parts_of(frame).items():
        each = part.groupby("patient").size()
        assert first.loc[("Images", ""), column] == str(len(part))
        assert first.loc[("Patients (groups)", ""), column] == str(len(each))
        assert first.loc[("Images each, median (max)", ""), column] == f"{each.median():g} ({each.max()})"


def test_sex_counts_every_patient_once(table, frame):
    first = description.table_one(table, rows_of(table), NAMES)
    kinds = {("F",): "F", ("M",): "M", ("F", "M"): "F and M", (): "unknown"}
    for column, part in parts_of(frame).items():
        found = Counter(kinds[tuple(sorted(set(images["sex"]) - {""}))] for _, images in part.groupby("patient"))
        cells = first.loc["Sex, n (% of patients)", column]
        assert {level: number(cell) for level, cell in cells.items()} == {level: found[level] for level in cells.index}
        assert cells["F"] == f"{found['F']} ({100 * found['F'] / found.total():.1f}%)"
    assert number(cells["F and M"]) > 0


def test_age_is_of_images_whose_age_is_known(table, frame):
    first = description.table_one(table, rows_of(table), NAMES)
    for column, part in parts_of(frame).items():
        age = part["age"].astype(float).dropna()
        low, middle, high = age.quantile([0.25, 0.5, 0.75])
        cells = first.loc["Age at the image, years", column]
        assert cells["mean ± SD"] == f"{age.mean():.1f} ± {age.std():.1f}"
        assert cells["median [IQR]"] == f"{middle:.1f} [{low:.1f}–{high:.1f}]"
        assert number(cells["unknown, n"]) == len(part) - len(age)


def test_frequent_levels_have_rows_and_the_rest_is_other(table, frame):
    first = description.table_one(table, rows_of(table), NAMES)
    counts = frame["scanner"].value_counts()
    cells = first.loc["Scanner, n (% of images)", "all used"]
    assert len(cells) == 9
    assert [number(cell) for cell in cells.iloc[:8]] == counts.iloc[:8].tolist()
    assert number(cells["other (4 more)"]) == counts.iloc[8:].sum()
    assert (
        sum(number(cell) for cell in first.loc["Scanner, n (% of images)", "test"]) == (frame["split"] == "test").sum()
    )
    views = first.loc["View, n (% of images)", "train"]
    assert list(views.index)[-1] == "unknown"
    train = frame[frame["split"] == "train"]
    assert number(views["unknown"]) == train["view"].isin(["", "unknown"]).sum()
    assert number(first.loc[("Source, n (% of images)", "nih"), "train"]) == (train["source"] == "nih").sum()


def test_years_pass_over_unknown_dates(table):
    first = description.table_one(table, rows_of(table), NAMES)
    assert first.loc[("Years, first–last", ""), "all used"] == "2002–2007"


def test_prevalence_is_among_decided_cells(table, frame):
    first = description.table_one(table, rows_of(table), NAMES)
    for column, part in parts_of(frame).items():
        for name in NAMES:
            known = part[name].isin([0, 1]).sum()
            positives = (part[name] == 1).sum()
            cell = first.loc[("Positive, n (% of known)", name), column]
            assert cell == f"{positives} ({100 * positives / known:.1f}%)"
            assert number(first.loc[("Known (0 or 1), n (%)", name), column]) == known
        healthy = (~(part[NAMES] == 1).any(axis=1)).sum()
        assert number(first.loc[("No label positive, n (%)", ""), column]) == healthy


def test_classes_and_an_empty_split(tmp_path):
    data = build_data("ImageFolder", ["--root", str(tables.create_tree(tmp_path / "tree", splits=("train", "test")))])
    data.val_fraction = 0
    first = description.table_one(data.read_table(), description.find_usage(data).rows, data.class_names)
    assert first.loc[("Class, n (% of images)", "bee"), "all used"] == "16 (33.3%)"
    assert first["validation"].tolist()[:3] == ["0", "0", "-"]
    assert set(first.loc["Class, n (% of images)", "validation"]) == {"-"}


def test_many_classes_are_summed_up():
    labels = np.repeat(np.arange(40), np.arange(1, 41))
    names = [f"class {number}" for number in range(40)]
    many = Table(strings(labels), labels, strings(range(len(labels))), split_column(["train"] * len(labels)))
    first = description.table_one(many, rows_of(many), names)
    assert first.loc[("Images of each of 40 classes, median (min–max)", ""), "train"] == "20.5 (1–40)"
    assert len(description.label_counts(many, rows_of(many), names)) == 40


# Counts and flow -----------------------------------------------------------------------------------------------------


def test_label_counts_against_a_loop(table, frame):
    counts = description.label_counts(table, rows_of(table), NAMES)
    assert counts[["positives", "negatives", "soft", "unknown"]].to_numpy().sum() == 2 * len(frame)
    assert not counts.duplicated(["label", "split", "view", "source"]).any()
    for row in counts.itertuples():
        same = (frame["split"] == row.split) & (frame["source"] == row.source)
        values = frame.loc[same & (frame["view"].replace("", "unknown") == row.view), row.label].tolist()
        expected = [sum(value == 1 for value in values), sum(value == 0 for value in values)]
        expected += [sum(0 < value < 1 for value in values), sum(value != value for value in values)]
        assert [row.positives, row.negatives, row.soft, row.unknown] == expected


def test_flow_adds_up(table):
    dropped = np.flatnonzero(np.asarray(table.metadata["view"]) == "AP")
    lost = np.setdiff1d(np.flatnonzero(table.labels[:, 0] == 1), dropped)
    kept = np.setdiff1d(np.arange(len(table)), np.concatenate([dropped, lost]))
    available = {split: np.intersect1d(rows, kept) for split, rows in rows_of(table).items()}
    steps = [Exclusion("view is not PA", dropped), Exclusion("positive", lost)]
    rows = {**available, "train": available["train"][:5]}
    usage = description.Usage(steps, available, rows, missing=kept[:3], leaking=0)
    flow = description.exclusion_frame(table, usage, "shots 5").set_index("step")
    assert flow.loc["rows of the release", "images"] == 400
    for column in ("images", "patients"):
        leaving = flow.loc[[step for step in flow.index if step.startswith("left out")], column]
        assert (leaving <= 0).all()
        assert flow.loc["rows of the release", column] + leaving.sum() == flow.loc["used", column]
    used = np.concatenate(list(available.values()))
    groups = np.asarray(table.groups)
    assert flow.loc["used"].tolist() == [len(used), len(set(groups[used]))]
    assert flow.loc["left out: in no split", "images"] == -sum(table.split[row] == "" for row in kept)
    assert flow.loc["used for test"].tolist() == [len(available["test"]), len(set(groups[available["test"]]))]
    assert flow.loc["drawn for train (shots 5)"].tolist() == [5, len(set(groups[rows["train"]]))]
    assert flow.loc["usable, but the image file is missing", "images"] == 3


def test_usage_is_that_of_a_run(nih_root):
    words = ["--root", str(nih_root), "--data.views=[PA]", "--data.num_images", "7"]
    data = build_data("NIHChestXray14", words)
    usage = description.find_usage(data)
    for split in ("train", "validation", "test"):
        assert usage.rows[split].tolist() == data.rows(split).tolist()
    assert [(step.reason, step.rows.tolist()) for step in usage.steps] == [
        (step.reason, step.rows.tolist()) for step in data.excluded
    ]
    assert len(usage.rows["train"]) == 7


# The command ---------------------------------------------------------------------------------------------------------


def test_describe_prints_and_writes(nih_root, tmp_path, capsys):
    describe.run(["describe", "NIHChestXray14", "--root", str(nih_root), "--output", str(tmp_path / "out" / "nih")])
    out = capsys.readouterr().out
    assert "nih: 60 rows of" in out
    assert "split: official" in out
    assert max(map(len, out.splitlines()[3:-1])) <= 100
    assert re.search(r"Pneumonia +\d+ \(\d+\.\d%\)", out)
    assert "Effective counts" not in out
    assert ".png" not in out
    folder = tmp_path / "out" / "nih"
    assert {path.name for path in folder.iterdir()} == {
        *("table1.csv", "table1.tex", "flow.csv", "flow.tex", "label_counts.csv"),
    }
    first = pd.read_csv(folder / "table1.csv", dtype=str, keep_default_na=False).set_index(["characteristic", "level"])
    raw = pd.read_csv(nih_root / "Data_Entry_2017_v2020.csv")
    positives = raw["Finding Labels"].str.split("|").map(lambda findings: "Pneumonia" in findings).sum()
    assert first.loc[("Positive, n (% of known)", "Pneumonia"), "all used"] == f"{positives} ({positives / 0.6:.1f}%)"
    assert number(first.loc[("Sex, n (% of patients)", "F"), "all used"]) == 15
    counts = pd.read_csv(folder / "label_counts.csv")
    assert counts.groupby("label")["positives"].sum()["Pneumonia"] == positives
    assert pd.read_csv(folder / "flow.csv").iloc[0].tolist() == ["rows of the release", 60, 30]


def test_latex_is_escaped(nih_root, tmp_path):
    describe.run(["describe", "NIHChestXray14", "--root", str(nih_root), "--output", str(tmp_path)])
    text = (tmp_path / "table1.tex").read_text()
    body = text.partition("\n")[2]
    assert r"\quad Pleural\_Thickening &" in body
    assert r"Sex, n (\% of patients)" in body
    assert r"mean $\pm$ SD" in body
    assert not re.search(r"(?<!\\)[%_#]", body)
    assert body.isascii()
    assert "split: official" in body
    assert "exact labels" in body
    widths = {line.count(" & ") for line in body.splitlines() if line.endswith(r"\\") and not line.startswith("\\")}
    assert widths == {4}


def test_counts_are_printed_on_request(nih_root, capsys):
    describe.run(["describe", "NIHChestXray14", "--root", str(nih_root), "--counts", "true", "--data.labels=[Hernia]"])
    out = capsys.readouterr().out.partition("Effective counts")[2]
    assert len(re.findall(r"Hernia +(train|validation|test) +(PA|AP)", out)) == 6
    assert "source" not in out


def test_missing_files_do_not_stop_a_description(nih_root, capsys):
    for path in sorted((nih_root / "images").iterdir())[:4]:
        path.unlink()
    words = ["describe", "NIHChestXray14", "--root", str(nih_root)]
    describe.run(words)
    out = capsys.readouterr().out
    assert "4 usable images have no file" in out
    assert re.search(r"the image file is missing +4 +2 *\n", out)
    assert re.search(r"used +60 +30 *\n", out)
    describe.run([*words, "--data.missing_images", "drop"])
    assert re.search(r"left out: no image file +-4 +-2 *\n", capsys.readouterr().out)


def test_leaking_patients_are_named_by_number(nih_root, capsys):
    test = (nih_root / "test_list.txt").read_text().split()
    (nih_root / "test_list.txt").write_text("\n".join(test[1:]))
    with (nih_root / "train_val_list.txt").open("a") as file:
        file.write(f"\n{test[0]}\n")
    words = ["describe", "NIHChestXray14", "--root", str(nih_root)]
    describe.run(words)
    out = capsys.readouterr().out
    assert "LEAK: patients with images in several splits: 1" in out
    assert "a run stops at patients" in out
    describe.run([*words, "--data.leaks", "record"])
    assert "a run stops at patients" not in capsys.readouterr().out


def test_output_that_is_a_file(nih_root, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match="taken"):
        describe.run(["describe", "NIHChestXray14", "--root", str(nih_root), "--output", str(tmp_path / "taken")])


# DATA ----------------------------------------------------------------------------------------------------------------


def test_data_by_fragment_and_by_the_configuration_of_a_run(nih_root, tmp_path):
    fragment = tmp_path / "nih.yaml"
    fragment.write_text("data: {class_path: NIHChestXray14, init_args: {batch_size: 5, shots: 3}}\n")
    run = tmp_path / "run.yaml"
    run.write_text("trainer: {max_epochs: 2}\nmodel: {class_path: Classification}\nrun: null\n" + fragment.read_text())
    for word in (str(fragment), str(run)):
        data = build_data(word, ["--data.shots", "2", "--root", str(nih_root)])
        assert (data.name, data.batch_size, data.shots, data.root) == ("nih", 5, 2, nih_root)
    same = read_data(["--config", str(run), f"--root={nih_root}"], "describe", "")[0]
    assert (same.shots, same.root) == (3, nih_root)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["NIHChestXray15"], "did you mean NIHChestXray14"),
        (["configs/data/nhi.yaml"], "did you mean configs/data/nih.yaml"),
        (["NIHChestXray14", "--data.shot", "3"], "did you mean shots"),
        (["NIHChestXray14", "--data.shots", "few"], "not a valid value of shots"),
        (["ImageTable", "--root", "nowhere"], "no folder nowhere"),
        (["configs/transfer/finetune.yaml"], "data must be given"),
        ([], "data must be given"),
    ],
)
def test_mistakes_in_data(words, problem):
    with pytest.raises(DataError, match=re.escape(problem)) as caught:
        read_data(words, "describe", "")
    assert len(str(caught.value).splitlines()) <= 15


def test_real_radiographs(real_nih, capsys):
    describe.run(["describe", "NIHChestXray14", "--root", str(real_nih)])
    assert re.search(r"Images +\d+ +\d+ +240 +1,000 *\n", capsys.readouterr().out)
