"""Sizes that meet a budget: of planted measures, and of ten architectures for every pair."""

import dataclasses
import functools
import itertools
import re

import jax
import pytest

from configs import schema
from configs.schema import Data, Experiment, Optimizer
from evaluation import budget, sizes, speed
from evaluation.subject import Subject
from models import catalogue, lm
from models.attention import softmax
from models.block import residual
from models.channel import deepseek_moe, glu
from models.linear_attention import gla
from models.state_space import mamba2

NAMES = (
    "softmax mqa gla gated_deltanet mamba2 rg_lru hgrn2 retnet rwkv7 dropless"  # of ten families
).split()
STATE = "state:512"  # a context at which states of attention and of recurrences compare
STATE_WIDTHS = dict(  # for 4.2 MB: widths at which their steps are fine enough
    softmax=256,
    mqa=1024,
    gla=1024,
    gated_deltanet=640,
    mamba2=512,
    rg_lru=53248,
    hgrn2=736,
    retnet=736,
    rwkv7=736,
    dropless=256,
)
KNOWN: dict[str, budget.Known] = {}


def experiment(name: str, width: int = 192, depth: int = 4, **model) -> Experiment:
    config = catalogue.variants()[name]
    built = lm.Config(width=width, depth=depth, pattern=(config,))
    if lm.is_channel(config):
        built = lm.Config(width=width, depth=depth, channel=config)
    changed = dataclasses.replace(built, **model)
    return Experiment(model=changed, data=Data(length=64, batch=8))


def check_pair(first: Experiment, second: Experiment, of: str) -> None:
    known = KNOWN.setdefault(of, {})
    chosen = budget.named(of)
    given, sized = budget.match([first, second], chosen, known=known)
    assert given is first
    measured = functools.partial(budget.value, budget=chosen, known=known)
    if not chosen.slow:
        measured = budget.named(of).measure  # anew, without what is known
    assert abs(measured(sized) / measured(first) - 1) <= 0.01
    same = {"width": 1, "depth": 1, "channel": None, "pattern": ()}
    one, two = (dataclasses.replace(e.model, **same) for e in (second, sized))
    assert one == two  # nothing else has changed
    assert dataclasses.replace(sized, model=second.model) == second


@pytest.mark.parametrize(
    "first, second, of",
    [
        ("gla", "dropless", "parameters"),
        ("mamba2", "gla", "flops"),
        ("hgrn2", "softmax", "state:64"),
    ],
)
def test_a_pair(first, second, of):
    check_pair(experiment(first, 128, 2), experiment(second, 96, 2), of)


@pytest.mark.long
@pytest.mark.parametrize("second", NAMES)
@pytest.mark.parametrize("of", ["parameters", "flops", STATE, "memory"])
def test_all_pairs(of, second):
    widths, depth = (STATE_WIDTHS, 8) if of == STATE else (dict.fromkeys(NAMES, 192), 4)
    for first in NAMES:
        if first != second:
            one, two = (experiment(name, widths[name], depth) for name in (first, second))
            check_pair(one, two, of)


def test_a_config_that_meets_the_budget_stays():
    given = experiment("gla", 60, 2)
    chosen = budget.named("parameters")
    value = chosen.measure(given)
    assert budget.solve(given, chosen, 1.009 * value) is given
    assert budget.solve(given, chosen, 1.011 * value) is not given


def test_a_model_without_channel_mixer_gets_another_depth():
    pattern = (residual.Config(mamba2.Config(head_dim=16, state=16)),)
    given = experiment("mamba2", 96, 6, pattern=pattern)
    chosen = budget.named("parameters")
    target = chosen.measure(sizes.sized(given, width=112, depth=5))
    sized = budget.solve(given, chosen, target)
    assert sized.model.depth != 6
    assert abs(chosen.measure(sized) / target - 1) <= 0.01


