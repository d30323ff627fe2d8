"""Seconds and joules of a fit: fake meters, fake counters, resumes."""

import sys
from types import SimpleNamespace

import pytest
import torch

from lightning_modules.callbacks import cost
from lightning_modules.callbacks.cost import Cost, device_meter, nvml_meter, rapl_meter


class Meter:
    """Counts up by what it is told."""

    def __init__(self, joules=1000.0):
        self.joules = joules
        self.readings = 0

    def __call__(self):
        self.readings += 1
        return self.joules


def test_energy_adds_up_over_resumes():
    meter = Meter()
    first = Cost(lambda trainer: meter)
    assert first.energy == 0.0
    first.on_train_start(None, None)
    meter.joules += 30
    state = first.state_dict()
    assert state["energy"] == 30.0
    meter.joules += 500  # after the checkpoint: lost with the run
    other = Meter(7.0)  # another machine
    second = Cost(lambda trainer: other)
    second.load_state_dict(state)
    second.on_train_start(None, None)
    other.joules += 12
    assert second.energy == 42.0
    second.on_train_end(None, None)
    other.joules += 100  # the test afterwards
    assert second.energy == 42.0
    assert second.state_dict() == {"seconds": second.seconds, "energy": 42.0}


@pytest.mark.parametrize("find_meter", [lambda trainer: None, lambda trainer: lambda: None])
def test_a_part_without_a_meter_leaves_the_whole_unknown(find_meter):
    silent = Cost(find_meter)
    silent.on_train_start(None, None)
    assert silent.energy is None
    silent.on_train_end(None, None)
    assert silent.energy is None
    for state in (silent.state_dict(), {"seconds": 5.0}):  # an earlier checkpoint says nothing of joules
        resumed = Cost(lambda trainer: Meter())
        resumed.load_state_dict(state)
        resumed.on_train_start(None, None)
        assert resumed.energy is None
        assert resumed.seconds >= state["seconds"]


def test_meter_is_read_now_and_then(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(cost.time, "monotonic", lambda: now[0])
    meter = Meter()
    callback = Cost(lambda trainer: meter)
    callback.on_train_start(None, None)
    for _ in range(200):
        now[0] += 1.0
        callback.on_train_batch_end(None, None, None, None, 0)
    assert meter.readings == 1 + 3  # at the start, and every 61 seconds
    assert callback.seconds == 200.0


def zone(root, name, kind, value, full=1_000_000):
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in (("name", kind), ("energy_uj", value), ("max_energy_range_uj", full)):
        (folder / file).write_text(f"{text}\n")


def test_rapl_counts_packages_once_and_wraps_around(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 1)
    zone(tmp_path, "intel-rapl:1", "package-1", 5)
    zone(tmp_path, "intel-rapl:2", "psys", 1)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1)
    meter = rapl_meter(tmp_path)
    assert meter() == 0.0
    for name in ("intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0"):
        (tmp_path / name / "energy_uj").write_text("999999")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("250005")
    assert meter() == 0.25
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100000")  # 200,000 further, beyond its range
    assert meter() == 0.45
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("50000")  # and nearly once around
    assert meter() == pytest.approx(1.4)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert meter() is None


def test_rapl_that_tells_nothing(tmp_path):
    assert rapl_meter(tmp_path / "none") is None
    zone(tmp_path, "intel-rapl:0", "package-0", "")
    assert rapl_meter(tmp_path) is None


@pytest.fixture
def nvml(monkeypatch):
    """A fake pynvml of two GPUs, of which torch sees the second as its first."""

    class NVMLError(Exception):
        pass

    def handle(uuid):
        return {"GPU-aa": 0, "GPU-bb": 1}[uuid]

    fake = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        millijoules=[10_000, 500],
        nvmlDeviceGetTotalEnergyConsumption=lambda number: fake.millijoules[number],
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    uuids = ["bb", "GPU-aa"]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=uuids[number]))
    return fake


def test_nvml_sums_the_devices_used(nvml):
    one, both = nvml_meter([0]), nvml_meter([0, 1])
    assert (one(), both()) == (0.5, 10.5)
    nvml.millijoules[1] += 2000
    assert (one(), both()) == (2.5, 12.5)

    def lost(number):
        raise nvml.NVMLError

    nvml.nvmlDeviceGetTotalEnergyConsumption = lost
    assert one() is None
    assert nvml_meter([0]) is None


def test_nvml_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml_meter([0]) is None


def test_meter_of_the_device(nvml, monkeypatch, tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 3)
    monkeypatch.setattr(cost, "rapl_meter", lambda: rapl_meter(tmp_path))

    def trainer(kind, nodes=1):
        strategy = SimpleNamespace(root_device=torch.device(kind))
        return SimpleNamespace(strategy=strategy, num_nodes=nodes, device_ids=[0])

    assert device_meter(trainer("cuda"))() == 0.5
    assert device_meter(trainer("cpu"))() == 0.0
    assert device_meter(trainer("mps")) is None
    assert device_meter(trainer("cuda", nodes=2)) is None
