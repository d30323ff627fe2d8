"""What is exported computes the run's logits in timm and in onnxruntime, and its card tells the truth."""

import json
import math
import re
import resource
import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import create_transform as timm_transform
from timm.data import resolve_model_data_config
from timm.layers import StdConv2d

from datamodules.errors import DataError
from datamodules.transforms import POLICIES, create_transform
from lightning_modules.backbones.standardisation import set_standardisation_eps
from lightning_modules.classification import Classification
from lightning_modules.errors import ModelError
from studies import export as exports
from studies.commands import weights
from studies.commands.predict import Predictor
from studies.export import crop_share, export, input_facts
from studies.model_card import data_classes, history, model_card
from studies.patient_bootstrap import estimate
from studies.runs import RunFolder
from tests.data.images import picture, write_image

SIDE = 37  # short side before the centre crop of 32: the photos need no resizing
LONGER = (0, 1, 3, 4, 5, 7)  # and no margin whose half timm rounds up, and we down: (side - 32) / 2 is not 3.5


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs on photos, the second one from the first one's weights."""
    from cli import main

    root = tmp_path_factory.mktemp("export")
    for split in ("train", "val", "test"):
        for number, name in enumerate(("ant", "bee|wasp")):
            for image in range(6):
                path = root / "photos" / split / name / f"{image:03d}.png"
                write_image(path, 100 * number + image + 10 * len(split), size=(SIDE, SIDE + LONGER[image]))
    for name, mode, facts in (
        ("first", "rgb", {}),
        ("second", "grey", {"in_chans": 1, "weights": str(root / "runs" / "e" / "first")}),
    ):
        config = {
            "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_progress_bar": False},
            "model": {
                "class_path": "Classification",
                "init_args": {"backbone": "test_resnet", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], **facts},
            },
            "data": {
                "class_path": "ImageFolder",
                "init_args": {
                    **{"root": str(root / "photos"), "image_size": 32, "transform": "inception_crop"},
                    "mode": mode,
                },
            },
        }
        (root / f"{name}.yaml").write_text(yaml.safe_dump(config))
        folder = ["--runs_dir", str(root / "runs"), "--experiment", "e", "--run", name]
        main(["fit", "--config", str(root / f"{name}.yaml"), *folder, "--evaluate", "true"])
    return root / "runs" / "e"


def logits_of(run):
    frame = pd.read_parquet(run / "predictions.parquet").query("split == 'test'")
    return frame["id"].tolist(), frame[["logit/ant", "logit/bee|wasp"]].to_numpy()


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# timm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "mode"), [("first", "RGB"), ("second", "L")])
def test_timm_gives_the_runs_logits(runs, tmp_path, capsys, name, mode):
    weights.run(["weights", "export", str(runs / name), "--output", str(tmp_path / "net")])
    assert f"local-dir:{tmp_path / 'net'}" in capsys.readouterr().out
    model = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True).eval()
    transform = timm_transform(**resolve_model_data_config(model), is_training=False)
    ids, expected = logits_of(runs / name)
    images = [transform(Image.open(runs.parent.parent / "photos" / path).convert(mode)) for path in ids]
    with torch.inference_mode():
        found = model(torch.stack(images)).numpy()
    tolerance = 1e-5 if mode == "RGB" else 2e-2  # Pillow and OpenCV round greys of coloured photos differently
    np.testing.assert_allclose(found, expected, atol=tolerance * max(1, np.abs(expected).max()))
    assert model.pretrained_cfg["label_names"] == ["ant", "bee|wasp"]
    assert (model.num_classes, model.pretrained_cfg["num_classes"]) == (2, 2)


def test_config_has_nothing_of_other_weights(runs, tmp_path):
    export(runs / "first", tmp_path / "net", "timm")
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    assert config["architecture"] == "test_resnet"
    assert config["farshot"] == {"task": "multiclass", "thresholds": [], "grey": False, "window": None}
    facts = config["pretrained_cfg"]
    assert not {"license", "tag", "hf_hub_id", "url", "test_input_size", "origin_url"} & facts.keys()
    assert facts["input_size"] == [3, 32, 32]
    assert math.floor(32 / facts["crop_pct"]) == SIDE
    np.testing.assert_allclose([facts["mean"], facts["std"]], [[0.4, 0.5, 0.6], [0.2, 0.3, 0.4]], rtol=1e-6)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "net").iterdir()}
    assert len(modes) == 1, "some file is not as readable as the others"