def test_a_miss_names_the_nearest_two_below_and_above():
    given = experiment("mamba2", 64, 1)  # widths in steps of 32, and two depths
    chosen, known = budget.named("state:64"), {}
    values = {
        (w, d): budget.value(sizes.sized(given, width=w, depth=d), chosen, known)
        for w in (32, 64, 96)
        for d in (1, 2)
    }
    target = 1.2 * values[32, 1]
    (low, below), (high, above) = sorted((v, at) for at, v in values.items())[:2]
    assert low < target < high
    with pytest.raises(ValueError) as caught:
        budget.solve(given, chosen, target, known=known)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"state:64: nothing within 1 % of {target / 1e3:.4g} kB. Nearest: ")
    found = re.findall(r"width (\d+), depth (\d+): state:64 ([\d.]+) kB \(([-+][\d.]+) %\)", line)
    assert [(int(w), int(d)) for w, d, *_ in found] == [below, above]
    assert [float(share) for *_, share in found] == [
        pytest.approx(100 * (v / target - 1), abs=0.6) for v in (low, high)
    ]


def test_what_no_config_can_have_is_said():
    encoder = experiment("bidirectional", 32, 1, objective="masked")
    with pytest.raises(ValueError, match="an encoder keeps no state"):
        budget.solve(encoder, budget.named("state:64"), 1e4)
    with pytest.raises(ValueError, match="target nan must be positive"):
        budget.solve(encoder, budget.named("parameters"), float("nan"))
    with pytest.raises(ValueError, match="heads=4 does not divide the width 30"):
        budget.solve(experiment("softmax", 30), budget.named("parameters"), 1e5)


@pytest.mark.parametrize("text", ["state", "state:", "state:-1", "state:0", "width", "flops:2"])
def test_unknown_budgets(text):
    with pytest.raises(ValueError, match=f"no budget {text!r}. Use parameters, flops, memory"):
        budget.named(text)


def test_what_was_changed_is_described():
    before = [experiment("gla", 64, 2), experiment("softmax", 96, 2)]
    planted = budget.Budget("area", "B", lambda e: e.model.width**2 * e.model.depth)
    after = budget.match(before, planted)
    assert budget.describe(before, after, planted) == [
        "width 64, depth 2: area 8.192 kB (+0 %)",
        "width 96 -> 64, depth 2: area 8.192 kB (+0 %)",
    ]
    hidden = [before[0], sizes.sized(after[1], hidden=100)]
    assert budget.describe(before, hidden, planted)[1] == (
        "width 96 -> 64, depth 2, hidden by its rule -> 100: area 8.192 kB (+0 %)"
    )


def test_each_experiment_is_measured_once():
    asked = []

    def area(e):
        asked.append(schema.fingerprint(e))
        return float(e.model.width**2)

    known: budget.Known = {}
    before = [experiment("gla", 64, 1), experiment("softmax", 136, 1)]
    planted = budget.Budget("area", "", area)
    budget.describe(before, budget.match(before, planted, known=known), planted, known)
    assert len(set(asked)) == len(asked) <= 7


def test_the_hidden_size_is_set_where_it_is_at_work():
    moe, plain = deepseek_moe.Config(), glu.Config()
    idle = experiment("gla", pattern=(residual.Config(gla.Config(), moe),), channel=plain)
    sized = sizes.sized(idle, hidden=40).model
    assert sized.pattern[0].channel == dataclasses.replace(moe, hidden=40)
    assert sized.channel == plain
    mixed = experiment("gla", pattern=(gla.Config(), residual.Config(gla.Config(), plain), moe))
    sized = sizes.sized(mixed, hidden=40).model
    assert sized.channel.hidden == sized.pattern[1].channel.hidden == 40
    assert sized.pattern[2] == moe
    none = experiment("mamba2", pattern=(residual.Config(mamba2.Config()),))
    assert sizes.of(none) == {"width": 192, "depth": 4}


def test_steps_between_widths_and_depths():
    assert sizes.step(experiment("softmax", 96)) == 8  # four heads of even size
    assert sizes.step(experiment("mamba2", 96)) == 32  # heads of 64 in twice the width
    assert sizes.step(experiment("gru", 96)) == 1
    hybrid = experiment("gla", depth=5, pattern=(gla.Config(), softmax.Config()))
    assert list(sizes.depths(hybrid.model)) == [5, 7, 3, 9]


