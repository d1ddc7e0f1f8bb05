"""Dollars: the price of devices by the hour times the time that work takes.

    $ a token      = $ a device-hour x devices x seconds of a call / 3600 / its tokens
    $ of a run     = $ a token x steps x tokens of a step
    $ a parameter  = $ of the run / parameters

The last is the financial metric of the survey arXiv 2401.00625: the total cost of training a model
over the number of its parameters. All are modelled, over a measured time and a stated price; time
that a machine waits, or compiles, is not in them.
"""

from resources.devices import Assumptions, Device
from resources.row import Row, not_available

_MILLION = 1_000_000


def rows(
    kind: str,
    seconds: float,
    tokens: int,
    device: Device | None,
    devices: int,
    assumptions: Assumptions,
) -> list[Row]:
    """Dollars a million tokens of a call on `tokens` tokens that takes `seconds`.

    Each of `devices` (`devices.count()`) is paid for, at the price stated or listed.
    """
    name, unit = f"{kind} cost", "$/Mtok"
    rate = assumptions.rate(device)
    if isinstance(rate, str):
        return [not_available(name, unit, rate)]
    dollars = rate.value * devices * seconds / 3600 / tokens * _MILLION
    note = f"{rate.value:g} $ a device-hour x {devices} ({rate.source})"
    return [Row(name, dollars, unit, "modelled", note)]


def run_rows(
    train: Row,
    steps: int,
    tokens: int,
    parameters: int,
    *,
    loss: float | None = None,
    reached: int | str | None = None,
) -> list[Row]:
    """Dollars of a run of `steps` steps on `tokens` tokens each, to a loss, and a parameter.

    `train` is the row of dollars a million tokens: if it has no value, these have none for its
    reason. `reached` is the number of steps after which the run had the loss `loss`, in bits per
    byte of validation; None: never; or the reason why nobody knows.
    """
    to_loss = "training cost to a loss" if loss is None else f"training cost to {loss:g} bit/byte"
    names = (
        ("training run cost", "$"),
        (to_loss, "$"),
        ("training cost a parameter", "$/parameter"),
    )
    if train.value is None:
        return [not_available(name, unit, train.note) for name, unit in names]
    step = train.value * tokens / _MILLION
    run = f"{train.name} x {steps} steps of {tokens} tokens"
    found = [Row(names[0][0], step * steps, "$", "modelled", run)]
    if loss is None:
        found.append(not_available(*names[1], "no --loss to reach was named"))
    elif isinstance(reached, str):
        found.append(not_available(*names[1], reached))
    elif reached is None:
        found.append(not_available(*names[1], f"the run of {steps} steps never had this loss"))
    else:
        note = f"{train.name} x {reached} steps of {tokens} tokens"
        found.append(Row(to_loss, step * reached, "$", "modelled", note))
    note = "the run's cost / all parameters (arXiv 2401.00625)"
    found.append(Row(names[2][0], step * steps / parameters, "$/parameter", "modelled", note))
    return found
