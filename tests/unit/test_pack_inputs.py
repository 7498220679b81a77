"""What rows an input has: folders, class folders, tables; grouping, filters, labels, and faults of single rows."""

from __future__ import annotations

import json
import os

import pyarrow
import pyarrow.parquet as pq
import pytest

from data_tools.errors import UsageError, UserError
from data_tools.pack.delimited import Dialect
from data_tools.pack.folder import read_folder
from data_tools.pack.image import Limits
from data_tools.pack.inside import Boundary
from data_tools.pack.plan import Settings, make_plan
from data_tools.pack.rows import group, measure
from data_tools.pack.table import Columns, read_table
from packing import jpeg, write_jsonl

LIMITS = Limits(pixels=10_000, file_bytes=10_000)


def write(folder, files: dict[str, bytes | str]):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def faults(items) -> dict[str, str | None]:
    return {row.source: row.fault and row.fault[0] for item in items for row in item.rows}


def test_folder_takes_texts_beside_images(tmp_path):
    source = read_folder(
        write(
            tmp_path,
            {
                "a.jpg": b"",
                "a.txt": "\ufeff a text \n",
                "b/c.d.PNG": b"",
                "b/c.d.json": json.dumps({"captions": ["one", " ", "two"], "stars": 5}),
                "both.webp": b"",
                "both.txt": "from txt",
                "both.json": json.dumps({"caption": "from json"}),
                "alone.jpg": b"",
                "bad.jpg": b"",
                "bad.json": "[",
                "list.jpg": b"",
                "list.json": json.dumps({"caption": 5}),
                "README.md": "not a row",
                "orphan.txt": "no image",
                ".hidden.jpg": b"",
            },
        ),
        labels=False,
    )
    items = group(source, pairs=False)
    assert source.ignored == {".md": 1, ".txt": 1}
    assert {item.id: item.rows[0].captions for item in items if not item.rows[0].fault} == {
        "a.jpg": ["a text"],
        "b/c.d.PNG": ["one", "two"],
        "both.webp": ["from json"],
    }
    assert items[-1].id == "b/c.d.PNG"
    assert items[-1].rows[0].metadata == {"stars": 5}
    assert faults(items)["alone.jpg"] == "empty_caption"
    assert faults(items)["bad.jpg"] == faults(items)["list.jpg"] == "bad_row"


def test_class_folders(tmp_path):
    files = {
        "dog/1.jpg": b"",
        "cat/deep/2.jpg": b"",
        "cat/3.jpg": b"",
        "cat/3.txt": "a cat",
        "root.jpg": b"",
        "zoo/a.md": b"",
    }
    source = read_folder(write(tmp_path, files), labels=True)
    assert source.labels == ("cat", "dog")
    items = group(source, pairs=False)
    assert {item.id: item.rows[0].label for item in items if not item.rows[0].fault} == {
        "dog/1.jpg": "dog",
        "cat/deep/2.jpg": "cat",
        "cat/3.jpg": "cat",
    }
    assert faults(items)["root.jpg"] == "empty_label"


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no images in .*got 1 other files"):
        read_folder(write(tmp_path, {"a.txt": "text"}), labels=False)


ROWS = [
    {"image": "a.jpg", "caption": "first, of a", "split": "train", "n": "1"},
    {"image": "a.jpg", "caption": "second\nof a", "split": "train", "n": "2"},
    {"image": "b.jpg", "caption": "  ", "split": "train", "n": "3"},
    {"image": "b.jpg", "caption": "only of b", "split": "train", "n": "4"},
    {"image": "", "caption": "of nothing", "split": "train", "n": "5"},
    {"image": "c.jpg", "caption": "of c", "split": "val", "n": "6"},
]


def as_csv(path, separator=","):
    lines = [separator.join(ROWS[0]), *(separator.join(f'"{v}"' for v in row.values()) for row in ROWS)]
    path.write_text("\n".join(lines) + "\n", "utf-8-sig")
    return path


def tables(folder):
    pq.write_table(pyarrow.Table.from_pylist(ROWS), folder / "t.parquet")
    return [
        as_csv(folder / "t.csv"),
        as_csv(folder / "t.tsv", "\t"),
        write_jsonl(folder / "t.jsonl", ROWS),
        folder / "t.parquet",
    ]


