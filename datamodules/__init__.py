"""Everything before the batch: data sets, splits, few-shot draws, transforms and the stream.

Exports are lazy (PEP 562), so that importing one leaf does not import Lightning.
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "BaseDataModule": "base",
    "ImageTable": "image_table",
    "ImageFolder": "image_table",
    "ImageShards": "image_shards",
    "ImageTextShards": "image_text.shards",
    "YFCC15M": "image_text.releases",
    "LAION400M": "image_text.releases",
    "ConceptualCaptions3M": "image_text.releases",
    "ConceptualCaptions12M": "image_text.releases",
    "RedCaps": "image_text.releases",
    "WIT": "image_text.releases",
    "Shutterstock": "image_text.releases",
    "Synthetic": "synthetic",
    "ImageNet": "natural.imagenet",
    "ImageNet21k": "natural.imagenet21k",
    "CIFAR10": "natural.cifar",
    "CIFAR100": "natural.cifar",
    "OxfordPets": "natural.pets",
    "OxfordFlowers102": "natural.flowers",
    "DTD": "natural.dtd",
    "Caltech101": "natural.caltech",
    "EuroSAT": "natural.eurosat",
    "DomainNet": "natural.domainnet",
    "Cassava": "natural.cassava",
    "CameraTraps": "natural.camera_traps",
    "CheXpert": "chest_xray.chexpert",
    "MIMICCXR": "chest_xray.mimic",
    "NIHChestXray14": "chest_xray.nih",
    "PadChest": "chest_xray.padchest",
    "PadChestCl": "chest_xray.padchest",
    "COVIDxCXR": "chest_xray.covidx",
    "Tuberculosis": "chest_xray.tuberculosis",
    "ChestXrayMixture": "chest_xray.mixture",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"datamodules.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'datamodules' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_EXPORTS)


def module_of(name: str) -> str:
    """Module of an exported class, below this package: `natural.cifar` for CIFAR10."""
    return _EXPORTS[name]
