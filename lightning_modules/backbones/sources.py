"""Find weights by what the user wrote: a run, a file, a folder that timm wrote, the hub, a timm name."""

import difflib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import timm

from lightning_modules.backbones.factory import default_config, model_config
from lightning_modules.backbones.readers import ACCEPTED, READERS, LoadedWeights, with_facts
from lightning_modules.errors import ModelError

_FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")  # beside config.json, in timm's order

Source = str | Path | LoadedWeights


def read_weights(source: Source) -> LoadedWeights:
    """Read weights from a run folder, a file, a folder that timm wrote, the Hugging Face hub or timm.

    An existing path wins over a timm name of the same spelling; a prefix (`timm:`, `hf-hub:`, `local-dir:`) decides.

    Raises:
        ModelError: Missing, truncated or unknown file, pickled code, an unknown timm name, no network.
    """
    if isinstance(source, LoadedWeights):
        return source
    text = str(source)
    prefix = next((prefix for prefix in _PREFIXES if text.startswith(prefix)), None)
    if prefix is not None:
        return _PREFIXES[prefix](text.removeprefix(prefix))
    path = Path(source).expanduser()
    if (path / "config.json").is_file():
        return _read_folder(path)
    if path.is_dir():
        path = _checkpoint_of_run(path)
    reader = next((read for suffix, read in READERS.items() if path.name.lower().endswith(suffix)), None)
    if path.is_file():
        if reader is None:
            raise ModelError(f"{path} is not a kind of weights file", valid=ACCEPTED)
        return reader(path)
    if reader is not None or isinstance(source, Path) or "/" in text or not timm.is_model(text.partition(".")[0]):
        near = difflib.get_close_matches(text, timm.list_models(), n=3)
        raise ModelError(
            f"there are no weights at {path}, and timm has no model of that name",
            valid=ACCEPTED,
            hint=f"did you mean {' or '.join(near)}?" if near else "check the path for a typo",
        )
    return _read_timm(text)


def checkpoint_file(source: str | Path) -> Path:
    """The checkpoint of a run folder, or the file itself.

    Raises:
        ModelError: The folder has no checkpoint, or there is nothing of that name.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _checkpoint_of_run(path)
    if not path.is_file():
        raise ModelError(f"there is no run and no checkpoint {path}", valid="a run folder, or a .ckpt file")
    return path


def _checkpoint_of_run(run: Path) -> Path:
    """Return the checkpoint of a run folder: the one its summary names, else the best, else the last."""
    checkpoints = run / "checkpoints"
    candidates = [checkpoints / "best.ckpt", checkpoints / "last.ckpt"]
    try:
        summary = json.loads((run / "summary.json").read_text())
    except FileNotFoundError:
        summary = {}
    except ValueError as error:
        raise ModelError(f"{run / 'summary.json'} is not JSON", hint="name the checkpoint file itself") from error
    named = summary.get("checkpoint") if isinstance(summary, dict) else None
    if named:
        candidates = [run / named, checkpoints / Path(named).name]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        files = sorted(path for path in run.iterdir() if path.name.lower().endswith(tuple(READERS)))
        raise ModelError(
            f"{run} is not a run with weights: there is no {' or '.join(str(path) for path in candidates)}",
            valid=ACCEPTED,
            hint=f"did you mean {' or '.join(map(str, files[:3]))}?"
            if files
            else "wait until the run has written a checkpoint, or name a file",
        )
    return found


def _read_folder(folder: str | Path) -> LoadedWeights:
    """Read a folder that timm wrote: config.json and the tensors beside it. The tensors are read as any file is."""
    folder = Path(folder).expanduser()
    config = folder / "config.json"
    try:
        facts = json.loads(config.read_text())
    except FileNotFoundError as error:
        raise ModelError(
            f"there is no {config}", valid=ACCEPTED, hint="name a folder that timm or `weights export` wrote"
        ) from error
    except ValueError as error:
        raise ModelError(f"{config} is not JSON", hint="name the weights file in the folder itself") from error
    file = next((folder / name for name in _FOLDER_FILES if (folder / name).is_file()), None)
    if file is None:
        raise ModelError(f"{folder} has a config.json and no weights", valid=" or ".join(_FOLDER_FILES))
    facts = facts if isinstance(facts, dict) else {}
    nested = facts.get("pretrained_cfg")  # older files have its entries beside the architecture
    preprocessing = nested if isinstance(nested, dict) else facts
    weights = READERS[file.suffix](file)
    return with_facts(weights, {**preprocessing, "backbone": facts.get("architecture")})


def _read_hub(name: str) -> LoadedWeights:
    """Get a model that timm can build from the Hugging Face hub, or from its cache."""
    repository, _, revision = name.partition("@")
    return _pretrained(f"hf-hub:{name}", f"hf-hub:{name}", repository, revision)


def _read_timm(name: str) -> LoadedWeights:
    """Get pretrained weights by their timm name, from timm's cache or the network."""
    config = default_config(name)
    if not config.has_weights:
        raise ModelError(
            f"timm has no pretrained weights for {name}",
            valid=timm.list_pretrained(f"{config.architecture}.*") or "none",
        )
    return _pretrained(name, f"timm:{name}", config.hf_hub_id, url=config.url)


def _pretrained(
    name: str, origin: str, repository: str | None, revision: str = "", url: str | None = None
) -> LoadedWeights:
    """Let timm build a model with its weights: it brings older files of its own to the names of today.

    timm reads the hub's pickles with `weights_only=True`.
    """
    try:
        with _quiet_hub():
            model = timm.create_model(name, pretrained=True)
    except Exception as error:  # requests, huggingface_hub and the operating system each have their own
        reason = (str(error).strip() or "no reason given").splitlines()[0][:200]
        folder = (repository or "").rpartition("/")[2]
        fetch = f"hf download {repository}{f' --revision {revision}' if revision else ''} --local-dir {folder}"
        raise ModelError(
            f"timm could not get the weights of {name} ({type(error).__name__}: {reason})",
            valid=ACCEPTED,
            hint=f"connect to the network once, or run `{fetch}` elsewhere, copy the folder here and set "
            f"`weights: local-dir:{folder}`"
            if repository
            else f"connect to the network once, or run `curl -LO {url}` elsewhere and give the file's path",
        ) from error
    config = model_config(model)
    weights = LoadedWeights(dict(model.state_dict()), origin=origin)
    return with_facts(weights, {"backbone": config["architecture"], "mean": config["mean"], "std": config["std"]})


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep the hub from logging each of its dozen attempts: what it raises at last says the same."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


_PREFIXES: dict[str, Callable[[str], LoadedWeights]] = {
    "timm:": _read_timm,
    "hf-hub:": _read_hub,
    "local-dir:": _read_folder,
}