def test_tables_of_every_format_mean_the_same(tmp_path):
    for path in tables(tmp_path):
        source = read_table(path, Columns(where=(("split", "train"),)), None, Dialect(quoted=True))
        items = group(source, pairs=False)
        packed = {item.id: [c for row in item.rows if not row.fault for c in row.captions] for item in items}
        assert packed.pop(items[-1].id) == []
        assert packed == {"a.jpg": ["first, of a", "second\nof a"], "b.jpg": ["only of b"]}
        assert items[0].rows[1].metadata == {"split": "train", "n": "2"}
        assert sorted(filter(None, faults(items).values())) == ["empty_caption", "missing_file"]
        assert len(source.rows) == 5


def test_sources_name_file_and_line(tmp_path):
    csv = read_table(as_csv(tmp_path / "t.csv"), Columns(), None)
    assert [row.source for row in csv.rows] == ["t.csv:2", "t.csv:3", "t.csv:5", "t.csv:6", "t.csv:7", "t.csv:8"]


def test_pairs_make_one_sample_per_caption(tmp_path):
    rows = [{"image": "a.jpg", "captions": ["one", "two"]}, {"image": "b.jpg", "captions": []},
            {"image": "a.jpg", "captions": ["three"]}]  # fmt: skip
    items = group(read_table(write_jsonl(tmp_path / "t.jsonl", rows), Columns(), None), pairs=True)
    assert [(item.id, item.rows[0].captions) for item in items] == [
        ("a.jpg#0", ["one"]),
        ("a.jpg#1", ["two"]),
        ("b.jpg#0", []),
        ("a.jpg#2", ["three"]),
    ]
    assert len({item.key for item in items}) == 4
    assert items[2].rows[0].fault[0] == "empty_caption"


def test_labels_come_from_all_rows_and_numbers_keep_their_order(tmp_path):
    rows = [{"image": f"{n}.jpg", "label": n, "split": "train" if n < 3 else "test"} for n in (10, 9, 2, 1)]
    source = read_table(
        write_jsonl(tmp_path / "t.jsonl", rows), Columns(label="label", where=(("split", "test"),)), None
    )
    assert source.labels == ("1", "2", "9", "10")
    assert [row.label for row in source.rows] == ["10", "9"]
    assert not source.captioned
    rows = [{"image": "a.jpg", "label": "dog"}, {"image": "a.jpg", "label": "cat"}, {"image": "b.jpg", "label": ""}]
    items = group(read_table(write_jsonl(tmp_path / "u.jsonl", rows), Columns(label="label"), None), pairs=False)
    assert faults(items) == {"u.jsonl:1": None, "u.jsonl:2": "conflicting_label", "u.jsonl:3": "empty_label"}


def test_malformed_rows_are_accounted_for(tmp_path):
    (tmp_path / "t.csv").write_text('image,caption\na.jpg,fine\nb.jpg\nc.jpg,x,y\n\nd.jpg,"quoted, fine"\n')
    items = group(read_table(tmp_path / "t.csv", Columns(), None), pairs=False)
    assert faults(items) == {"t.csv:2": None, "t.csv:3": "bad_row", "t.csv:4": "bad_row", "t.csv:6": None}
    (tmp_path / "t.jsonl").write_text(
        '{"image": "a.jpg", "caption": "x"}\n{"image": \n[1]\n{"image": "b.jpg", "caption": 7}\n'
        + "[" * 100_000
        + '\n{"caption": "without an image"}\n'
    )
    items = group(read_table(tmp_path / "t.jsonl", Columns(), None), pairs=False)
    assert list(faults(items).values()) == [None, *["bad_row"] * 4, "missing_file"]
    half = '{"image": "a.jpg", "caption": "half a pair \\ud83d"}\n'
    (tmp_path / "s.jsonl").write_text(half)
    assert group(read_table(tmp_path / "s.jsonl", Columns(), None), pairs=False)[0].rows[0].captions == [
        "half a pair ?"
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns(image="img"), "no column 'img'.*got image, caption, split, n.*--image-column"),
        (Columns(caption="title"), "no column 'title'.*--caption-column"),
        (Columns(label="class"), "no column 'class'.*--label-column"),
        (Columns(where=(("part", "x"),)), "no column 'part'.*--where"),
    ],
)
def test_missing_columns_are_usage_errors(tmp_path, columns, message):
    with pytest.raises(UsageError, match=message):
        read_table(as_csv(tmp_path / "t.csv"), columns, None)


