"""The configurations that users run, run: on generated data, with a small net in place of the real one."""

import json
from inspect import signature
from pathlib import Path

import pytest

from tests.data import (
    caltech,
    camera_traps,
    cassava,
    chexpert,
    cifar,
    covidx,
    domainnet,
    dtd,
    eurosat,
    flowers,
    image_text,
    imagenet,
    mimic,
    nih,
    padchest,
    pets,
    tables,
    tuberculosis,
)

CONFIGS = Path(__file__).parent.parent / "configs"
SMALL = [
    *("--model.init_args.backbone", "test_resnet", "--data.init_args.image_size", "16"),
    *("--data.init_args.batch_size", "8", "--data.init_args.num_workers", "0"),
]
BY_CLASS = {
    "CheXpert": ("chexpert", chexpert.create),
    "MIMICCXR": ("mimic", mimic.create),
    "NIHChestXray14": ("nih", lambda root, _: nih.create(root, patients=16)),
    "PadChest": ("padchest", padchest.create),
    "PadChestCl": ("padchest", padchest.create),
    "COVIDxCXR": ("covidx", covidx.create),
    "Tuberculosis": ("tuberculosis", tuberculosis.create),
    "CIFAR10": ("cifar10", lambda root, patch: cifar.create(root, patch, "CIFAR10", images=20)),
    "CIFAR100": ("cifar100", lambda root, patch: cifar.create(root, patch, "CIFAR100", images=20)),
    "OxfordPets": ("oxford_pets", pets.create),
    "OxfordFlowers102": ("oxford_flowers102", flowers.create),
    "DTD": ("dtd", dtd.create),
    "Caltech101": ("caltech101", caltech.create),
    "EuroSAT": ("eurosat", eurosat.create),
    "ImageNet": ("imagenet1k", imagenet.create),
    "ImageNet21k": ("imagenet21k", lambda root: imagenet.create_21k(root, images=150)),
    "DomainNet": ("domainnet", domainnet.create),
    "Cassava": ("cassava", cassava.create),
    "CameraTraps": ("camera_traps", camera_traps.create),
    "YFCC15M": ("yfcc15m", image_text.create),
    "LAION400M": ("laion400m", image_text.create),
    "ConceptualCaptions3M": ("cc3m", image_text.create),
    "ConceptualCaptions12M": ("cc12m", image_text.create),
    "RedCaps": ("redcaps", image_text.create),
    "WIT": ("wit", image_text.create),
    "Shutterstock": ("shutterstock", image_text.create),
}
"""Default folder of each data set, and what writes it there (with pytest's monkeypatch where it wants that)."""


CAPTIONED = ("yfcc15m", "laion400m", "cc3m", "cc12m", "redcaps", "wit", "shutterstock")
"""Configs of images with captions and no classes."""


def named(folder):
    return sorted((CONFIGS / folder).glob("*.yaml"))


@pytest.fixture
def data_root(tmp_path, monkeypatch):
    """Writes the data that a config's classes want; returns the words that name it."""

    def create(text):
        root = tmp_path / "data"
        root.mkdir()
        monkeypatch.setenv("FARSHOT_DATA", str(root))
        named = [where for class_name, where in BY_CLASS.items() if f"class_path: {class_name}\n" in text]
        for name, write in dict(named).items():
            (root / name).mkdir()
            wants_patch = len([p for p in signature(write).parameters.values() if p.default is p.empty]) > 1
            write(root / name, monkeypatch) if wants_patch else write(root / name)
        if "ImageTable" in text:

            def rename(rows):
                return [{**row, "patient_id": row["patient"], "sex": "F", "age": "50"} for row in rows]

            tables.create_csv(root, patients=16, change=rename)
        elif "ImageFolder" in text:
            tables.create_tree(root, images=6)
        return [] if named or "Synthetic" in text else ["--data.init_args.root", root]

    return create


