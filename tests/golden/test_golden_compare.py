"""What `compare.py` calls a difference."""

from __future__ import annotations

import copy
import math

import pytest

from compare import compare
from golden_cases import STEPS

SIDE = {
    "steps": [{"loss": 2.5 - step / 10, "grad_norm": 1.0} for step in range(STEPS)],
    "counts": {"aten": {"add": 5}, "collectives": {"allreduce_": 3}, "collective_bytes": 800, "peak_bytes": 4096},
}


def changed(*keys, value):
    side = copy.deepcopy(SIDE)
    place = side
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return side


def test_equal_sides_have_no_fault():
    assert compare(SIDE, copy.deepcopy(SIDE), "case") == []
    assert compare(SIDE, changed("counts", "aten", value={"add": 4}), "case") == []


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (changed("steps", 2, "loss", value=math.nextafter(2.3, 3)), "1 steps differ, the first is 3"),
        (changed("steps", value=SIDE["steps"][:-1]), "1 steps differ, the first is 10"),
        (changed("counts", "aten", value={"add": 5, "mul": 2}), "aten 7 of a step, 5 at c1b74ca: mul +2"),
        (changed("counts", "peak_bytes", value=4097), "peak_bytes 4097 of a step, 4096"),
        ({"failed": "error: no"}, "this tree failed: error: no"),
    ],
)
def test_whatever_differs_is_a_fault(now, said):
    (fault,) = compare(SIDE, now, "case")
    assert said in fault


def test_runs_that_logged_nothing_are_not_equal():
    (fault,) = compare(changed("steps", value=[]), changed("steps", value=[]), "case")
    assert "0 steps were logged" in fault