def test_tables_without_rows_or_captions_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no rows in .*got 6 rows, 0 of them with split=test"):
        read_table(as_csv(tmp_path / "t.csv"), Columns(where=(("split", "test"),)), None)
    (tmp_path / "e.csv").write_text("image,caption\n")
    with pytest.raises(UserError, match="an empty table"):
        read_table(tmp_path / "e.csv", Columns(), None)
    (tmp_path / "n.csv").write_text("image,text\na.jpg,words\n")
    with pytest.raises(UsageError, match=r"no column 'caption'.*name it with --caption-column"):
        read_table(tmp_path / "n.csv", Columns(), None)
    (tmp_path / "l.csv").write_bytes("image,caption\na.jpg,caf\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match="expected UTF-8"):
        read_table(tmp_path / "l.csv", Columns(), None)
    (tmp_path / "p.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(UserError, match="cannot read"):
        read_table(tmp_path / "p.parquet", Columns(), None)


def test_image_root_is_the_tables_folder_or_its_images(tmp_path):
    path = as_csv(write(tmp_path, {"images/a.jpg": b""}) / "t.csv")
    assert read_table(path, Columns(), None).root == tmp_path / "images"
    write(tmp_path, {"a.jpg": b"", "b.jpg": b""})
    assert read_table(path, Columns(), None).root == tmp_path
    assert read_table(path, Columns(), tmp_path / "other").root == tmp_path / "other"


def test_ids_do_not_depend_on_how_a_path_is_written(tmp_path):
    rows = [{"image": name, "caption": "x"} for name in ("./a.jpg", "b/../a.jpg", str(tmp_path / "a.jpg"))]
    items = group(read_table(write_jsonl(tmp_path / "t.jsonl", rows), Columns(), None), pairs=False)
    assert [item.id for item in items] == ["a.jpg"]


def plan_of(tmp_path, rows, **changes):
    source = read_table(write_jsonl(tmp_path / "t.jsonl", rows), Columns(), None)
    items = group(source, pairs=False)
    measure(items, Boundary(source.root))
    settings = {"name": "s", "samples_per_shard": 4, "shard_bytes": None, "pairs": False, "limits": LIMITS}
    return make_plan(source, items, Settings(**{**settings, **changes}))


def test_plan_sorts_by_key_whatever_the_order_of_rows(tmp_path):
    write(tmp_path, {f"{n}.jpg": jpeg(n) for n in range(10)})
    rows = [{"image": f"{n}.jpg", "caption": str(n)} for n in range(10)]
    plan, other = plan_of(tmp_path, rows), plan_of(tmp_path, rows[::-1])
    keys = [item.key for shard in plan.shards for item in shard]
    assert keys == sorted(keys)
    assert [len(shard) for shard in plan.shards] == [4, 4, 2]
    assert keys != [item.key for item in group(read_table(tmp_path / "t.jsonl", Columns(), None), False)]
    assert keys == [item.key for shard in other.shards for item in shard]
    assert plan.digest == plan_of(tmp_path, rows).digest


def test_digest_follows_settings_and_content(tmp_path):
    write(tmp_path, {f"{n}.jpg": jpeg(n) for n in range(10)})
    rows = [{"image": f"{n}.jpg", "caption": str(n)} for n in range(10)]
    digests = [plan_of(tmp_path, rows).digest]
    shrunk = Limits(10_000, 10_000, resize=9)
    changes = ({"name": "t"}, {"samples_per_shard": 5}, {"shard_bytes": 9000}, {"limits": shrunk})
    digests += [plan_of(tmp_path, rows, **change).digest for change in changes]
    digests.append(plan_of(tmp_path, [*rows[:-1], {"image": "9.jpg", "caption": "changed"}]).digest)
    digests.append(plan_of(tmp_path, rows[:-1]).digest)
    os.truncate(tmp_path / "3.jpg", 100)
    digests.append(plan_of(tmp_path, rows).digest)
    assert len(set(digests)) == len(digests)


def test_shards_are_cut_by_bytes_too(tmp_path):
    write(tmp_path, {f"{n}.jpg": bytes(5000) for n in range(10)})
    rows = [{"image": f"{n}.jpg", "caption": str(n)} for n in range(10)]
    sizes = [len(shard) for shard in plan_of(tmp_path, rows, shard_bytes=17_000).shards]
    assert sizes == [2] * 5
