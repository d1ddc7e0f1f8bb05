"""Joules: counted by the hardware where it has a counter, else power times time, and said so.

    joules of a call = rise of the counter over repeated calls / calls          (measured)
    joules of a call = watts of a device x devices x seconds of the call        (modelled)
    energy of a run  = joules a token x tokens x PUE,   gCO2e = kWh x grid      (modelled)

Counters count all that their hardware does: what idles counts, and so does what others run.
"""

import dataclasses
import importlib
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from resources.devices import Assumptions, Device
from resources.row import Row, not_available

_POWERCAP = Path("/sys/class/powercap")
_JOULES_PER_WH = 3600


@dataclasses.dataclass(frozen=True)
class Counter:
    """One counter of energy; it starts again at 0 after `wraps` counts (None: never)."""

    read: Callable[[], int]
    joules: float  # a count
    wraps: int | None = None


@dataclasses.dataclass(frozen=True)
class Meter:
    """Counters that add up to the energy of this host's devices, and what they cover."""

    covers: str  # as "NVML: 2 x NVIDIA H100 PCIe, the whole boards"
    interval: float  # seconds from one update of a counter to the next
    counters: tuple[Counter, ...]

    def read(self) -> tuple[int, ...]:
        """Every counter as it stands."""
        return tuple(counter.read() for counter in self.counters)

    def joules(self, before: Sequence[int], after: Sequence[int]) -> float:
        """Energy between two readings, no counter having come around more than once."""
        total = 0.0
        for counter, first, last in zip(self.counters, before, after, strict=True):
            total += (last - first + (counter.wraps or 0) * (last < first)) * counter.joules
        return total


def meter(devices: Sequence[Any] | None = None) -> Meter | str:
    """The meter of `devices` (default: those of JAX in this process), or why there is none."""
    found = jax.local_devices() if devices is None else devices
    kind = found[0].device_kind
    if devices is None and jax.process_count() > 1:
        return "a process can meter the devices of its own host only"
    if found[0].platform == "cpu":
        return rapl()
    if kind.startswith("NVIDIA"):
        return nvml(found)
    return f"{kind} has no energy counter that this program can read"


def rapl(folder: str | Path = _POWERCAP) -> Meter | str:
    """Linux's energy counters of processors, or why they cannot be read.

    Whole packages only: their parts are in them, and "psys" would count them again.
    """
    counters = []
    zones = sorted(Path(folder).glob("intel-rapl:*"))
    try:
        for zone in zones:
            if not (zone / "name").read_text().startswith("package"):
                continue
            wraps = int((zone / "max_energy_range_uj").read_text())
            counters.append(Counter(_reader(zone / "energy_uj"), 1e-6, wraps))
            counters[-1].read()
    except PermissionError as error:
        return f"{error.filename} may be read by root only"
    except (OSError, ValueError) as error:
        return f"the processor's energy counter cannot be read: {error}"
    if not counters:
        return "this processor shows no energy counter (RAPL) to this system"
    covers = f"RAPL: {len(counters)} processor package(s), everything that ran, memory left out"
    return Meter(covers, 1e-3, tuple(counters))


def _reader(file: Path) -> Callable[[], int]:
    return lambda: int(file.read_text())


def nvml(devices: Sequence[Any]) -> Meter | str:
    """NVIDIA's energy counters of the boards that `devices` of JAX are, or why there are none.

    They count millijoules since the driver was loaded, and move about ten times a second.
    """
    try:
        pynvml = importlib.import_module("pynvml")
    except ImportError:
        return "reading NVIDIA's energy counter takes nvidia-ml-py (the extra `energy`)"
    try:
        pynvml.nvmlInit()
        handles = [_board(pynvml, device.local_hardware_id) for device in devices]
        for handle, device in zip(handles, devices, strict=True):
            name = pynvml.nvmlDeviceGetName(handle)
            if name != device.device_kind:
                return f"NVML's board is {name!r} where JAX's device is {device.device_kind!r}"
        counters = tuple(
            Counter(lambda h=handle: pynvml.nvmlDeviceGetTotalEnergyConsumption(h), 1e-3)
            for handle in handles
        )
        found = Meter(
            f"NVML: {len(handles)} x {devices[0].device_kind}, whole boards, host left out",
            0.1,
            counters,
        )
        found.read()
    except (pynvml.NVMLError, ValueError) as error:
        return f"NVIDIA's energy counter cannot be read: {error}"
    return found


