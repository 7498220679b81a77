"""Opening corpora: what a source may be, what the digest depends on, and every fault as one clear line."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from data_tools.corpus import open_corpus
from data_tools.corpus import reader as readers
from data_tools.errors import UserError
from data_tools.format.index import index_path, open_index
from data_tools.format.manifest import Manifest, ShardRecord, read_manifest, write_manifest
from data_tools.format.tar import TarDamageError
from data_tools.format.writer import write_shard


def shards(folder, count=3, classes=("cat", "dog"), manifest=True):
    folder.mkdir(exist_ok=True)
    records = []
    for number in range(count):
        samples = [(f"{number}-{k}", {"txt": f"{number} {k}".encode()}) for k in range(number + 1)]
        index = write_shard(folder / f"s-{number}.tar", samples)
        records.append(ShardRecord(f"s-{number}", index.num_samples, index.tar_bytes, index.tar_hash.hex()))
    if manifest:
        write_manifest(Manifest({}, "digest", {}, tuple(records), classes, {}), folder)
    return folder


def test_a_position_is_a_place_in_a_shard(tmp_path):
    """As webdataset reads the same tars, one after the other."""
    import webdataset as wds

    folder = shards(tmp_path / "a", count=4)
    corpus = open_corpus(folder)
    keys = [sample["__key__"] for sample in wds.WebDataset(f"{folder}/s-{{0..3}}.tar", shardshuffle=False)]
    with readers.ShardReader(corpus) as reader:
        assert [reader.read(*corpus.locate(position)).key for position in range(corpus.num_samples)] == keys
    assert len(keys) == 10
    for outside in (-1, 10):
        with pytest.raises(IndexError):
            corpus.locate(outside)


def test_folder_manifest_pattern_and_list_name_the_same_corpus(tmp_path):
    folder = shards(tmp_path / "a")
    sources = [folder, folder / "manifest.json", f"{folder}/s-{{0..2}}.tar", [f"{folder}/s-{n}.tar" for n in range(3)]]
    corpora = [open_corpus(source) for source in sources]
    assert {corpus.paths for corpus in corpora} == {tuple(str(folder / f"s-{n}.tar") for n in range(3))}
    assert {tuple(corpus.counts) for corpus in corpora} == {(1, 2, 3)}
    assert len({corpus.digest for corpus in corpora}) == 1
    assert [corpus.classes for corpus in corpora] == [("cat", "dog"), ("cat", "dog"), (), ()]
    assert corpora[0].num_samples == 6
    assert corpora[0].counts.dtype == "int64"


def test_digest_names_content_and_order_not_the_place(tmp_path):
    one = shards(tmp_path / "one")
    moved = shutil.copytree(one, tmp_path / "moved")
    assert open_corpus(one).digest == open_corpus(moved).digest
    assert open_corpus(f"{one}/s-{{0,1}}.tar").digest != open_corpus(f"{one}/s-{{1,0}}.tar").digest
    write_shard(moved / "s-0.tar", [("0-0", {"txt": b"0 x"})])
    os.unlink(moved / "manifest.json")
    assert open_corpus(f"{one}/s-{{0..2}}.tar").digest != open_corpus(f"{moved}/s-{{0..2}}.tar").digest


def test_packed_folder_opens_without_touching_tars_or_indexes(tmp_path, monkeypatch):
    folder = shards(tmp_path / "a")
    monkeypatch.setattr("data_tools.corpus.corpus.index_header", lambda path: pytest.fail(f"opened {path}"))
    monkeypatch.setattr("data_tools.corpus.corpus.build_index", lambda path: pytest.fail(f"read {path}"))
    assert open_corpus(folder).num_samples == 6


def test_foreign_tar_is_indexed_once(tmp_path, monkeypatch):
    folder = shards(tmp_path / "a", manifest=False)
    index = index_path(folder / "s-1.tar")
    before = index.read_bytes()
    index.unlink()
    assert open_corpus(folder / "s-1.tar").num_samples == 2
    assert index.read_bytes() == before
    monkeypatch.setattr("data_tools.corpus.corpus.build_index", lambda path: pytest.fail("indexed again"))
    assert open_corpus(folder / "s-1.tar").num_samples == 2


def test_shards_without_samples_are_left_out(tmp_path):
    folder = shards(tmp_path / "a")
    write_shard(folder / "s-1.tar", [])
    manifest = read_manifest(folder / "manifest.json")
    size = os.path.getsize(folder / "s-1.tar")
    records = [*manifest.shards[:1], ShardRecord("s-1", 0, size, "00" * 16), *manifest.shards[2:]]
    write_manifest(Manifest({}, "digest", {}, tuple(records), (), {}), folder)
    corpus = open_corpus(folder)
    assert tuple(corpus.counts) == (1, 3)
    assert [os.path.basename(path) for path in corpus.paths] == ["s-0.tar", "s-2.tar"]
    with pytest.raises(UserError, match=r"no samples in .*s-1.tar"):
        open_corpus(folder / "s-1.tar")


def test_unwritable_folder_is_explained(tmp_path, monkeypatch):
    folder = shards(tmp_path / "a", manifest=False)
    index_path(folder / "s-0.tar").unlink()

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("data_tools.corpus.corpus.write_index", refuse)
    with pytest.raises(UserError, match=r"cannot write the index.*Permission denied.*data_tools index"):
        open_corpus(folder / "s-0.tar")


def damage_missing(folder):
    os.unlink(folder / "s-1.tar")


def damage_grown(folder):
    os.truncate(folder / "s-1.tar", 1 << 20)


def damage_json(folder):
    (folder / "manifest.json").write_text('{"format": "dualstr')


def damage_version(folder):
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**content, "version": 99}))


def damage_field(folder):
    content = json.loads((folder / "manifest.json").read_text())
    del content["shards"][0]["samples"]
    (folder / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, r"missing shard .*s-1.tar"),
        (damage_grown, r"size of shard .*s-1.tar changed; got 1048576 bytes"),
        (damage_json, "unreadable manifest"),
        (damage_version, "not a shard manifest"),
        (damage_field, "lacks or misspells a field"),
    ],
)
def test_damaged_folder_is_refused(tmp_path, damage, message):
    folder = shards(tmp_path / "a")
    damage(folder)
    with pytest.raises(UserError, match=message):
        open_corpus(folder)


@pytest.mark.parametrize("kept", [0, 514, -1])
def test_a_cut_shard_is_named_and_gives_what_it_still_holds(tmp_path, kept):
    folder = shards(tmp_path / "a")
    tar = folder / "s-1.tar"
    whole = open_corpus(folder)
    samples = [readers.ShardReader(whole).read(1, index) for index in range(whole.counts[1])]
    edge = int(open_index(index_path(tar)).offsets[-2])  # where the last sample begins
    os.truncate(tar, kept if kept >= 0 else edge)
    corpus = open_corpus(folder)
    assert corpus.damaged == (f"{tar} is cut",)
    assert corpus.digest == whole.digest
    reader = readers.ShardReader(corpus)
    for index, sample in enumerate(samples):
        if kept < 0 and index < len(samples) - 1:
            assert reader.read(1, index) == sample
        else:
            with pytest.raises(TarDamageError, match="ends inside a sample"):
                reader.read(1, index)


def test_sources_that_are_no_shards_are_refused(tmp_path):
    folder = shards(tmp_path / "a", manifest=False)
    other = shards(tmp_path / "b", classes=("x",), count=4)
    shards(tmp_path / "c")
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path, "has several folders of shards; got a/, b/, c/"),
        (tmp_path / "empty", "no manifest.json and no tars in"),
        ([], "the corpus is empty"),
        (folder / "s-9.tar", r"missing shard .*s-9.tar"),
        (f"{folder}/s-{{0..9}}.tar", r"missing shard .*s-3.tar"),
        (f"{folder}/s-{{0..9.tar", "bad brace pattern"),
        ("nowhere://bucket/s-0.tar", "cannot read nowhere://bucket/s-0.idx"),
        ([tmp_path / "c", other], "class names of .* differ"),
    ):
        with pytest.raises(UserError, match=message):
            open_corpus(source)


def test_stale_and_damaged_indexes_are_refused(tmp_path):
    folder = shards(tmp_path / "a", manifest=False)
    index = index_path(folder / "s-2.tar")
    sound = index.read_bytes()
    for content, message in (
        (b"", "not an index"),
        (b"NOTINDEX" + sound[8:], "not an index"),
        (sound[:8] + b"\x09" + sound[9:], "got version 9"),
        (sound[:-3], "index cut or altered"),
    ):
        index.write_bytes(content)
        with pytest.raises(UserError, match=message):
            open_corpus(folder / "s-2.tar")
    # The index of another tar of the same size opens; the first sample that is read gives it away.
    index.write_bytes(index_path(folder / "s-1.tar").read_bytes())
    corpus = open_corpus(folder / "s-2.tar")
    with pytest.raises(UserError, match="sample 0 is not the one in the index"):
        readers.ShardReader(corpus).read(0, 0)


def test_reader_refuses_an_index_of_another_tar(tmp_path):
    folder = shards(tmp_path / "a")
    corpus = open_corpus(folder)
    shutil.copy(folder / "s-1.idx", folder / "s-2.idx")
    with pytest.raises(UserError, match=r"shard .*s-2.tar changed; got 2 samples in the index"):
        readers.ShardReader(corpus).read(2, 0)
    os.unlink(folder / "s-2.idx")
    with pytest.raises(UserError, match=r"missing index .*data_tools index .*s-2.tar"):
        readers.ShardReader(corpus).read(2, 0)
