"""Lengths of time in settings: training in steps, samples or epochs, waiting in seconds, a range of steps."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from data_tools.errors import UsageError

FOREVER = "forever"
ENDLESS = 1 << 62  # steps of a run without an end
_UNITS = ("epochs", "steps", "samples")
_SECONDS = {"seconds": 1.0, "minutes": 60.0, "hours": 3600.0}
_NUMBER = r"([0-9]{1,15}(?:_[0-9]{1,15}){0,5}(?:\.[0-9]{1,15})?(?:[eE][0-9]{1,2})?)"
_TIME = re.compile(rf"^\s*{_NUMBER}\s*(second|minute|hour)s?\s*$")
_STEPS = re.compile(r"^\s*([0-9]{1,15})(?:\s*-\s*([0-9]{1,15}))?\s*$")
_DURATION = re.compile(rf"^\s*{_NUMBER}\s*(epoch|step|sample)s?\s*$")
_LONGEST = 10**12  # epochs, steps or samples: more than anyone trains, and no overflow anywhere
_MOST_PROFILED = 100


def parse_duration(text: str, where: str, endless: bool = True) -> tuple[Fraction, str]:
    """`"3 epochs"` -> (3, "epochs"); units are epochs, steps and samples. Where it may be `endless`,
    `"forever"` -> (ENDLESS, "forever").

    Raises UsageError for anything else, `where` being the setting.
    """
    if text == FOREVER and endless:
        return Fraction(ENDLESS), FOREVER
    match = _DURATION.match(str(text))
    if not match:
        raise UsageError(
            f"{where} is not a duration",
            got=repr(text),
            expected="a number and one of " + ", ".join(_UNITS),
            remedy="or forever" if endless else None,
        )
    number = Fraction(match[1])
    if number > _LONGEST:
        remedy = FOREVER if endless else None
        raise UsageError(f"{where} is too long", got=repr(text), expected=f"{_LONGEST:.0e} at most", remedy=remedy)
    return number, f"{match[2]}s"


def duration_steps(text: str, where: str, steps_per_epoch: int, global_batch: int) -> int:
    """A duration in optimizer steps, rounded up to a whole step. Raises UsageError."""
    number, unit = parse_duration(text, where)
    scale = {"epochs": Fraction(steps_per_epoch), "samples": Fraction(1, global_batch)}.get(unit, 1)
    return math.ceil(number * scale)


def parse_seconds(text: str, where: str) -> float:
    """`"20 minutes"` -> 1200.0; units are seconds, minutes and hours. Raises UsageError."""
    match = _TIME.match(str(text))
    if not match:
        raise UsageError(
            f"{where} is not a time", got=repr(text), expected="a number and one of " + ", ".join(_SECONDS)
        )
    return float(match[1]) * _SECONDS[f"{match[2]}s"]


def parse_steps(text: str, where: str) -> tuple[int, int]:
    """`"10-12"` -> (10, 12), and `"10"` -> (10, 10). Raises UsageError."""
    match = _STEPS.match(str(text))
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise UsageError(f"{where} is not a range of steps", got=repr(text), expected="FIRST-LAST, such as 10-12")
    if last - first >= _MOST_PROFILED:
        raise UsageError(f"{where} is too long for a trace", got=repr(text), expected=f"{_MOST_PROFILED} steps at most")
    return first, last
