"""Known weights are what their publishers say; downloads are whole and verified; any weights can be looked into."""

import errno
import hashlib
import pickle
import re
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from datamodules.errors import DataError
from lightning_modules.backbones.factory import create_backbone
from lightning_modules.errors import ModelError
from studies import known_weights as known
from studies.commands import weights
from studies.known_weights import KnownWeights, find, get, known_weights, recognise

CONTENT = np.random.default_rng(0).bytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def output(capsys, *words):
    weights.run(["weights", *map(str, words)])
    return capsys.readouterr().out


# What is known ----------------------------------------------------------------------------------------------------


def test_list_needs_no_torch():
    code = (
        "import sys; from studies.commands.weights import run; run(['weights', 'list']); "
        "print([name for name in ('torch', 'numpy', 'pandas', 'rich') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.endswith("[]\n")
    assert all(entry.name in out for entry in known_weights())


def test_list_of_one(capsys):
    out = output(capsys, "list", "xrv-densenet121-res224-nih")
    assert "none is stated for the weights" in out
    assert "cannot be verified" in out
    with pytest.raises(DataError, match="did you mean 'bit-m-r50x1'"):
        weights.run(["weights", "list", "bit-m-r50"])


def test_entries_are_whole():
    entries = known_weights()
    assert len({entry.name for entry in entries}) == len(entries)
    assert len({entry.address for entry in entries}) == len(entries)
    for entry in entries:
        assert entry.url or entry.hub
        assert "None" not in entry.by_hand(known.FOLDER)
        if entry.sha256 is not None:  # only what a publisher states: in full, or in the file's name
            assert re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{8}", entry.sha256)
            assert len(entry.sha256) == 64 or f"-{entry.sha256}.pth" in entry.url
        else:
            assert not re.search(r"-[0-9a-f]{8}\.pth$", entry.address)


@pytest.mark.parametrize("entry", [entry for entry in known_weights() if entry.hub], ids=lambda entry: entry.name)
def test_entries_agree_with_timm(entry):
    config = timm.models.get_pretrained_cfg(entry.name)
    assert entry.name.partition(".")[0] == entry.architecture == config.architecture
    assert entry.hub == config.hf_hub_id
    assert entry.licence.lower() == config.license
    assert (entry.in_chans, entry.input_size, entry.input_size) == tuple(config.input_size)
    default = timm.models.get_pretrained_cfg(entry.architecture)
    assert (config.mean, config.std) == (default.mean, default.std), "say mean and std"
    assert entry.url in (None, config.url)


def test_parameters_are_those_of_the_net():
    for name, in_chans in {(entry.architecture, entry.in_chans) for entry in known_weights()}:
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in create_backbone(name, 0, in_chans).parameters())
        entries = [entry for entry in known_weights() if (entry.architecture, entry.in_chans) == (name, in_chans)]
        assert {entry.parameters for entry in entries} == {round(count / 1e6, 3)}, name


def test_torchxrayvision_entries_agree_with_torchxrayvision():
    xrv = pytest.importorskip("torchxrayvision")
    entries = {entry.name: entry for entry in known_weights() if entry.name.startswith("xrv-")}
    published = {f"xrv-{name}": facts for name, facts in xrv.models.model_urls.items() if name.startswith("densenet")}
    assert {name: entry.url for name, entry in entries.items()} == {n: f["weights_url"] for n, f in published.items()}
    grey = np.array([[0, 100, 255]], dtype=np.float64)
    for entry in entries.values():
        np.testing.assert_allclose((grey / 255 - entry.mean) / entry.std, xrv.datasets.normalize(grey, 255))


def test_a_setting_is_recognised():
    name = "resnetv2_50x1_bit.goog_in21k"
    for text in (name, f"timm:{name}", f"weights/{name}/model.safetensors", f"hf-hub:timm/{name}"):
        assert recognise(text).name == name
    assert recognise("/data/BiT-M-R50x1.npz").name == "bit-m-r50x1"
    assert recognise("elsewhere/model.safetensors") is None  # many have this name
    assert find("timm:" + name).settings("w.npz") == {"backbone": "resnetv2_50x1_bit", "weights": "w.npz"}
    assert find("slampai-imagenet1k-bit50x1").settings("w")["mean"] == [0.485, 0.456, 0.406]


