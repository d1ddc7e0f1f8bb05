"""Accelerators as their makers list them (devices.toml), and what a user states instead.

A number that nobody lists is None here, and the rows that need it say so: nothing is guessed.
"""

import dataclasses
import difflib
import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

_LISTED = Path(__file__).with_name("devices.toml")
_CPUINFO = Path("/proc/cpuinfo")


@dataclasses.dataclass(frozen=True)
class Device:
    """One device of JAX; devices.toml states the fields and their units. None: not listed."""

    name: str
    match: tuple[str, ...] = ()
    source: str | None = None
    bfloat16: float | None = None  # FLOP/s of dense matrix products, here to float8
    tensorfloat32: float | None = None
    float32: float | None = None
    int8: float | None = None
    float8: float | None = None
    memory_bytes: float | None = None
    memory_bytes_per_s: float | None = None
    link: str | None = None
    links: float | None = None
    link_bytes_per_s: float | None = None  # one way, all links together
    watts: float | None = None
    watts_source: str | None = None
    price: float | None = None  # dollars a device-hour
    price_source: str | None = None
    price_date: str | None = None


_FIELDS = tuple(field.name for field in dataclasses.fields(Device) if field.name != "name")
_TEXTS = {"source", "link", "watts_source", "price_source", "price_date"}
_SOURCED = {"watts": ("watts_source",), "price": ("price_source", "price_date")}
_OTHERS = {"match", *_SOURCED, *(key for keys in _SOURCED.values() for key in keys)}


def load(file: str | Path) -> tuple[Device, ...]:
    """The devices of a TOML file with the layout of devices.toml, as they stand there.

    Numbers without a source get the file's name as theirs. All that is wrong is a ValueError.
    """
    try:
        tables = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # no TOML, or no UTF-8
        raise ValueError(f"{file} is not TOML: {error}.") from error
    return tuple(_device(name, fields, Path(file).name) for name, fields in tables.items())


def _device(name: str, fields: Any, file: str) -> Device:
    if not isinstance(fields, Mapping):
        raise ValueError(f"{file}: {name}={fields!r} stands outside of a device; put [NAME] above.")
    for key, value in fields.items():
        _check(f"{file}: {key} of {name!r}", key, value)
    found = dict(fields)
    if "match" in found:
        found["match"] = tuple(found["match"])
    for number, (source, *_) in _SOURCED.items():
        if number in found:
            found.setdefault(source, file)
    if found.keys() - _OTHERS:
        found.setdefault("source", file)
    return Device(name, **found)


def _check(where: str, key: str, value: Any) -> None:
    if key not in _FIELDS:
        raise ValueError(f"{where} is no key{_near(key, _FIELDS)}. Keys: {', '.join(_FIELDS)}.")
    if key == "match":
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise ValueError(f'{where} is {value!r}; write a list of texts, as ["NVIDIA L4"].')
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{where}: {pattern!r} is no expression: {error}.") from error
    elif key in _TEXTS:
        if not isinstance(value, str) or not value:
            raise ValueError(f"{where} is {value!r}; write a text in quotes.")
    elif type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{where} is {value!r}; write a number of at least 0.")
    elif value == 0 and key != "price":
        raise ValueError(f"{where} is 0; leave it out if it is not known.")


def _near(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(words), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def table(user_file: str | None = None) -> tuple[Device, ...]:
    """Our devices; a user's file sets fields of those that it names and adds the others.

    A new price or power brings its own source and date: ours never stand beside it. An added
    device needs `match`; without, its name is taken for a slip, and a ValueError says so.
    """
    found = {device.name: device for device in load(_LISTED)}
    for device in load(user_file) if user_file else ():
        if device.name not in found:
            if not device.match:
                near = _near(device.name, found)
                raise ValueError(
                    f"{user_file}: no device {device.name!r} is listed{near}. Add `match` to add "
                    f"it. Listed: {', '.join(found)}."
                )
            found[device.name] = device
            continue
        values = {key: getattr(device, key) for key in _FIELDS}
        given = {key: value for key, value in values.items() if value not in (None, ())}
        cleared = {key: None for number in given.keys() & _SOURCED for key in _SOURCED[number]}
        if "source" in given:
            given["source"] = f"{found[device.name].source}; {given['source']}"
        found[device.name] = dataclasses.replace(found[device.name], **cleared | given)
    return tuple(found.values())


def find(kind: str, devices: Sequence[Device] | None = None) -> Device | None:
    """The device that JAX calls `kind` (`jax.devices()[0].device_kind`); None where none is listed.

    An expression must match the whole of `kind`: a slice of a board ("... MIG 1g.10gb") is not
    the board. The longest expression wins, of equals the last, which is a user's. A CPU is not
    listed: its peak, power and price depend on what it is part of.
    """
    found = None, -1
    for device in table() if devices is None else devices:
        for pattern in device.match:
            if len(pattern) >= found[1] and re.fullmatch(pattern, kind):
                found = device, len(pattern)
    return found[0]


def count() -> int:
    """Devices that draw power and are paid for: JAX's, but of a CPU the hosts: JAX may split it."""
    return jax.process_count() if jax.default_backend() == "cpu" else jax.device_count()


def cpu_model() -> str | None:
    """The processor's name, as Linux gives it; None elsewhere."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", _CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1].strip() if found else None


class Stated(NamedTuple):
    """A number that was not measured here, and who states it."""

    value: float
    source: str


# A site of which nothing is known is taken for an average one, in both respects.
PUE = Stated(1.54, "average of Uptime Institute's Global Data Center Survey 2025")
GRID = Stated(458.0, "world average of 2025, Ember, Global Electricity Review 2026")
_AT_LEAST = {"price": 0.0, "watts": 1.0, "pue": 1.0, "grid": 0.0}


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What a user states: None takes the table's number or the average. Energy and money share it.

    `price` dollars a device-hour, `watts` a device, `pue` all energy of the site over that of its
    computers, `grid` gCO2e a kWh.
    """

    price: float | None = None
    watts: float | None = None
    pue: float | None = None
    grid: float | None = None

    def __post_init__(self):
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= least):
                raise ValueError(
                    f"--{name}={value:g} must be a finite number of at least {least:g}."
                )

    def power(self, device: Device | None) -> Stated | str:
        """Watts of a device, or how to state them."""
        if self.watts is not None:
            return Stated(self.watts, "--watts")
        if device is None or device.watts is None:
            return "no power is listed for this device; state it with --watts=WATTS_PER_DEVICE"
        return Stated(device.watts, f"{device.name}: {device.watts_source}")

    def rate(self, device: Device | None) -> Stated | str:
        """Dollars a device-hour, or how to state them."""
        if self.price is not None:
            return Stated(self.price, "--price")
        if device is None or device.price is None:
            return (
                "no price is listed for this device; state it with --price=DOLLARS_PER_DEVICE_HOUR"
            )
        where = filter(None, (device.price_source, device.price_date))
        return Stated(device.price, f"{device.name}: {', '.join(where)}")

    def overhead(self) -> Stated:
        """The site's PUE."""
        return PUE if self.pue is None else Stated(self.pue, "--pue")

    def carbon(self) -> Stated:
        """gCO2e a kWh."""
        return GRID if self.grid is None else Stated(self.grid, "--grid")
