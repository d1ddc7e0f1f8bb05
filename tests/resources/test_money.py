"""Dollars against sums done by hand; without a price there are none."""

import pytest

from resources import money
from resources.devices import Assumptions, Device
from resources.row import Row, not_available

DEVICE = Device("X", price=3.6, price_source="a cloud", price_date="2026-01")


def test_a_million_tokens():
    """3.6 $ an hour is 0.001 $ a second; 4 devices for 0.5 s are 0.002 $, for 100 tokens."""
    (row,) = money.rows("train", 0.5, 100, DEVICE, 4, Assumptions())
    assert row.value == pytest.approx(0.002 / 100 * 1e6)
    assert (row.name, row.unit, row.provenance) == ("train cost", "$/Mtok", "modelled")
    for word in ("3.6 $ a device-hour", "x 4", "X: a cloud, 2026-01"):
        assert word in row.note


def test_a_stated_price_comes_first_and_may_be_nothing():
    (row,) = money.rows("decode", 0.5, 100, DEVICE, 1, Assumptions(price=7.2))
    assert row.value == pytest.approx(0.001 / 100 * 1e6) and "--price" in row.note
    assert money.rows("decode", 0.5, 100, None, 1, Assumptions(price=0.0))[0].value == 0


def test_without_a_price_the_row_says_how_to_give_one():
    for device in (None, Device("X")):
        (row,) = money.rows("prefill", 0.5, 100, device, 1, Assumptions())
        assert row.value is None and "--price=DOLLARS_PER_DEVICE_HOUR" in row.note


TRAIN = Row("train cost", 20.0, "$/Mtok", "modelled", "a price")  # 20 micro-dollars a token


def test_a_run_to_its_end_to_a_loss_and_a_parameter():
    whole, to_loss, each = money.run_rows(TRAIN, 1000, 5000, 250, loss=2.5, reached=400)
    assert whole.value == pytest.approx(20e-6 * 1000 * 5000) and whole.unit == "$"
    assert to_loss.value == pytest.approx(20e-6 * 400 * 5000)
    assert to_loss.name == "training cost to 2.5 bit/byte" and "400 steps of 5000" in to_loss.note
    assert each.value == pytest.approx(100 / 250) and each.unit == "$/parameter"
    assert {row.provenance for row in (whole, to_loss, each)} == {"modelled"}


def test_a_loss_never_reached_or_never_named_costs_nothing_invented():
    never = money.run_rows(TRAIN, 1000, 5000, 250, loss=2.5)[1]
    assert never.value is None and "1000 steps never had this loss" in never.note
    unnamed = money.run_rows(TRAIN, 1000, 5000, 250)[1]
    assert unnamed == not_available("training cost to a loss", "$", "no --loss to reach was named")
    assert money.run_rows(TRAIN, 10, 5000, 250, loss=9.0, reached=0)[1].value == 0


def test_a_run_without_a_price_says_why():
    train = not_available("train cost", "$/Mtok", "no price")
    rows = money.run_rows(train, 1000, 5000, 250, loss=2.5, reached=3)
    assert [(row.value, row.note) for row in rows] == [(None, "no price")] * 3
    assert [row.name for row in rows] == [
        row.name for row in money.run_rows(TRAIN, 1000, 5000, 250, loss=2.5, reached=3)
    ]
