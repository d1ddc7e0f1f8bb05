"""Energy by counters that a test turns, and by power times time; every gap has its reason."""

import itertools
import sys
import time
import types
from pathlib import Path

import jax.numpy as jnp
import pytest

from resources import energy
from resources.devices import Assumptions, Device
from resources.energy import Counter, Energy, Meter, Window
from resources.row import Row, not_available


def zone(folder, name, label, value, wraps=1000):
    path = folder / name
    path.mkdir()
    (path / "name").write_text(f"{label}\n")
    (path / "energy_uj").write_text(f"{value}\n")
    (path / "max_energy_range_uj").write_text(f"{wraps}\n")
    return path


def board(kind, ordinal=0, platform="gpu"):
    return types.SimpleNamespace(platform=platform, device_kind=kind, local_hardware_id=ordinal)


def test_rapl_adds_packages_and_nothing_twice(tmp_path):
    first = zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000, 9_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 4_000_000)
    zone(tmp_path, "intel-rapl:0:1", "dram", 3_000_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 8_500_000, 9_000_000)
    zone(tmp_path, "intel-rapl:2", "psys", 99)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 5_000_000)
    meter = energy.rapl(tmp_path)
    assert "2 processor package" in meter.covers
    before = meter.read()
    assert before == (5_000_000, 8_500_000)
    (first / "energy_uj").write_text("7000000\n")
    (second / "energy_uj").write_text("1500000\n")  # past 9 J, once around
    assert meter.joules(before, meter.read()) == pytest.approx(2.0 + 0.5 + 1.5)


