"""What a run has cost so far, in seconds and joules, kept across resumes."""

import importlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

Meter = Callable[[], float | None]
"""Joules used since some fixed moment; None where they cannot be read."""

POWERCAP = Path("/sys/class/powercap")
READ_EVERY = 60.0
"""Seconds between two readings. A RAPL counter of 2^32 steps of 61 µJ begins anew after 262 kJ: 9 minutes at 500 W."""


class Cost(Callback):
    """Counts seconds and joules of training, those before a resume included (up to the checkpoint it resumed from).

    Args:
        find_meter: Gives the meter of what a trainer runs on; None where the device does not tell.
    """

    def __init__(self, find_meter: Callable[[Trainer], Meter | None] | None = None) -> None:
        self._find_meter = find_meter or device_meter
        self._before = 0.0
        self._started: float | None = None
        self._joules_before: float | None = 0.0
        self._meter: Meter | None = None
        self._first: float | None = None
        self._read_at = 0.0

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of training."""
        running = time.monotonic() - self._started if self._started is not None else 0.0
        return self._before + running

    @property
    def energy(self) -> float | None:
        """Joules of training; None where the device does not tell, or did not before a resume.

        GPUs are counted whole, with what others do on them, without the rest of the machine; where training is on the
        CPU, its packages.
        """
        if self._started is None:
            return self._joules_before
        now = self._meter() if self._meter is not None else None
        if self._joules_before is None or self._first is None or now is None:
            return None
        return self._joules_before + now - self._first

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock and the meter."""
        self._meter = self._find_meter(trainer)
        self._first = self._meter() if self._meter is not None else None
        self._started = self._read_at = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Read the meter before its counter can begin anew twice."""
        if self._meter is not None and time.monotonic() - self._read_at > READ_EVERY:
            self._meter()
            self._read_at = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop both."""
        self._before, self._joules_before, self._started = self.seconds, self.energy, None

    def state_dict(self) -> dict[str, Any]:
        """Seconds and joules so far."""
        return {"seconds": self.seconds, "energy": self.energy}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._before = state_dict["seconds"]
        self._joules_before = state_dict.get("energy")  # earlier checkpoints do not tell


def device_meter(trainer: Trainer) -> Meter | None:
    """The meter of what this trainer runs on; None for several machines, of which one sees only itself."""
    if trainer.num_nodes > 1:
        return None
    device = trainer.strategy.root_device.type
    if device == "cuda":
        return nvml_meter(trainer.device_ids)
    return rapl_meter() if device == "cpu" else None


def nvml_meter(devices: Sequence[int]) -> Meter | None:
    """Energy of NVIDIA GPUs (Volta and later) by NVML's own counter.

    Args:
        devices: Their numbers in torch; NVML, which does not know CUDA_VISIBLE_DEVICES, is asked by UUID.

    Returns:
        None without the package nvidia-ml-py, or where the driver does not tell (a MIG slice).
    """
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        uuids = [str(torch.cuda.get_device_properties(device).uuid) for device in devices]
        handles = [nvml.nvmlDeviceGetHandleByUUID("GPU-" + uuid.removeprefix("GPU-")) for uuid in uuids]
    except Exception:  # a missing package, library or driver: what is not told must not stop a run
        return None

    def read() -> float | None:
        try:
            return float(sum(nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles)) / 1e3
        except nvml.NVMLError:
            return None

    return read if read() is not None else None


def rapl_meter(root: Path = POWERCAP) -> Meter | None:
    """Energy of the CPU packages by Linux' RAPL counters (Intel and AMD), which wrap around.

    Args:
        root: Folder of the zones `intel-rapl:*`.

    Returns:
        None without such counters, or where they may not be read (since Linux 5.10 by root only).
    """
    # Below a package are zones of its parts, beside it may be `psys`, which holds it: each joule counts once.
    zones = [zone for zone in sorted(root.glob("intel-rapl:*")) if _read_text(zone / "name").startswith("package")]
    counters = [zone / "energy_uj" for zone in zones]
    ranges = [int(_read_text(zone / "max_energy_range_uj") or 0) for zone in zones]
    last = [_read_text(counter) for counter in counters]
    if not zones or not all(last) or not all(ranges):
        return None
    seen, used = [int(text) for text in last], 0

    def read() -> float | None:
        nonlocal seen, used
        texts = [_read_text(counter) for counter in counters]
        if not all(texts):
            return None
        now = [int(text) for text in texts]
        used += sum((new - old) % full for new, old, full in zip(now, seen, ranges, strict=True))
        seen = now
        return used / 1e6

    return read


def _read_text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