def _board(pynvml: Any, ordinal: int) -> Any:
    """NVML's handle of the CUDA device `ordinal`: NVML sees all boards, CUDA those made visible."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    chosen = visible[ordinal].strip() if visible != [""] else str(ordinal)
    if chosen.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(chosen))
    if chosen.startswith("GPU-"):
        return pynvml.nvmlDeviceGetHandleByUUID(chosen)
    raise ValueError(f"CUDA_VISIBLE_DEVICES names {chosen!r}, which is no whole board")


@dataclasses.dataclass(frozen=True)
class Window:
    """What a meter counted while `calls` calls ran one after another."""

    joules: float
    seconds: float
    calls: int


@dataclasses.dataclass(frozen=True)
class Energy:
    """Measured joules of a call, window by window, idle power included."""

    windows: tuple[Window, ...]
    covers: str

    @property
    def joules(self) -> float:
        """Of a call: the mean over all calls."""
        return sum(w.joules for w in self.windows) / sum(w.calls for w in self.windows)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the windows' joules a call; None for a single window."""
        each = [w.joules / w.calls for w in self.windows]
        return statistics.stdev(each) if len(each) > 1 else None

    @property
    def watts(self) -> float:
        """Mean power during the calls."""
        return sum(w.joules for w in self.windows) / sum(w.seconds for w in self.windows)


def measure(
    call: Callable[[], Any], meter: Meter, *, seconds: float = 2.0, windows: int = 5
) -> Energy:
    """Count the energy of `call()`, repeated for at least `seconds` in each of several windows.

    A window must be ten times the interval at which the counter moves: its two ends are each
    uncertain by one. One call before them, which may compile, is not counted. For numbers to
    publish take windows of 10 seconds, and boards that are warm.
    """
    if windows < 1:
        raise ValueError(f"windows={windows} must be at least 1.")
    _long_enough(seconds, meter)
    jax.block_until_ready(call())
    return Energy(tuple(_window(call, meter, seconds) for _ in range(windows)), meter.covers)


def _long_enough(seconds: float, meter: Meter) -> None:
    least = 10 * meter.interval
    if not seconds >= least:
        raise ValueError(
            f"seconds={seconds:g} must be at least {least:g}: the counter moves every "
            f"{meter.interval:g} s."
        )


def _window(call: Callable[[], Any], meter: Meter, seconds: float) -> Window:
    before, start, calls = meter.read(), time.perf_counter(), 0
    while True:
        jax.block_until_ready(call())
        calls += 1
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return Window(meter.joules(before, meter.read()), elapsed, calls)


def idle_row(meter: Meter | str, seconds: float = 2.0) -> Row:
    """The power while this process does nothing: measure it before all else, and after a rest."""
    name, unit = "idle power", "W"
    if isinstance(meter, str):
        return not_available(name, unit, meter)
    _long_enough(seconds, meter)
    found = _window(lambda: time.sleep(seconds), meter, seconds)
    return Row(name, found.joules / found.seconds, unit, "measured", meter.covers)


def rows(
    kind: str,
    energy: Energy | str,
    seconds: float,
    tokens: int,
    device: Device | None,
    devices: int,
    assumptions: Assumptions,
) -> list[Row]:
    """Joules a token of a call on `tokens` tokens that takes `seconds`, and their spread.

    `energy` is measured, or the reason why it is not: then power times time stands in, where a
    power is stated, for each of `devices` (`devices.count()`).
    """
    names, unit = (f"{kind} energy", f"{kind} energy, spread"), "J/token"
    if isinstance(energy, Energy):
        shortest = min(w.seconds for w in energy.windows)
        of = f"{len(energy.windows)} windows of at least {shortest:.3g} s"
        if energy.spread is None:
            last = not_available(names[1], unit, "a single window has no spread")
        else:
            note = f"standard deviation of {of}"
            last = Row(names[1], energy.spread / tokens, unit, "measured", note)
        note = f"{energy.covers}; idle power included"
        return [Row(names[0], energy.joules / tokens, unit, "measured", note), last]
    power = assumptions.power(device)
    if isinstance(power, str):
        return [not_available(name, unit, f"{energy}; {power}") for name in names]
    joules = power.value * devices * seconds / tokens
    note = (
        f"not measured ({energy}): {power.value:g} W a device x {devices} for the whole time "
        f"({power.source}), a ceiling as far as that power is one"
    )
    return [
        Row(names[0], joules, unit, "modelled", note),
        not_available(names[1], unit, "a modelled energy has no spread"),
    ]


def run_rows(train: Row, steps: int, tokens: int, assumptions: Assumptions) -> list[Row]:
    """Electricity and emissions of a run of `steps` steps on `tokens` tokens each.

    `train` is the row of joules a token: if it has no value, these have none for its reason.
    """
    names = (("training run energy", "Wh"), ("training run emissions", "gCO2e"))
    if train.value is None:
        return [not_available(name, unit, train.note) for name, unit in names]
    pue, grid = assumptions.overhead(), assumptions.carbon()
    spent = train.value * steps * tokens * pue.value / _JOULES_PER_WH
    emitted = spent * grid.value / 1000
    notes = (
        f"{train.name}, {train.provenance}, x {steps} steps of {tokens} tokens "
        f"x PUE {pue.value:g} ({pue.source})",
        f"the run's energy x {grid.value:g} gCO2e/kWh ({grid.source})",
    )
    return [
        Row(name, value, unit, "modelled", note)
        for (name, unit), value, note in zip(names, (spent, emitted), notes, strict=True)
    ]
