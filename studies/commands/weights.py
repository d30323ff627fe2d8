"""weights list|get|inspect|export: which weights there are, fetch them, look into them, hand on one's own."""

import argparse
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from studies.known_weights import FOLDER, KnownWeights, find, get, known_weights

if TYPE_CHECKING:
    from torch import nn

    from lightning_modules.backbones.checkpoints import LoadedWeights, WeightsReport


def run(words: Sequence[str]) -> None:
    """Run one of the four commands; `list` and `get` need no torch."""
    options = _parser().parse_args(list(words[1:]))
    for line in options.command(options):
        print(line)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cli.py weights", description="Published weights, and one's own.")
    commands = parser.add_subparsers(required=True, metavar="list|get|inspect|export")

    table = commands.add_parser("list", help="published weights: where from, licence, data, size")
    table.add_argument("name", metavar="NAME", nargs="?", help="all that is known of one entry")
    table.set_defaults(command=_list)

    fetch = commands.add_parser("get", help="download one of them and verify it")
    fetch.add_argument("name", metavar="NAME", help="as in `weights list`")
    fetch.add_argument("--output", type=Path, default=FOLDER, help=f"the file goes to OUTPUT/NAME/ ({FOLDER})")
    fetch.add_argument("--overwrite", action="store_true", help="download again what is here")
    fetch.set_defaults(command=_get)

    look = commands.add_parser("inspect", help="architecture, tensors, layer groups and hash of any weights")
    look.add_argument("source", metavar="SOURCE", help="all that `weights:` takes: a run, a file, a timm name")
    look.set_defaults(command=_inspect)

    export = commands.add_parser("export", help="write a finished run for timm or for ONNX, with a model card")
    export.add_argument("run", metavar="RUN", type=Path, help="run folder: runs/EXPERIMENT/RUN")
    export.add_argument("--output", type=Path, required=True, help="folder to write")
    export.add_argument("--format", choices=("timm", "onnx"), default="timm", help="(timm)")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    export.set_defaults(command=_export)
    return parser


def _list(options: argparse.Namespace) -> Iterator[str]:
    if options.name:
        yield from _describe(find(options.name))
        return
    entries = known_weights()
    width = max(len(entry.name) for entry in entries)
    for entry in entries:
        yield f"{entry.name:{width}} {entry.parameters:7.1f} M  {entry.input_size:3d} px  {entry.data}"
    yield ""
    yield "all that is known of one: python cli.py weights list NAME"
    yield "download one:             python cli.py weights get NAME"


def _describe(entry: KnownWeights) -> Iterator[str]:
    facts = {
        "name": entry.name,
        "from": entry.address,
        "facts from": entry.page,
        "sha256": entry.sha256 or "not stated: a download cannot be verified",
        "licence": entry.licence,
        "data": entry.data,
        "architecture": entry.architecture,
        "input": f"{entry.input_size} px, {entry.in_chans} channel{'s' if entry.in_chans > 1 else ''}",
        "mean, std": f"{entry.mean}, {entry.std}" if entry.mean else f"those of {entry.architecture} in timm",
        "parameters": f"{entry.parameters} M without classifier",
        "note": entry.note,
    }
    yield from (f"{name:13} {value}" for name, value in facts.items() if value)


def _get(options: argparse.Namespace) -> Iterator[str]:
    entry = find(options.name)
    download = get(entry, options.output, overwrite=options.overwrite)
    size = download.path.stat().st_size
    yield f"{'downloaded' if download.fetched else 'already here'}: {download.path} ({size:,} bytes)"
    digits = "" if entry.sha256 is None or len(entry.sha256) == 64 else f" (of which {entry.sha256} is known)"
    judgement = f"agrees with the publisher's{digits}" if download.verified else "not verified: none is published"
    yield f"sha256: {download.sha256}; {judgement}"
    yield f"licence: {entry.licence}"
    if entry.note:
        yield f"note: {entry.note}"
    settings = entry.settings(str(download.path))
    yield "use: " + " ".join(f"--model.{name} {str(value).replace(' ', '')}" for name, value in settings.items())