def test_crop_share_undoes_timms_floor():
    for size in (*range(1, 600), 1000):
        for short_side in (size, round(size * 256 / 224), round(size * 160 / 128), 2 * size + 1):
            assert math.floor(size / crop_share(size, short_side)) == short_side


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", [32, 224])
def test_timms_preprocessing_shows_the_same(policy, size):
    """The same part of the image at the same scale, for images that shrink and that grow, square and not."""
    model = Classification("test_resnet", 2, "multiclass", mean=[0.0], std=[1.0])
    transform = create_transform(policy, size, train=False)
    facts = input_facts(Predictor(model, transform, "rgb", None, []))
    words = {name: facts[name] for name in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")}
    theirs = timm_transform(**words, is_training=False)
    assert facts["pads"] == (policy in {"chest_xray", "simclr_chest_xray"})
    for height, width in ((100, 100), (300, 300), (300, 220)):
        image = picture(3, height, width, channels=3)
        ours = transform(image, 0).astype(float)
        difference = np.abs(theirs(Image.fromarray(image)).numpy() * 255 - ours)
        if facts["pads"] and height != width:  # timm's border has the mean colour
            difference = difference[ours > 0]
        # A side that is rounded up here and down there moves the picture by up to half a pixel.
        assert difference.mean() < (1.5 if size == 224 else 4), (policy, height, width)


def test_another_epsilon_of_standardised_weights_is_exported(tmp_path):
    model = Classification("resnetv2_50x1_bit", 2, "multiclass")
    with torch.no_grad():
        for layer in model.backbone.modules():
            if isinstance(layer, StdConv2d):
                layer.weight *= 1e-4 / layer.weight.std()
    before = model.eval()(torch.ones(1, 3, 32, 32))
    set_standardisation_eps(model.backbone, 1e-10)
    assert (before - model(torch.ones(1, 3, 32, 32))).abs().max() > 1e-3  # it matters
    predictor = Predictor(model, create_transform("bit", 32, train=False), "rgb", None, [])
    (tmp_path / "net").mkdir()
    exports._write_timm(predictor, input_facts(predictor), tmp_path / "net")  # which compares the logits


def test_what_timm_computes_otherwise_is_refused(runs, tmp_path, monkeypatch):
    real = timm.create_model

    def shifted(name, **settings):
        model = real(name, **settings)
        if name.startswith("local-dir"):
            torch.nn.init.normal_(model.fc.bias)
        return model

    monkeypatch.setattr(timm, "create_model", shifted)
    with pytest.raises(DataError, match="does not compute the run's logits"):
        export(runs / "first", tmp_path / "net", "timm")
    assert files(tmp_path) == []


# The folder -------------------------------------------------------------------------------------------------------


def test_nothing_is_replaced_without_being_told(runs, tmp_path, monkeypatch):
    folder = tmp_path / "net"
    folder.mkdir()
    export(runs / "first", folder, "timm")  # an empty folder is no loss
    card = (folder / "README.md").read_text()
    with pytest.raises(DataError, match=r"exists\n.*\n.*--overwrite"):
        export(runs / "second", folder, "timm")
    export(runs / "second", folder, "timm", overwrite=True)
    assert (folder / "README.md").read_text() != card
    assert files(folder) == ["README.md", "config.json", "model.safetensors"]

    monkeypatch.setattr("studies.model_card.model_card", lambda *_: 1 / 0)
    before = (folder / "README.md").read_text()
    with pytest.raises(ZeroDivisionError):
        export(runs / "first", folder, "timm", overwrite=True)
    assert (folder / "README.md").read_text() == before
    assert files(tmp_path) == ["net"]

    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"no export's: thesis.tex") as error:
        export(runs / "first", folder, "timm", overwrite=True)
    assert "--overwrite" not in str(error.value)
    with pytest.raises(DataError, match="exists"):
        export(runs / "first", folder / "thesis.tex", "timm", overwrite=True)


