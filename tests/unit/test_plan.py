"""The memory that --dry-run promises."""

import pytest

import tiny
from pretrain.config import TrainConfig
from pretrain.plan import activation_bytes, state_bytes


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "states"),
    [(0, 4000, 4000, 8000), (1, 4000, 4000, 3000), (2, 4000, 1000, 3000), (3, 1000, 1000, 3000)],
)
def test_states_of_a_thousand_parameters_on_four_ranks(stage, weights, gradients, states):
    parts = state_bytes(1000, TrainConfig(zero_stage=stage), 4)
    assert list(parts.values()) == [weights, gradients, states]


def test_activations_shrink_under_autocast():
    model = tiny.build()
    full, half = activation_bytes(model, bf16=False), activation_bytes(model, bf16=True)
    assert 0 < half < full
