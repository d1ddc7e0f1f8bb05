"""What claims on resources share: experiments of one layer, each with a mixer, over tokens."""

from typing import Any, Literal

from configs.claims import Measured
from configs.schema import Data, Experiment
from models import lm

LENGTHS = (4096, 8192, 16384, 32768)
CONTEXTS = (4096, 65536)
ENCODERS = ("models.low_rank.", "models.attention.bidirectional")  # they read both ways

# What is measured here in place of the paper's numbers.
GROWTH = (
    "the exponent of FLOPs of one layer of width 64 from 4,096 to 32,768 tokens, its projections "
    "included, which grow as N."
)
STATE = "bytes of one layer of width 64 after 65,536 tokens over those after 4,096."


def experiment(mixer: Any, width: int = 64, depth: int = 1, **model: Any) -> Experiment:
    """An untrained model of a mixer or a block alone, in bfloat16, one row a batch."""
    built = lm.Config(
        vocabulary=8, width=width, depth=depth, pattern=(mixer,), channel=None, **model
    )
    return Experiment(model=built, data=Data(batch=1))


def growth(**mixers: Any) -> dict[str, Measured]:
    """The exponent of a row's FLOPs over its length, for each mixer, or one for each length."""
    return {
        name.replace("_", " "): Measured("flops", _rows(mixer), LENGTHS, "exponent")
        for name, mixer in mixers.items()
    }


def state(**mixers: Any) -> dict[str, Measured]:
    """Bytes that decoding carries late in a text over those early, for each mixer."""
    return {
        name.replace("_", " "): Measured("state", experiment(mixer), CONTEXTS, "growth")
        for name, mixer in mixers.items()
    }


def _rows(mixer: Any) -> Experiment | tuple[Experiment, ...]:
    """One experiment, or one a length where a mixer has filters as long as a row."""
    return tuple(map(_row, mixer)) if isinstance(mixer, tuple) else _row(mixer)


def _row(mixer: Any) -> Experiment:
    encodes = type(mixer).__module__.startswith(ENCODERS)
    objective: Literal["next", "masked"] = "masked" if encodes else "next"
    return experiment(mixer, objective=objective)
