"""Loss spikes: what is one, what is not, and what the watch remembers."""

import math
import random

from pretrain.loop.faults import ENOUGH, WINDOW, spike


def falling(steps, seed=0):
    """A loss curve with 2 % noise."""
    noise = random.Random(seed)
    return [(1 + 6 * math.exp(-step / 300)) * noise.gauss(1, 0.02) for step in range(steps)]


def spikes(losses, sensitivity=6.0):
    recent = []
    return [step for step, loss in enumerate(losses) if spike(loss, recent, sensitivity)]


def test_noise_on_a_falling_curve_is_none_and_a_jump_is_one():
    losses = falling(2000)
    assert spikes(losses) == []
    for step in (100, 101, 900):
        losses[step] *= 1.5
    losses[500] *= 0.2
    assert spikes(losses) == [100, 101, 900]


def test_the_first_losses_are_not_judged():
    assert spikes([1.0] * (ENOUGH - 1) + [9.0]) == []
    assert spikes([1.0] * ENOUGH + [9.0]) == [ENOUGH]


def test_flat_losses_leave_room_for_rounding():
    assert spikes([2.0] * 50 + [2.1]) == []
    assert spikes([2.0] * 50 + [2.13]) == [50]


def test_a_new_level_is_accepted_and_memory_is_bounded():
    recent = []
    found = [spike(loss, recent, 6.0) is not None for loss in [1.0] * 200 + [2.0] * 200]
    assert found[200]
    assert not any(found[200 + WINDOW // 2 + 1 :])
    assert recent == [2.0] * WINDOW


def test_the_bounds_are_told():
    recent = [1.0, 1.1] * 20
    expected, threshold = spike(5.0, recent, 6.0)
    assert expected == 1.05
    assert math.isclose(threshold, 1.05 + 6 * 1.4826 * 0.05)
    assert recent[-1] == 5.0
