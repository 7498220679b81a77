"""Files outside an input reach no shard: ../, absolute paths and links of every kind, unless they are asked for."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from data_tools.__main__ import main
from data_tools.pack.inside import Boundary
from packing import jpeg, write_jsonl


@pytest.fixture
def place(tmp_path):
    """`in` is the input; `out` and `in-other` lie beside it."""
    for name in ("in/sub", "out/sub", "in-other"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("in/a.jpg", "in/sub/b.jpg", "out/c.jpg", "out/sub/d.jpg", "in-other/e.jpg"):
        (tmp_path / name).write_bytes(jpeg(len(name)))
    links = {
        "in/to_a.jpg": "a.jpg",
        "in/sub/up.jpg": "../a.jpg",
        "in/absolute.jpg": tmp_path / "in/a.jpg",
        "in/to_c.jpg": "../out/c.jpg",
        "in/to_c_absolute.jpg": tmp_path / "out/c.jpg",
        "in/twice.jpg": "to_c.jpg",
        "in/folder": "../out",
        "in/folder_inside": "sub",
        "in/loop.jpg": "loop.jpg",
        "in/dangling.jpg": "../out/none.jpg",
        "link_to_in": "in",
    }
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    return tmp_path


INSIDE = ("a.jpg", "sub/b.jpg", "to_a.jpg", "sub/up.jpg", "absolute.jpg", "folder_inside/b.jpg", "sub/../a.jpg",
          "./a.jpg", "../in/a.jpg", "none.jpg", "none/none.jpg", "..a.jpg", "loop.jpg", "a\0.jpg")  # fmt: skip
OUTSIDE = ("../out/c.jpg", "../in-other/e.jpg", "to_c.jpg", "to_c_absolute.jpg", "twice.jpg", "folder/c.jpg",
           "folder/sub/d.jpg", "dangling.jpg", "../none.jpg", "..", "sub/../../out/c.jpg", "/", "/dev/null",
           "folder_inside/../../out/c.jpg", "folder/../in-other/e.jpg")  # fmt: skip


@pytest.mark.parametrize("root", ["in", "link_to_in", "in/../in", "in/"])
def test_only_files_below_the_root_pass(place, monkeypatch, root):
    monkeypatch.chdir(place)
    for start in (place / root, type(place)(root)):
        boundary = Boundary(start)
        assert [path for path in (*INSIDE, str(place / "in/a.jpg")) if boundary.fault(path)] == []
        outside = (*OUTSIDE, str(place / "out/c.jpg"))
        assert [path for path in outside if not boundary.fault(path)] == []
        assert {boundary.fault(path)[0] for path in outside} == {"outside_input"}
    follows = Boundary(place / root, follow_links=True)
    assert not any(follows.fault(path) for path in (*INSIDE, *OUTSIDE))


def account(shards) -> dict[str, str | None]:
    rows = [row for path in sorted(shards.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    return {row["captions"][0]: row["error_class"] for row in rows}


def test_a_table_reaches_no_file_outside_unless_asked(place, capsys):
    names = [
        "a.jpg",
        "to_a.jpg",
        "../out/c.jpg",
        "to_c.jpg",
        "folder/sub/d.jpg",
        str(place / "out/c.jpg"),
        str(place / "in/sub/b.jpg"),
    ]
    table = write_jsonl(place / "in/t.jsonl", [{"image": name, "caption": name} for name in names])
    assert main(["pack", str(table), str(place / "shards"), "--workers", "1"]) == 0
    assert {name: error for name, error in account(place / "shards").items() if error} == dict.fromkeys(
        names[2:6], "outside_input"
    )
    assert main(["pack", str(table), str(place / "all"), "--workers", "1", "--follow-links"]) == 0
    assert account(place / "all") == dict.fromkeys(names)
    capsys.readouterr()


def test_a_root_that_is_named_holds_its_files(place):
    """Absolute paths are fine below --image-root: the user named that folder, not the table."""
    name = str(place / "out/c.jpg")
    table = write_jsonl(place / "in/t.jsonl", [{"image": name, "caption": name}])
    assert main(["pack", str(table), str(place / "shards"), "--workers", "1", "--image-root", str(place / "out")]) == 0
    assert account(place / "shards") == {name: None}
