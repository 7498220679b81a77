"""The first batches are those that commit c1b74ca made, at every world size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from golden_batches import CASES, digest, first_batches

# Computed at commit c1b74ca by this folder's golden_batches.py, and never from later code. A commit that changes one on
# purpose says why. Where `pixels` alone differ, look first whether torch's resize or Pillow's colours have changed.
GOLDEN = json.loads(Path(__file__).with_name("golden_batches.json").read_text())


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_first_batches(tmp_path, name, world_size):
    wanted, differ = GOLDEN[name], []
    for step, batch in enumerate(first_batches(CASES[name], tmp_path / "run", world_size)):
        found = {field: digest(array) for field, array in batch.items()}
        assert sorted(found) == sorted(wanted[step])
        differ += [(step, field) for field in found if found[field] != wanted[step][field]]
    assert (step, differ) == (len(wanted) - 1, [])