def test_a_run_that_cannot_be_exported(tmp_path):
    with pytest.raises(DataError, match="not a run folder"):
        export(tmp_path, tmp_path / "net", "timm")
    assert files(tmp_path) == []


# ONNX -------------------------------------------------------------------------------------------------------------


def test_onnx_takes_pixels(runs, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export(runs / "first", tmp_path / "net", "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "net" / "model.onnx"))
    ids, expected = logits_of(runs / "first")
    photos = [cv2.imread(str(runs.parent.parent / "photos" / path))[..., ::-1] for path in ids]
    transform = create_transform("inception_crop", 32, train=False)
    (found,) = session.run(["logits"], {"images": np.stack([transform(photo, 0) for photo in photos])})
    np.testing.assert_allclose(found, expected, atol=1e-4)
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    assert config["input"] == {"name": "images", "type": "uint8", "shape": ["batch", 3, 32, 32]}


def test_onnx_packages_are_named(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'farshot\[onnx\]'"):
        export(runs / "first", tmp_path / "net", "onnx")
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_written(runs, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match=r"could not write .*\n  where: --output"):
        export(runs / "first", tmp_path / "file" / "net", "timm")
    assert files(tmp_path) == ["file"]


def test_a_full_disk(runs, tmp_path):
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        with pytest.raises(DataError, match=r"could not write .*File too large"):
            export(runs / "first", tmp_path / "net", "timm")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path) == []


@pytest.mark.parametrize("size", [0, 50_000])
def test_a_damaged_checkpoint(runs, tmp_path, size):
    shutil.copytree(runs / "first", tmp_path / "run")
    checkpoint = RunFolder(tmp_path / "run").selected_checkpoint()
    checkpoint.write_bytes(checkpoint.read_bytes()[:size])
    with pytest.raises(ModelError, match="is damaged, cut short"):
        export(tmp_path / "run", tmp_path / "net", "timm")


@pytest.mark.parametrize("change", [{"state_dict": {}}, {"hyper_parameters": {"projection": 128}}])
def test_a_checkpoint_of_another_version(runs, tmp_path, change):
    shutil.copytree(runs / "first", tmp_path / "run")
    checkpoint = RunFolder(tmp_path / "run").selected_checkpoint()
    content = torch.load(checkpoint, weights_only=True)
    if "state_dict" in change:
        del content["state_dict"]["mean"]
    torch.save({**content, **{name: value for name, value in change.items() if value}}, checkpoint)
    with pytest.raises(DataError, match=r"cannot be built anew: .*(mean|projection)") as error:
        export(tmp_path / "run", tmp_path / "net", "timm")
    assert len(str(error.value).splitlines()) <= 3


# The card ---------------------------------------------------------------------------------------------------------


def test_card(runs, tmp_path, monkeypatch):
    export(runs / "second", tmp_path / "net", "timm")
    card = (tmp_path / "net" / "README.md").read_text()
    assert str(runs.parent.parent) not in card
    assert "| 1 | bee\\|wasp |" in card
    assert card.index("| run first | photos | 12 |") < card.index("| run second | photos | 12 |")
    assert "history: photos 12." in card  # both runs saw the same images
    frame = pd.read_parquet(runs / "second" / "predictions.parquet").query("split == 'test'")
    logits = frame[["logit/ant", "logit/bee|wasp"]].to_numpy()
    for one in estimate(logits, frame["label"].to_numpy(), frame["group"], "multiclass", ["ant", "bee|wasp"]):
        name = one.class_name.replace("|", "\\|")
        assert f"| {one.name} | {name} | {one.value:.3f} | {one.low:.3f} to {one.high:.3f} |" in card
    stored = {
        (row["name"], row["class_name"]): row["value"]
        for row in json.loads((runs / "second" / "summary.json").read_text())["test"]
    }
    assert f"| mean_auroc |  | {stored['mean_auroc', '']:.3f} |" in card
    assert "**Check the terms of the data.**" in card

    monkeypatch.chdir(tmp_path)  # the card's own example
    write_image(tmp_path / "image.png", 5, size=(50, 60))
    names: dict[str, object] = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], names)
    assert names["chances"].sum() == pytest.approx(1)
    assert names["names"] == ["ant", "bee|wasp"]


