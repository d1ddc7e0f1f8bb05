"""The table of devices: against JAX's own table, by name, and with a user's file over it."""

import re

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from resources import devices
from resources.devices import Assumptions, Device, Stated

KINDS = {  # what JAX calls a device: its entry
    "NVIDIA A100-SXM4-40GB": "A100 SXM 40GB",
    "NVIDIA A100-SXM4-80GB": "A100 SXM 80GB",
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
    "NVIDIA L4": "L4",
    "NVIDIA L40S": "L40S",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "TPU v4": "TPU v4",
    "TPU v5 lite": "TPU v5e",
    "TPU v5e": "TPU v5e",
    "TPU v5": "TPU v5p",
    "TPU v5p": "TPU v5p",
    "TPU v6 lite": "TPU v6e",
    "TPU v6e": "TPU v6e",
    "TPU7x": "TPU7x",
    "AMD Instinct MI300X": "MI300X",
    "AMD Instinct MI300X OAM": "MI300X",
}
UNLISTED = (
    "cpu",
    "",
    "TPU v4 lite",
    "TPU v3",
    "NVIDIA H200 NVL",
    "NVIDIA L40",
    "NVIDIA A100 80GB PCIe",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
)


def test_every_entry_is_found_by_its_kinds_and_no_kind_matches_two():
    table = devices.table()
    for kind, name in KINDS.items():
        matching = [d.name for d in table if any(re.fullmatch(p, kind) for p in d.match)]
        assert matching == [name] and devices.find(kind).name == name
    assert {device.name for device in table} == set(KINDS.values())
    for kind in UNLISTED:
        assert devices.find(kind) is None, kind


def test_every_number_has_a_source_and_a_price_its_date():
    for device in devices.table():
        assert device.source and device.bfloat16 and device.memory_bytes, device.name
        assert (device.watts is None) == (device.watts_source is None)
        assert (device.price is None) == (device.price_source is None)
        assert device.price is None or re.fullmatch(r"20\d\d(-\d\d)?", device.price_date)
        assert (device.links is None) == (device.link_bytes_per_s is None) == (device.link is None)


@pytest.mark.parametrize(
    ("name", "version", "cores"),
    [
        ("TPU v4", pltpu.ChipVersion.TPU_V4, 2),
        ("TPU v5e", pltpu.ChipVersion.TPU_V5E, 1),
        ("TPU v5p", pltpu.ChipVersion.TPU_V5P, 2),
        ("TPU v6e", pltpu.ChipVersion.TPU_V6E, 1),
        ("TPU7x", pltpu.ChipVersion.TPU_7X, 1),  # a device of JAX is one of the chip's two cores
    ],
)
def test_tpus_agree_with_jax(name, version, cores):
    """JAX lists a core; a device is one or two. Its v5p memory is 11% slower than Google's page."""
    listed = pltpu.get_tpu_info_for_chip(version, cores)
    device = next(device for device in devices.table() if device.name == name)
    assert device.bfloat16 == pytest.approx(cores * listed.bf16_ops_per_second, rel=0.005)
    assert device.memory_bytes == pytest.approx(cores * listed.hbm_capacity_bytes, rel=0.01)
    assert device.memory_bytes_per_s == pytest.approx(
        cores * listed.mem_bw_bytes_per_second, rel=0.13
    )
    for ours, theirs in (("int8", "int8_ops_per_second"), ("float8", "fp8_ops_per_second")):
        if getattr(device, ours) and getattr(listed, theirs):
            expected = cores * getattr(listed, theirs)
            assert getattr(device, ours) == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize(
    ("name", "units", "flops", "hertz"),
    [  # tensor-core FLOPs in bfloat16 a multiprocessor and clock, multiprocessors, boost clock
        ("A100 SXM 80GB", 108, 2048, 1.410e9),
        ("H100 SXM", 132, 4096, 1.830e9),
        ("H100 PCIe", 114, 4096, 1.620e9),
        ("L4", 58, 1024, 2.040e9),
        ("L40S", 142, 1024, 2.490e9),
        ("RTX 4090", 128, 512, 2.520e9),
        ("MI300X", 304, 2048, 2.100e9),
    ],
)
def test_gpu_peaks_are_units_times_clock_without_sparsity(name, units, flops, hertz):
    device = next(device for device in devices.table() if device.name == name)
    assert device.bfloat16 == pytest.approx(units * flops * hertz, rel=0.01)
    assert device.tensorfloat32 == pytest.approx(device.bfloat16 / 2, rel=0.02)
    assert device.int8 in (pytest.approx(2 * device.bfloat16, rel=0.02), 660.6e12)


def test_the_ends_of_links():
    """Bytes per second of one link, one way: NVLink 25 or 50 GB, ICI 50 or 100 GB."""
    speed = {d.name: d.link_bytes_per_s / d.links / 1e9 for d in devices.table()}
    assert speed["A100 SXM 40GB"] == speed["H100 SXM"] == speed["H200"] == 25
    assert speed["B200"] == speed["TPU v4"] == speed["TPU v5e"] == speed["TPU7x"] == 50
    assert speed["TPU v5p"] == speed["TPU v6e"] == 100
    assert speed["MI300X"] == speed["H100 PCIe"] == 64


def write(tmp_path, text):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    return str(file)