def _inspect(options: argparse.Namespace) -> Iterator[str]:
    # Only now: the other commands answer without torch.
    from lightning_modules.backbones.checkpoints import read_weights, weights_hash

    weights = read_weights(options.source)
    types = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in weights.state.values())
    yield f"source        {weights.origin}"
    yield f"tensors       {', '.join(f'{count} {name}' for name, count in types.most_common())}"
    colours = f"{list(weights.mean)}, {list(weights.std)}" if weights.mean and weights.std else "not said"
    yield f"mean, std     {colours}"
    if weights.standardisation_eps is not None:
        yield f"epsilon       {weights.standardisation_eps:g} in weight standardisation"
    yield f"hash          {weights_hash(weights)}"
    fits = fitting(weights)
    if not fits:
        total = sum(tensor.numel() for tensor in weights.state.values())
        yield f"architecture  {weights.architecture or 'not said'}; no tested backbone fits"
        yield f"values        {total / 1e6:.3f} M in all tensors"
        yield f"names         {', '.join(list(weights.state)[:6])}, ..."
        return
    said = " (as the source says)" if weights.architecture else " (found by names and shapes of the tensors)"
    yield f"architecture  {' or '.join(fits)}{said}"
    model, report = next(iter(fits.values()))
    yield f"layout        {report.source_layout}"
    yield from _parts(weights, model)


def _parts(weights: "LoadedWeights", model: "nn.Module") -> Iterator[str]:
    from lightning_modules.backbones.factory import is_classifier
    from lightning_modules.backbones.layers import layer_groups

    groups = layer_groups(model)
    counts = [sum(weights.state[name].numel() for name in group.parameters) for group in groups]
    heads = [name for name in weights.state if is_classifier(name, model)]
    yield f"parameters    {sum(counts) / 1e6:.3f} M without classifier"
    for group, count in zip(groups, counts, strict=True):
        yield f"  {group.name:11} {count / 1e6:10.3f} M in {len(group.parameters)} tensors"
    for name in heads:
        yield f"  classifier  {weights.state[name].numel() / 1e6:10.3f} M in {name} {tuple(weights.state[name].shape)}"


def fitting(weights: "LoadedWeights") -> "dict[str, tuple[nn.Module, WeightsReport]]":
    """Return the architectures whose backbone these weights fill, with a model of each and what goes where.

    The one that the source names, else those that this project has tested or knows weights of. The models have no
    memory of their own (torch's device "meta").
    """
    import torch

    from lightning_modules.backbones.catalogue import CATALOGUE
    from lightning_modules.backbones.checkpoints import load_weights
    from lightning_modules.backbones.factory import create_backbone
    from lightning_modules.errors import ModelError

    sizes = {entry.architecture: entry.parameters for entry in known_weights()}
    sizes |= {entry.name: entry.parameters for entry in CATALOGUE}
    largest = sum(tensor.numel() for tensor in weights.state.values()) / 1e6 + 0.1  # a stem of three channels has more
    found = {}
    for name in [weights.architecture] if weights.architecture else [n for n in sizes if sizes[n] <= largest]:
        try:
            with torch.device("meta"):
                model = create_backbone(name, 0)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*meta parameter", category=UserWarning)
                report = load_weights(model, weights, head=False)
        except ModelError:
            continue
        found[name] = (model, report)
    return found


def _export(options: argparse.Namespace) -> Iterator[str]:
    from studies.export import export

    export(options.run, options.output, options.format, overwrite=options.overwrite)
    uses = {
        "timm": f"timm.create_model('local-dir:{options.output}', pretrained=True)",
        "onnx": f"onnxruntime.InferenceSession('{options.output / 'model.onnx'}')",
    }
    yield f"written: {options.output}"
    yield f"use:     {uses[options.format]}; {options.output / 'README.md'} says what goes in and out"