def make_run(folder, data, model, **summary):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": model}, "data": data}))
    (folder / "summary.json").write_text(json.dumps(summary))
    return RunFolder(folder)


def test_card_of_a_medical_history(tmp_path):
    sources = [{"class_path": f"datamodules.{name}"} for name in ("CheXpert", "NIHChestXray14")]
    first = make_run(
        tmp_path / "first",
        {"class_path": "datamodules.ChestXrayMixture", "init_args": {"sources": sources}},
        {"weights": "timm:resnetv2_50x1_bit.goog_in21k"},
        run={"target": "chexpert_nih", "n_train": 7, "method": "supervised", "protocol": "finetune"},
    )
    last = make_run(
        tmp_path / "last",
        {"class_path": "datamodules.Tuberculosis"},
        {"weights": str(first.path / "checkpoints" / "last.ckpt")},
        run={"target": "tuberculosis", "n_train": 3, "guard": "patients disjoint; source checked", "epochs": 1.23456},
        thresholds=[0.125],
        thresholds_from="validation",
    )
    chain, origin = history(last)
    assert [run.path.name for run in chain] == ["last", "first"]
    assert origin.name == "resnetv2_50x1_bit.goog_in21k"
    assert data_classes(first) == ["ChestXrayMixture", "CheXpert", "NIHChestXray14"]
    model = Classification("test_resnet", 1, "binary", ["sick"])
    predictor = Predictor(model, create_transform("chest_xray", 32, train=False), "grey", (0, 4095), [0.125])
    card = model_card(last, model, input_facts(predictor), "timm", "net")
    for text in (
        "**Medical data.**",
        "not to be passed on",  # CheXpert's terms, of a source of a source
        "### Tuberculosis",
        "Licence: Apache-2.0. Data: ImageNet-21k",
        "| 0 | sick | 0.125 |",
        "- leak check: patients disjoint; source checked",
        "- epochs: 1.235",
        "0 becomes 0 and 4095 becomes 255",
        "timm pads with the mean colour",
        '.convert("L").convert("RGB")',
        "Not tested.",
    ):
        assert text in card, text
    assert "Args:" not in card
    assert str(tmp_path) not in card


def test_card_of_a_net_of_unknown_origin(tmp_path):
    """Nobody may take unknown weights for weights without terms; a hub's name is kept, a path is not."""
    model = Classification("test_resnet", 2, "multiclass", ["a", "b"])
    origins = (("/home/me/m.pth.tar", "m.pth.tar"), ("hf-hub:o/net", "hf-hub:o/net"))
    for number, (source, shown) in enumerate(origins):
        run = make_run(
            tmp_path / str(number),
            {"class_path": "datamodules.ImageFolder"},
            {"weights": source},
            run={"target": "photos", "n_train": 3, "method": None, "protocol": "finetune"},
        )
        predictor = Predictor(model, create_transform("bit_square", 32, train=False), "rgb", None, [])
        card = model_card(run, model, input_facts(predictor), "timm", "net")
        assert f"### {shown} (weights)\n\nNot known here" in card
        assert f"| run {number} | photos | 3 | finetune |" in card
        assert "/home" not in card
        assert "the whole image at 32 x 32 pixels, whatever its shape" in card
        assert "centre crop" not in card
        front = yaml.safe_load(card.split("---")[1])
        assert front["library_name"] == "timm"


def test_readme_of_docs_names_the_commands():
    text = (Path(__file__).parent.parent / "docs" / "weights.md").read_text()
    for command in ("list", "get", "inspect", "export"):
        assert f"cli.py weights {command}" in text