MEASURES = {
    "line": lambda w: 3.0 * w,
    "square": lambda w: 2.0 * w * w,
    "model": lambda w: 12.0 * 6 * w * w + 300.0 * w,
    "steps": lambda w: 4.0 * w * w + 6.0 * w * (-(-8 * w // 96) * 32),
    "constant": lambda w: 5e5 + w,
    "cliff": lambda w: w + 1e6 * (w > 500),
}


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("start, step", [(512, 1), (512, 8), (96, 12), (33, 32), (8, 8)])
def test_the_search_finds_the_nearest_of_all_sizes(name, start, step):
    measure, legal = MEASURES[name], range(start % step or step, 1 << 14, step)
    calls = []

    def counted(width):
        calls.append(width)
        return measure(width)

    for goal in (1, 9, 40, 77, 500, 501, 1000, 7000):
        target = 1.003 * measure(goal)
        calls.clear()
        found = sizes.around(counted, start, step, target)
        errors = {w: abs(measure(w) - target) for w in legal}
        assert errors[found[0]] == min(errors.values())
        assert len(found) == 1 or abs(found[0] - found[1]) == step
        assert len(calls) == len(set(calls)) <= (40 if name in ("constant", "cliff") else 10)


def test_the_search_passes_over_sizes_that_do_not_build():
    measure = lambda w: None if 480 <= w <= 520 and w != 496 else float(w)
    assert sizes.around(measure, 512, 8, 500.0) == [496, 528]
    assert sizes.around(lambda _: None, 512, 8, 500.0) == []


def test_a_slow_search_ends_within_tolerance():
    calls = []

    def measure(width):
        calls.append(width)
        return 3.0 * width * width + 1e4

    (found,) = sizes.around(measure, 128, 8, 3e6, near=0.01)
    assert abs(measure(found) / 3e6 - 1) <= 0.01 and len(calls) <= 5


def test_crossing():
    assert sizes.crossing([(2, 10.0), (4, 20.0)], 25.0) == 5.0
    assert sizes.crossing([(2, 10.0), (4, 10.0)], 25.0) is None
    assert sizes.crossing([(2, None), (4, 10.0)], 25.0) is None


def test_one_amount_of_money_buys_steps():
    optimizer = Optimizer(warmup_steps=100)
    runs = [Experiment(steps=steps, optimizer=optimizer) for steps in (1000, 7, 2000)]
    seconds = [0.3, 0.1, 0.7]
    sized = budget.match_dollars(runs, seconds)
    assert [run.steps for run in sized] == [1000, 3000, 429]
    first, *others = map(lambda run, s: budget.dollars(run, s, 36.0), sized, seconds)
    assert first == pytest.approx(3.0)  # 1000 steps of 0.3 s at a cent a second
    assert others == pytest.approx([first, first], rel=0.01)


@pytest.mark.long
def test_all_pairs_of_one_amount_of_money():
    runs = [dataclasses.replace(experiment(name), steps=10_000) for name in NAMES]
    one_device = jax.devices()[:1]
    subjects = [Subject("", run, devices=one_device) for run in runs]
    seconds = [found.timing.median for found in speed.timed(subjects, "train", 0.5)]
    pairs = list(itertools.permutations(zip(runs, seconds, strict=True), 2))
    assert len(pairs) == 90
    for (one, each), (two, other) in pairs:
        given, sized = budget.match_dollars([one, two], [each, other])
        assert given is one and dataclasses.replace(sized, steps=two.steps) == two
        wanted, found = budget.dollars(one, each, 2.5), budget.dollars(sized, other, 2.5)
        assert abs(found / wanted - 1) <= 0.01


def test_money_that_buys_too_little_is_said():
    optimizer = Optimizer(warmup_steps=0)
    runs = [Experiment(steps=10, optimizer=optimizer) for _ in range(2)]
    with pytest.raises(ValueError, match=r"10 steps of the first config buys 2\.5, no whole"):
        budget.match_dollars(runs, [1.0, 4.0])
    runs[1].optimizer = Optimizer(warmup_steps=6)
    with pytest.raises(ValueError, match=r"buys 5, below optimizer\.warmup_steps=6"):
        budget.match_dollars(runs, [1.0, 2.0])
    with pytest.raises(ValueError, match=r"seconds=\[1\.0\]: give one above 0"):
        budget.match_dollars(runs, [1.0])