# Downloads --------------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Sends CONTENT; `cuts`: bytes after which each of the first connections ends; `etags`: one an answer."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.cuts, self.etags, self.starts, self.contents = [], [], [], []
        self.kind, self.status = "application/octet-stream", 200

    def handle_error(self, *_):
        """A client that hangs up early is part of the tests."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/files/net.npz"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        content = server.contents.pop(0) if server.contents else CONTENT
        etag = server.etags.pop(0) if server.etags else '"a"'
        wanted = self.headers.get("Range")
        start = int(wanted[6:-1]) if wanted and self.headers.get("If-Range") == etag else 0
        server.starts.append(start)
        self.send_response(server.status if not start else 206)
        self.send_header("Content-Type", server.kind)
        self.send_header("Content-Length", str(len(content) - start))
        if etag:
            self.send_header("ETag", etag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[start : server.cuts.pop(0) if server.cuts else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(known, "PAUSE", 0.0)
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def entry(server):
    facts = {"architecture": "test_resnet", "parameters": 0.373, "input_size": 160, "data": "noise", "page": "here"}
    return KnownWeights(name="net", licence="MIT", sha256=SHA256, url=server.url, **facts)


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_get(server, entry, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(weights, "find", lambda name: entry)
    out = output(capsys, "get", "net", "--output", tmp_path)
    path = tmp_path / "net" / "net.npz"
    assert path.read_bytes() == CONTENT
    assert "agrees with the publisher's\n" in out
    assert f"--model.backbone test_resnet --model.weights {path}" in out
    assert subprocess.run(["sha256sum", "--check", "net.npz.sha256"], cwd=path.parent, check=False).returncode == 0
    assert "already here" in output(capsys, "get", "net", "--output", tmp_path)
    assert server.starts == [0]  # one request
    path.write_bytes(b"other")
    with pytest.raises(DataError, match="not the published one"):
        get(entry, tmp_path)
    with pytest.raises(DataError, match=f"has changed.*{SHA256}"):
        get(replace(entry, sha256=None), tmp_path)
    assert get(entry, tmp_path, overwrite=True).fetched
    assert path.read_bytes() == CONTENT


def test_a_digest_that_is_not_published(entry, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(weights, "find", lambda name: replace(entry, sha256=None))
    assert f"sha256: {SHA256}; not verified" in output(capsys, "get", "net", "--output", tmp_path)
    assert (tmp_path / "net" / "net.npz.sha256").read_text() == f"{SHA256}  net.npz\n"
    monkeypatch.setattr(weights, "find", lambda name: replace(entry, sha256=SHA256[:8]))
    assert f"(of which {SHA256[:8]} is known)" in output(capsys, "get", "net", "--output", tmp_path)


def test_a_wrong_checksum_keeps_what_was_here(entry, tmp_path):
    wrong = replace(entry, sha256="0" * 64)
    with pytest.raises(DataError, match=f"{SHA256}, not 0000"):
        get(wrong, tmp_path)
    assert files(tmp_path) == []
    path = tmp_path / "net" / "net.npz"
    path.write_bytes(b"mine")
    with pytest.raises(DataError, match="not the published one"):
        get(wrong, tmp_path, overwrite=True)
    assert files(tmp_path) == ["net.npz"]
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("cuts", "etags", "starts"),
    [
        ([1_000_000, 2_500_000], [], [0, 1_000_000, 2_500_000]),  # it goes on where it was cut
        ([1_000_000], ["", ""], [0, 0]),  # no version: from the start
        ([1_000_000], ['W/"a"', 'W/"a"'], [0, 0]),  # a weak one promises no equal bytes
        ([1_000_000], ['"a"', '"b"'], [0, 0]),  # the file has changed meanwhile: all of it
        ([0, 0], [], [0, 0, 0]),
    ],
)
def test_a_cut_connection(server, entry, tmp_path, cuts, etags, starts):
    server.cuts, server.etags = cuts, etags
    if etags == ['"a"', '"b"']:
        server.contents = [bytes(len(CONTENT))]
    get(entry, tmp_path)
    assert (tmp_path / "net" / "net.npz").read_bytes() == CONTENT
    assert server.starts == starts


def test_a_connection_that_is_cut_every_time(server, entry, tmp_path):
    server.cuts = [1000] * 10
    with pytest.raises(DataError, match="cut after 1,000 of 3,000,000 bytes"):
        get(entry, tmp_path)
    assert len(server.starts) == 1 + known.RETRIES
    assert files(tmp_path) == []


def test_a_web_page_is_no_weights_file(server, entry, tmp_path):
    server.kind = "text/html; charset=utf-8"
    with pytest.raises(DataError, match="a web page instead of the file"):
        get(replace(entry, sha256=None), tmp_path)
    server.kind, server.status = "application/json", 404
    with pytest.raises(DataError, match="HTTP Error 404"):
        get(entry, tmp_path)
    assert files(tmp_path) == []


def test_no_network(server, entry, tmp_path, monkeypatch):
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match="Connection refused") as error:
        get(entry, tmp_path)
    path = tmp_path / "net" / "net.npz"
    assert f"curl -L --fail --create-dirs -o {path} {entry.url}" in str(error.value)
    monkeypatch.setenv("HF_ENDPOINT", server.url.removesuffix("/files/net.npz"))
    with pytest.raises(DataError, match=rf"hf download me/net model.safetensors --local-dir {tmp_path}/net\n"):
        get(replace(entry, url=None, hub="me/net"), tmp_path)
    path.write_bytes(CONTENT)  # what the command would have brought
    assert get(entry, tmp_path).verified


def test_a_disk_that_cannot_be_written_is_no_missing_network(entry, tmp_path, server, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"could not write .*\n  where: --output"):
        get(entry, tmp_path / "file")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(known, "fetch", full)
    with pytest.raises(DataError, match=r"could not write .*No space left"):
        get(entry, tmp_path)


# Inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_finds_the_architecture(tmp_path, capsys):
    net = create_backbone("test_resnet", 7)
    safetensors.torch.save_file(net.state_dict(), tmp_path / "net.safetensors")
    out = output(capsys, "inspect", tmp_path / "net.safetensors")
    assert re.search(r"architecture +test_resnet \(found", out)
    assert re.search(r"tensors +77 float32, 15 int64", out)
    assert re.search(r"parameters +0\.373 M", out)
    assert "fc.weight (7, 96)" in out
    sizes = [float(size) for size in re.findall(r"(?:stem|stage\d) +([\d.]+) M", out)]
    assert sum(sizes) == pytest.approx(0.373, abs=2e-3)
    grey = create_backbone("test_resnet", 0, 1)
    torch.save(grey.state_dict(), tmp_path / "grey.pth")
    assert re.search(r"architecture +test_resnet \(found", output(capsys, "inspect", tmp_path / "grey.pth"))


def test_inspect_says_the_epsilon(tmp_path, capsys):
    names = ("root.conv.weight", "body.block1.unit01.conv1.weight")  # enough to know the layout
    torch.save({"model": dict.fromkeys(names, torch.ones(1))}, tmp_path / "model.pth.tar")
    out = output(capsys, "inspect", tmp_path / "model.pth.tar")
    assert re.search(r"epsilon +1e-10 in weight standardisation", out)


def test_inspect_says_what_it_cannot_tell(tmp_path, capsys):
    torch.save({"layer.weight": torch.zeros(3, 5)}, tmp_path / "foreign.pth")
    out = output(capsys, "inspect", tmp_path / "foreign.pth")
    assert "no tested backbone fits" in out
    assert "layer.weight" in out
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(print, protocol=2))
    for name in ("broken.safetensors", "code.pth", "missing.pth"):
        with pytest.raises(ModelError, match=re.escape(name)):
            weights.run(["weights", "inspect", str(tmp_path / name)])
