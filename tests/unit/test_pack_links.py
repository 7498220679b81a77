"""Folders with links: every folder once, nothing from outside unless it is asked for."""

from __future__ import annotations

import os

import pytest

from data_tools.errors import UserError
from data_tools.pack.folder import read_folder
from data_tools.pack.inside import Boundary
from data_tools.pack.rows import group, measure
from packing import jpeg


def photo(folder, name: str, caption: str = "a caption") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(jpeg())
    (folder / name).with_suffix(".txt").write_text(caption)


@pytest.fixture
def photos(tmp_path):
    for name in ("a/1.jpg", "b/c/2.jpg", "3.jpg"):
        photo(tmp_path / "in", name)
    return tmp_path / "in"


def account(root, follow_links: bool = False, **options) -> dict[str, str | None]:
    """Path -> error class of every row, as packing finds them before it opens an image."""
    items = group(read_folder(root, False, follow_links, **options), pairs=False)
    measure(items, Boundary(root, follow_links))
    return {row.source: row.fault and row.fault[0] for item in items for row in item.rows}


WHOLE = {"3.jpg": None, "a/1.jpg": None, "b/c/2.jpg": None}


@pytest.mark.parametrize(
    ("place", "target"),
    [("a/up", ".."), ("b/c/up", "../.."), ("self", "."), ("a/self", "."), ("a/beside", "../b"), ("early", "b/c")],
)
@pytest.mark.parametrize("follow_links", [False, True])
def test_links_within_the_folder_bring_nothing_twice(photos, place, target, follow_links):
    (photos / place).symlink_to(target)
    (photos / "absolute").symlink_to(photos)
    assert account(photos, follow_links) == WHOLE


def test_the_links_of_a_folder_do_not_change_the_order(photos):
    before = list(account(photos))
    (photos / "0").symlink_to("b")
    assert list(account(photos)) == before == ["3.jpg", "a/1.jpg", "b/c/2.jpg"]


def test_links_into_hidden_folders_are_followed_once(photos):
    photo(photos, ".store/x/9.jpg")
    (photos / "x").symlink_to(".store/x")
    (photos / "y").symlink_to(".store/x")
    assert account(photos) == {**WHOLE, "x/9.jpg": None}


def test_a_linked_folder_outside_is_refused_and_listed(photos, tmp_path):
    photo(tmp_path, "out/deep/4.jpg")
    (photos / "out").symlink_to(tmp_path / "out")
    (photos / "again").symlink_to(tmp_path / "out")
    assert account(photos) == {**WHOLE, "out": "outside_input", "again": "outside_input"}
    assert account(photos, follow_links=True) == {**WHOLE, "again/deep/4.jpg": None}


def test_links_that_form_a_ring_outside_end(photos, tmp_path):
    photo(tmp_path, "out/4.jpg")
    (tmp_path / "out/back").symlink_to(photos)
    (tmp_path / "out/ring").symlink_to(tmp_path / "out")
    (tmp_path / "out/up").symlink_to("..")
    (photos / "out").symlink_to(tmp_path / "out")
    assert account(photos, follow_links=True) == {**WHOLE, "out/4.jpg": None}


def test_texts_and_images_outside_are_refused(photos, tmp_path):
    (tmp_path / "secret").write_text("a secret")
    (photos / "a/1.txt").unlink()
    (photos / "a/1.txt").symlink_to(tmp_path / "secret")
    photo(tmp_path, "out/5.jpg")
    photo(photos, "5.jpg")
    (photos / "5.jpg").unlink()
    (photos / "5.jpg").symlink_to(tmp_path / "out/5.jpg")
    (photos / "6.jpg").symlink_to("3.jpg")
    (photos / "6.txt").symlink_to("3.txt")
    found = {**WHOLE, "a/1.jpg": "outside_input", "5.jpg": "outside_input", "6.jpg": None}
    assert account(photos) == found
    rows = read_folder(photos, labels=False).rows
    assert not any("secret" in caption for row in rows for caption in row.captions)
    assert account(photos, follow_links=True) == dict.fromkeys(found)


def test_links_that_lead_nowhere_are_rows_of_their_own(photos, tmp_path, capsys):
    from data_tools.__main__ import main

    (photos / "loop.jpg").symlink_to("loop.jpg")
    (photos / "gone.jpg").symlink_to("nowhere.jpg")
    (photos / "folder").symlink_to("folder")
    for name in ("loop", "gone"):
        (photos / f"{name}.txt").write_text("a caption")
    assert main(["pack", str(photos), str(tmp_path / "shards"), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "packed 3 samples from 3 of 5 rows" in said
    assert "missing_file 1, unreadable_file 1" in said


def test_lines_of_a_text_are_one_caption_or_several(photos):
    (photos / "3.txt").write_bytes("\ufeff one \r\n\r\ntwo\rthree\n".encode())
    for lines, expected in ((False, ["one two three"]), (True, ["one", "two", "three"])):
        rows = {row.image: row.captions for row in read_folder(photos, labels=False, lines=lines).rows}
        assert rows["3.jpg"] == expected


def test_a_folder_that_cannot_be_read_is_an_error(photos, monkeypatch):
    """Not one that is left out without a word, as `os.walk` does."""
    listing = os.scandir

    def refusing(folder):
        if str(folder).endswith("/a"):
            raise PermissionError(13, "Permission denied", str(folder))
        return listing(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match="cannot read the folder"):
        read_folder(photos, labels=False)
