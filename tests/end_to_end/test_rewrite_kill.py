"""SIGKILL at every commit point of the verbs that make shards of shards."""

from __future__ import annotations

from data_tools.corpus import open_corpus
from kill_points import killed_at_every_point
from packing import contents, data_tools, photo_folder


def test_a_killed_reshard_is_finished_by_the_same_command(tmp_path):
    photo_folder(tmp_path / "photos", 9)
    data_tools("pack", tmp_path / "photos", tmp_path / "shards", "--samples-per-shard", 4)
    words = ["reshard", tmp_path / "shards", "OUTPUT", "--samples-per-shard", 5, "--workers", 1]
    steps = killed_at_every_point(words, tmp_path / "work")
    whole = contents(tmp_path / "work/whole")
    for point in range(1, steps + 1):
        left = contents(tmp_path / f"work/killed{point}")
        shards = {name: data for name, data in left.items() if name.startswith("shard-")}
        assert shards.items() <= whole.items()
        assert contents(tmp_path / f"work/point{point}") == whole


def test_a_repair_that_is_killed_is_finished_by_the_same_command(tmp_path):
    photo_folder(tmp_path / "photos", 6)
    data_tools("pack", tmp_path / "photos", tmp_path / "shards", "--samples-per-shard", 4)
    tar = tmp_path / "shards/shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    steps = killed_at_every_point(["repair", "OUTPUT", "--workers", 1], tmp_path / "work", tmp_path / "shards")
    whole = contents(tmp_path / "work/whole")
    assert "damaged/shard-000000.tar" in whole
    for point in range(1, steps + 1):
        assert contents(tmp_path / f"work/point{point}") == whole, point


def test_a_folder_is_a_whole_corpus_wherever_a_deletion_is_killed(tmp_path):
    """The old or the new one; and the same command ends with the same bytes."""
    photo_folder(tmp_path / "photos", 9)
    data_tools("pack", tmp_path / "photos", tmp_path / "shards", "--samples-per-shard", 4)
    data_tools("hash", tmp_path / "shards")
    (tmp_path / "ids.txt").write_text("photo.1.jpg\nphoto.2.jpg\nphoto.3.jpg\nphoto.4.jpg\n")
    words = ["delete", "OUTPUT", "--ids", tmp_path / "ids.txt", "--workers", 1]
    steps = killed_at_every_point(words, tmp_path / "work", tmp_path / "shards")
    whole, sizes = contents(tmp_path / "work/whole"), set()
    for point in range(1, steps + 1):
        killed = tmp_path / f"work/killed{point}"
        sizes.add(open_corpus(killed).num_samples)
        assert contents(tmp_path / f"work/point{point}") == whole, point
    assert sizes == {9, 5}
