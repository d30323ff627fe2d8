"""Several chest X-ray sets as one: labels, splits, sampling, metrics of each source, through the command line, too."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml

from datamodules import ChestXrayMixture, ImageTable, NIHChestXray14
from datamodules.chest_xray.mixture import source_shares
from datamodules.errors import DataError
from tests.data import nih, tables
from tests.datamodule_contract import DataModuleContract, no_image

COLUMNS = {"path": "file", "label": ["Pneumonia", "Pleural Effusion"], "group": "patient", "site": "site"}


def create(root):
    for name in ("nih", "clinic"):
        (root / name).mkdir(parents=True)
    nih.create(root / "nih", patients=40)
    tables.create_csv(
        root / "clinic",
        patients=60,
        images_each=1,
        change=lambda rows: [{**row, "Pleural Effusion": row["Effusion"]} for row in rows],
    )


def sources(root, **nih_arguments):
    return [
        NIHChestXray14(root=str(root / "nih"), **nih_arguments),
        ImageTable(root=str(root / "clinic"), table="labels.csv", columns=COLUMNS, mode="grey"),
    ]


class TestMixture(DataModuleContract):
    channels = 1

    def create(self):
        create(self.root)

    def build(self, **arguments):
        return ChestXrayMixture(sources=sources(self.root), **arguments)

    def test_labels_of_both_or_of_any(self):
        assert self.make().class_names == ["Effusion", "Pneumonia"]
        union = self.make(merge="union")
        assert len(union.class_names) == 14
        table = union.read_table()
        clinic = table.metadata["source"] == "clinic"
        known = ~np.isnan(table.labels[clinic]).all(axis=0)
        assert [name for name, on in zip(union.class_names, known, strict=True) if on] == ["Effusion", "Pneumonia"]
        assert not np.isnan(table.labels[~clinic]).any()

    def test_rows_are_those_of_the_sources(self):
        data = self.make()
        table, parts = data.read_table(), [source.read_table() for source in sources(self.root)]
        assert len(table) == sum(map(len, parts)) == 140
        assert table.paths[0] == f"nih/{parts[0].paths[0]}"
        assert table.groups[80] == f"clinic/{parts[1].groups[0]}"
        np.testing.assert_array_equal(table.labels[80:], parts[1].labels[:, [1, 0]])
        assert table.where(80).endswith("clinic/labels.csv, line 2")
        assert list(table.split[:80]) == list(parts[0].split)
        np.testing.assert_array_equal(data.read_images([3, 90])[1], sources(self.root)[1].read_images([10])[0])

    def test_a_source_keeps_its_test_set(self):
        data = self.make()
        alone = sources(self.root)[1]
        test = [row - 80 for row in data.rows("test") if row >= 80]
        assert test == alone.rows("test").tolist()

    def test_views_of_one_source(self):
        data = ChestXrayMixture(sources=sources(self.root, views=["PA"]), image_size=16)
        data.setup()
        assert [(step.reason, len(step.rows)) for step in data.excluded] == [("nih: view is not PA", 40)]

    def test_missing_file_of_a_source(self):
        (self.root / "clinic" / "images" / "p003_0.png").unlink()
        with no_image(), pytest.raises(DataError, match=r"clinic/images/p003_0\.png") as error:
            self.make().setup()
        assert "clinic/labels.csv, line 5" in str(error.value)
        with pytest.warns(UserWarning, match="1 images of nih"):
            self.make(missing_images="drop").setup()

    @pytest.mark.parametrize(("sampling", "temperature"), [("uniform", 1), ("temperature", 2), ("size", 1)])
    def test_shares_of_the_stream(self, sampling, temperature):
        data = self.make(sampling=sampling, temperature=temperature, batch_size=40, val_fraction=0.0)
        rows = data.rows("train")
        own = np.array([(rows < 80).sum(), (rows >= 80).sum()])
        expected = {
            "uniform": [0.5, 0.5],
            "size": own / own.sum(),
            "temperature": own**0.5 / (own**0.5).sum(),
        }[sampling]
        loader = data.train_dataloader()
        drawn = np.concatenate([batch["index"].numpy() for _ in range(40) for batch in loader])
        assert (drawn < 80).mean() == pytest.approx(expected[0], abs=0.02)

    def test_shares_by_hand(self):
        np.testing.assert_allclose(source_shares([100, 900], 1), [0.1, 0.9])
        np.testing.assert_allclose(source_shares([100, 900], 2), [0.25, 0.75])
        np.testing.assert_allclose(source_shares([100, 900], np.inf), [0.5, 0.5])

    def test_settings_belong_to_the_mixture(self):
        with pytest.raises(DataError, match="shots is set for the source nih") as error:
            ChestXrayMixture(sources=sources(self.root, shots=5))
        assert "sources[0].init_args.shots" in str(error.value)
        with pytest.raises(DataError, match="two or more different sets"):
            ChestXrayMixture(sources=sources(self.root)[:1])
        with pytest.raises(DataError, match="balance and sampling"):
            self.make(balance=True, sampling="uniform")

    def test_a_leaky_source_does_not_excuse_another(self):
        frame = pd.read_csv(self.root / "clinic" / "labels.csv", dtype=str, keep_default_na=False)
        frame["split"] = np.where(np.arange(len(frame)) % 3 == 0, "test", "train")
        frame["patient"] = [f"p{number // 2}" for number in range(len(frame))]
        frame.to_csv(self.root / "clinic" / "labels.csv", index=False)
        columns = {**COLUMNS, "split": "split"}
        clinic = ImageTable(root=str(self.root / "clinic"), table="labels.csv", columns=columns, mode="grey")
        parts = [NIHChestXray14(root=str(self.root / "nih"), split="cherti2022"), clinic]
        with pytest.raises(DataError, match=r"groups occur in more than one split: clinic/p0"):
            ChestXrayMixture(sources=parts, image_size=16).setup()
        data = ChestXrayMixture(sources=parts, image_size=16, leaks="record")
        with pytest.warns(UserWarning, match="patients in several splits"):
            data.setup()
        alone = ChestXrayMixture(sources=[parts[0], sources(self.root)[1]], image_size=16)
        with pytest.warns(UserWarning, match="nih/"):
            alone.setup()
        assert alone.split_policy.startswith("nih: cherti2022: by image")

    def test_no_label_in_common(self, tmp_path):
        tables.create_csv(tmp_path / "other")
        columns = {"path": "file", "label": ["Scoliosis"], "group": "patient"}
        frame = pd.read_csv(tmp_path / "other" / "labels.csv", dtype=str, keep_default_na=False)
        frame.rename(columns={"Effusion": "Scoliosis"}).to_csv(tmp_path / "other" / "labels.csv", index=False)
        spine = ImageTable(root=str(tmp_path / "other"), table="labels.csv", columns=columns, mode="grey")
        with pytest.raises(DataError, match="no label is annotated by all"):
            ChestXrayMixture(sources=[sources(self.root)[0], spine])


def test_through_the_command_line(tmp_path, run_cli):
    create(tmp_path / "data")
    parts = [
        {"class_path": "NIHChestXray14", "init_args": {"root": str(tmp_path / "data" / "nih")}},
        {
            "class_path": "ImageTable",
            "init_args": {
                "root": str(tmp_path / "data" / "clinic"),
                "table": "labels.csv",
                "columns": COLUMNS,
                "mode": "grey",
            },
        },
    ]
    config = {
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False},
        "model": {"class_path": "Classification", "init_args": {"backbone": "test_resnet"}},
        "data": {
            "class_path": "ChestXrayMixture",
            "init_args": {"sources": parts, "sampling": "uniform", "image_size": 16, "batch_size": 8},
        },
    }
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(config))
    words = ["fit", "--config", tmp_path / "mix.yaml", "--runs_dir", tmp_path / "runs", "--run", "a"]
    assert run_cli(*words, "--evaluate", "true")[::2] == (0, "")
    folder = tmp_path / "runs" / "mix" / "a"
    summary = json.loads((folder / "summary.json").read_text())
    accuracy = {
        row.get("subgroup"): row for row in summary["rows"] if row["metric"] == "accuracy" and not row["class_name"]
    }
    assert set(accuracy) == {None, "source=nih", "source=clinic"}
    assert accuracy["source=nih"]["n_test"] + accuracy["source=clinic"]["n_test"] == accuracy[None]["n_test"]
    assert accuracy[None]["target"] == "nih+clinic"
    assert accuracy[None]["label_policy"].startswith("intersection of labels; nih: ontology 1, exact labels")
    stored = pd.read_parquet(folder / "predictions.parquet").query("split == 'test'")
    part = stored[stored["id"].str.startswith("nih/")]
    hits = [(part[f"logit/{name}"] > 0) == part[f"label/{name}"] for name in ("Effusion", "Pneumonia")]
    assert np.mean(hits) == pytest.approx(accuracy["source=nih"]["value"])
    # Tested on its own data again, protocol direct has the sources' rows, too.
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": config["data"], "trainer": {"max_epochs": "wrong"}}))
    assert run_cli("test", "--run", folder, "--data", tmp_path / "data.yaml")[0] == 0
    (direct,) = (folder / "direct").iterdir()
    rows = json.loads((direct / "summary.json").read_text())["rows"]
    assert {row.get("subgroup") for row in rows} == {None, "source=nih", "source=clinic"}
    # Paths of the sources are no part of what the run is: it is known again after they have moved.
    (tmp_path / "data").rename(tmp_path / "moved")
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(config).replace(str(tmp_path / "data"), str(tmp_path / "moved")))
    code, out, _ = run_cli(*words)
    assert (code, "is finished" in out) == (0, True)
    record = pd.read_parquet(folder / "training_images.parquet")
    assert set(record["dataset"]) == {"nih", "clinic"}
    assert record.query("dataset == 'nih'")["image"].str.startswith("images/").all()