def test_a_users_file_overrides_fields_and_adds_devices(tmp_path):
    file = write(
        tmp_path,
        '[L4]\nprice = 0.5\n["TPU v5e"]\nwatts = 200\nwatts_source = "our rack"\n'
        '[H200]\nmemory_bytes = 150e9\n["My chip"]\nmatch = ["cpu"]\nbfloat16 = 1e12\nprice = 0\n',
    )
    table = {device.name: device for device in devices.table(file)}
    ours = {device.name: device for device in devices.table()}
    assert list(table) == [*ours, "My chip"]
    assert (table["L4"].price, table["L4"].price_source, table["L4"].price_date) == (
        0.5,
        "mine.toml",
        None,  # not the date of our price
    )
    assert table["L4"].watts == 72 and table["L4"].source == ours["L4"].source
    assert (table["TPU v5e"].watts, table["TPU v5e"].watts_source) == (200, "our rack")
    assert table["TPU v5e"].price == ours["TPU v5e"].price
    assert table["H200"].source == ours["H200"].source + "; mine.toml"
    mine = devices.find("cpu", devices.table(file))
    assert mine == Device(
        "My chip", ("cpu",), "mine.toml", bfloat16=1e12, price=0, price_source="mine.toml"
    )
    assert table["A100 SXM 40GB"] == ours["A100 SXM 40GB"]


def test_the_longest_expression_wins_and_of_equals_the_last():
    table = (
        Device("any", ("NVIDIA .*",)),
        Device("H200", ("NVIDIA H200",)),
        Device("all", (".*",)),
        Device("mine", ("NVIDIA H200",)),
    )
    assert devices.find("NVIDIA H200", table).name == "mine"
    assert devices.find("NVIDIA L4", table).name == "any"
    assert devices.find("TPU v4", table).name == "all"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[L4]\npirce = 1\n", r"pirce of 'L4' is no key \(did you mean 'price'\?\). Keys: match"),
        ('[L4]\nprice = "1"\n', "price of 'L4' is '1'; write a number of at least 0"),
        ("[L4]\nprice = true\n", "price of 'L4' is True; write a number"),
        ("[L4]\nprice = -1\n", "price of 'L4' is -1; write a number of at least 0"),
        ("[L4]\nwatts = nan\n", "watts of 'L4' is nan; write a number"),
        ("[L4]\nwatts = 0\n", "watts of 'L4' is 0; leave it out"),
        ("[L4]\nsource = 3\n", "source of 'L4' is 3; write a text in quotes"),
        ('[L4]\nmatch = "NVIDIA L4"\n', "match of 'L4' is 'NVIDIA L4'; write a list of texts"),
        ('[L4]\nmatch = ["("]\n', r"match of 'L4': '\(' is no expression"),
        ("price = 1\n", r"price=1 stands outside of a device; put \[NAME\] above"),
        ("[L4\n", "mine.toml is not TOML"),
        ('["H100 SMX"]\nprice = 1\n', r"no device 'H100 SMX' is listed \(did you mean 'H100 SXM'"),
    ],
)
def test_slips_are_one_clear_line(tmp_path, text, said):
    with pytest.raises(ValueError, match=said) as error:
        devices.table(write(tmp_path, text))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(ValueError, match="none.toml cannot be read: No such file"):
        devices.table(str(tmp_path / "none.toml"))


def test_a_cpu_is_counted_once_however_it_is_split():
    assert jax.device_count() == 8 and devices.count() == 1


def test_the_name_of_a_cpu(monkeypatch, tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Fast 9000\nflags\t: fpu\nmodel name\t: Fast\n")
    monkeypatch.setattr(devices, "_CPUINFO", file)
    assert devices.cpu_model() == "Fast 9000"
    file.write_text("processor\t: 0\n")
    assert devices.cpu_model() is None
    monkeypatch.setattr(devices, "_CPUINFO", tmp_path / "none")
    assert devices.cpu_model() is None


def test_what_a_user_states_comes_before_what_is_listed():
    device = Device("X", watts=70, watts_source="TDP", price=2.0, price_source="Y")
    nothing, stated = Assumptions(), Assumptions(price=0.0, watts=50, pue=1, grid=0)
    assert nothing.power(device) == Stated(70, "X: TDP")
    assert nothing.rate(device) == Stated(2.0, "X: Y")
    dated = Device("X", price=2.0, price_source="Y", price_date="2026-01")
    assert nothing.rate(dated).source == "X: Y, 2026-01"
    assert (nothing.overhead(), nothing.carbon()) == (devices.PUE, devices.GRID)
    assert stated.power(device) == stated.power(None) == Stated(50, "--watts")
    assert stated.rate(device) == Stated(0.0, "--price")
    assert (stated.overhead(), stated.carbon()) == (Stated(1, "--pue"), Stated(0, "--grid"))
    for unknown in (None, Device("Z")):
        assert "--watts=WATTS_PER_DEVICE" in nothing.power(unknown)
        assert "--price=DOLLARS_PER_DEVICE_HOUR" in nothing.rate(unknown)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pue": 0.9}, "--pue=0.9 must be a finite number of at least 1"),
        ({"price": -1.0}, "--price=-1 must be a finite number of at least 0"),
        ({"watts": 0.0}, "--watts=0 must be a finite number of at least 1"),
        ({"grid": float("nan")}, "--grid=nan must be a finite number"),
    ],
)
def test_impossible_assumptions_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        Assumptions(**given)