def test_rapl_says_why_there_is_none(tmp_path, monkeypatch):
    assert energy.rapl(tmp_path / "none") == energy.rapl(tmp_path)
    assert "shows no energy counter" in energy.rapl(tmp_path)
    path = zone(tmp_path, "intel-rapl:0", "package-0", "soon")
    assert "cannot be read: invalid literal" in energy.rapl(tmp_path)
    read = Path.read_text

    def guarded(self, *args, **kwargs):
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(self))
        return read(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", guarded)
    assert energy.rapl(tmp_path) == f"{path / 'energy_uj'} may be read by root only"


class FakeNVML(types.ModuleType):
    """Two boards; a reading of board i is 1000 (i + 1) mJ after the one before."""

    class NVMLError(Exception):
        pass

    names = ("NVIDIA H200", "NVIDIA L4")
    started = True

    def __init__(self):
        super().__init__("pynvml")
        self.readings = [itertools.count(10**9, 1000), itertools.count(0, 2000)]

    def nvmlInit(self):
        if not self.started:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return {"GPU-aa": 0, "GPU-bb": 1}[uuid]

    def nvmlDeviceGetName(self, handle):
        return self.names[handle]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return next(self.readings[handle])


@pytest.fixture
def nvml(monkeypatch):
    fake = FakeNVML()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def test_nvml_adds_the_millijoules_of_the_boards_in_use(nvml):
    meter = energy.meter([board("NVIDIA H200", 0), board("NVIDIA L4", 1)])
    assert meter.joules(meter.read(), meter.read()) == pytest.approx(1.0 + 2.0)
    one = energy.meter([board("NVIDIA H200", 0)])
    assert one.joules(one.read(), one.read()) == pytest.approx(1.0)
    assert "1 x NVIDIA H200" in one.covers and one.interval == 0.1


@pytest.mark.parametrize("visible", ["1", "GPU-bb", "1,0", "GPU-bb,GPU-aa"])
def test_the_board_is_the_one_that_cuda_was_given(nvml, monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    meter = energy.meter([board("NVIDIA L4", 0)])
    assert meter.joules(meter.read(), meter.read()) == pytest.approx(2.0)


def test_nvml_says_why_there_is_none(nvml, monkeypatch):
    wrong = energy.meter([board("NVIDIA L4", 0)])
    assert wrong == "NVML's board is 'NVIDIA H200' where JAX's device is 'NVIDIA L4'"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-cc")
    assert "'MIG-cc', which is no whole board" in energy.meter([board("NVIDIA H200")])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    nvml.started = False
    assert "cannot be read: Driver Not Loaded" in energy.meter([board("NVIDIA H200")])
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if it were not installed
    assert "the extra `energy`" in energy.meter([board("NVIDIA H200")])


def test_other_devices_have_no_meter():
    for kind, platform in (("TPU v5 lite", "tpu"), ("AMD Instinct MI300X", "gpu")):
        assert energy.meter([board(kind, 0, platform)]).startswith(f"{kind} has no energy counter")


def ticking(log=None):
    """A meter that is 2 J further at each reading, and logs that it was read."""
    counts = itertools.count()

    def read():
        if log is not None:
            log.append("read")
        return 2 * next(counts)

    return Meter("fake", 0.001, (Counter(read, 1.0),))


def test_calls_are_counted_between_two_readings():
    log = []

    def call():
        log.append("call")
        time.sleep(0.005)
        return jnp.zeros(1)

    found = energy.measure(call, ticking(log), seconds=0.05, windows=3)
    expected = ["call"]  # the first may compile
    for window in found.windows:
        assert window.joules == 2 and window.seconds >= 0.05
        assert 1 <= window.calls <= window.seconds / 0.005
        expected += ["read", *["call"] * window.calls, "read"]
    assert log == expected
    calls = log.count("call") - 1
    assert found.joules == pytest.approx(3 * 2 / calls)
    assert found.watts == pytest.approx(3 * 2 / sum(w.seconds for w in found.windows))
    assert found.covers == "fake"


def test_windows_shorter_than_the_counter_can_tell_are_refused():
    slow = Meter("fake", 0.1, ())
    with pytest.raises(ValueError, match="seconds=0.5 must be at least 1: the counter moves every"):
        energy.measure(lambda: None, slow, seconds=0.5)
    with pytest.raises(ValueError, match="seconds=0.5 must be at least 1"):
        energy.idle_row(slow, 0.5)
    with pytest.raises(ValueError, match="windows=0 must be at least 1"):
        energy.measure(lambda: None, slow, windows=0)


def test_idle_power_is_a_row_of_its_own():
    row = energy.idle_row(ticking(), 0.05)
    assert 0 < row.value <= 2 / 0.05  # 2 J in no less time
    assert (row.name, row.unit, row.provenance) == ("idle power", "W", "measured")
    assert energy.idle_row("no counter") == not_available("idle power", "W", "no counter")


MEASURED = Energy((Window(30.0, 2.0, 10), Window(50.0, 2.5, 10)), "fake")  # 3 and 5 J a call


def test_measured_rows_carry_mean_and_spread():
    first, second = energy.rows("train", MEASURED, 9.9, 8, None, 1, Assumptions(watts=999))
    assert first == Row(
        "train energy", 80 / 20 / 8, "J/token", "measured", "fake; idle power included"
    )
    assert second.value == pytest.approx(2**0.5 / 8)  # 1 J either side of 4, n - 1
    assert (second.name, second.provenance) == ("train energy, spread", "measured")
    assert "2 windows of at least 2 s" in second.note
    alone = Energy(MEASURED.windows[:1], "fake")
    assert energy.rows("train", alone, 1, 8, None, 1, Assumptions())[1].value is None


def test_power_times_time_stands_in_and_says_so():
    device = Device("X", watts=100, watts_source="TDP")
    first, second = energy.rows("decode", "no counter", 0.5, 20, device, 4, Assumptions())
    assert first.value == 100 * 4 * 0.5 / 20 and first.provenance == "modelled"
    for word in ("no counter", "100 W a device x 4", "X: TDP", "ceiling"):
        assert word in first.note
    assert second.value is None
    stated = energy.rows("decode", "no counter", 0.5, 20, device, 4, Assumptions(watts=10))[0]
    assert stated.value == 10 * 4 * 0.5 / 20 and "--watts" in stated.note


def test_nothing_is_invented_where_no_power_is_known():
    for row in energy.rows("prefill", "no counter", 0.5, 20, None, 1, Assumptions()):
        assert row.value is None and row.provenance is None
        assert row.note.startswith("no counter; ") and "--watts=" in row.note


def test_a_run_in_watt_hours_and_grams():
    """7.2 J/token x 1000 steps x 500 tokens = 3.6 MJ = 1 kWh of the computers."""
    train = Row("train energy", 7.2, "J/token", "measured", "fake")
    stated = Assumptions(pue=1.5, grid=400)
    used, emitted = energy.run_rows(train, 1000, 500, stated)
    assert (used.value, used.unit, used.provenance) == (pytest.approx(1500), "Wh", "modelled")
    assert emitted.value == pytest.approx(600) and emitted.unit == "gCO2e"
    assert "PUE 1.5 (--pue)" in used.note and "measured" in used.note
    assert "400 gCO2e/kWh (--grid)" in emitted.note
    used, emitted = energy.run_rows(train, 1000, 500, Assumptions())
    assert used.value == pytest.approx(1540) and "Uptime Institute" in used.note
    assert emitted.value == pytest.approx(1.54 * 458) and "Ember" in emitted.note


def test_a_run_without_energy_says_why():
    train = not_available("train energy", "J/token", "no counter")
    rows = energy.run_rows(train, 10, 10, Assumptions())
    assert [(row.value, row.note) for row in rows] == [(None, "no counter")] * 2
