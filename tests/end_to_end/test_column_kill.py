"""SIGKILL at every commit point of the verbs that write columns."""

from __future__ import annotations

import pytest

from kill_points import killed_at_every_point
from packing import contents, data_tools, photo_folder


@pytest.mark.parametrize("verb", ["hash", "dedup"])
def test_a_killed_verb_is_finished_by_the_same_command(verb, tmp_path):
    photo_folder(tmp_path / "photos", 9)
    data_tools("pack", tmp_path / "photos", tmp_path / "shards", "--samples-per-shard", 4)
    if verb == "dedup":
        data_tools("hash", tmp_path / "shards")
    steps = killed_at_every_point([verb, "OUTPUT", "--workers", 1], tmp_path / "work", tmp_path / "shards")
    assert steps == 3 * 3 + 3  # of three columns and the manifest the file, the rename, the folder
    whole = contents(tmp_path / "work/whole")
    for point in range(1, steps + 1):
        left = contents(tmp_path / f"work/killed{point}")
        columns = {name: data for name, data in left.items() if name.endswith(f".{verb}.parquet")}
        assert columns.items() <= whole.items()  # whole or absent
        assert contents(tmp_path / f"work/point{point}") == whole