@pytest.mark.parametrize("name", CAPTIONED)
def test_data_configs_of_captions(name, data_root, run_cli, tmp_path):
    config = CONFIGS / "data" / f"{name}.yaml"
    data_root(config.read_text())
    text = '{"class_path": "SmallText", "init_args": {"vocabulary": 64, "width": 16, "layers": 1, "heads": 2}}'
    code, _, err = run_cli(
        *("fit", "--config", CONFIGS / "trainer" / "cpu.yaml", "--model", "CLIP", f"--model.init_args.text={text}"),
        *("--config", config, "--runs_dir", tmp_path / "runs", "--run", "a", *SMALL, "--trainer.max_steps", "2"),
        *("--trainer.enable_progress_bar", "false"),
    )
    assert (code, err) == (0, "")


@pytest.mark.parametrize("config", [path for path in named("data") if path.stem not in CAPTIONED], ids=lambda p: p.stem)
def test_data_configs(config, data_root, run_cli, tmp_path):
    root = data_root(config.read_text())
    code, _, err = run_cli(
        *("fit", "--config", CONFIGS / "trainer" / "cpu.yaml", "--config", CONFIGS / "model" / "resnet10t.yaml"),
        *("--config", config, "--runs_dir", tmp_path / "runs", "--run", "a", *root, *SMALL),
        *("--trainer.max_steps", "2", "--trainer.enable_progress_bar", "false", "--evaluate", "true"),
    )
    assert (code, err) == (0, "")
    (summary,) = (tmp_path / "runs").glob("*/a/summary.json")
    assert json.loads(summary.read_text())["run"]["n_test"] > 0


@pytest.mark.parametrize("config", named("pretrain"), ids=lambda path: path.stem)
def test_pretraining_configs(config, data_root, run_cli, tmp_path):
    root = data_root(config.read_text())
    code, _, err = run_cli(
        *("fit", "--config", config, "--runs_dir", tmp_path / "runs", *root, *SMALL, "--trainer.max_epochs", "1"),
        *("--data.init_args.num_images", "null"),
        *("--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "2"),
        *("--trainer.accelerator", "cpu", "--trainer.precision", "32", "--trainer.enable_progress_bar", "false"),
    )
    assert (code, err) == (0, "")


@pytest.mark.parametrize("config", named("transfer"), ids=lambda path: path.stem)
def test_transfer_configs(config, tiny_config, run_cli, tmp_path):
    common = ["--runs_dir", tmp_path / "runs", "--trainer.enable_progress_bar", "false"]
    assert run_cli("fit", "--config", tiny_config, *common, "--run", "source")[0] == 0
    short = '{"class_path": "HyperRuleSchedule", "init_args": {"length": 3}}'
    code, _, err = run_cli(
        *("fit", "--config", CONFIGS / "trainer" / "cpu.yaml", "--config", CONFIGS / "data" / "synthetic.yaml"),
        *("--config", config, *common, *SMALL, "--run", "target", "--data.init_args.shots", "1"),
        *("--model.init_args.weights", tmp_path / "runs" / "tiny" / "source", "--evaluate", "true"),
        f"--model.init_args.lr_scheduler={short}",
    )
    assert (code, err) == (0, "")
    summary = json.loads((tmp_path / "runs" / config.stem / "target" / "summary.json").read_text())
    assert summary["run"]["protocol"] == ("finetune" if config.stem.startswith("hyperrule") else config.stem)
    assert summary["run"]["source"] == "synthetic"


def test_real_radiographs_through_fit_and_test(real_nih, run_cli, tmp_path):
    """A thousand real images in the official layout: a few steps, then the whole official test list."""
    code, _, err = run_cli(
        *("fit", "--config", CONFIGS / "trainer" / "cpu.yaml", "--config", CONFIGS / "data" / "nih.yaml"),
        *("--config", CONFIGS / "model" / "resnet10t.yaml", "--data.init_args.root", real_nih, *SMALL),
        *("--data.init_args.image_size", "32", "--trainer.max_steps", "20", "--trainer.enable_progress_bar", "false"),
        *("--runs_dir", tmp_path / "runs", "--experiment", "nih", "--run", "a", "--evaluate", "true"),
    )
    assert (code, err) == (0, "")
    summary = json.loads((tmp_path / "runs" / "nih" / "a" / "summary.json").read_text())["run"]
    assert (summary["n_train"] + summary["n_val"], summary["n_test"]) == (760, 240)
