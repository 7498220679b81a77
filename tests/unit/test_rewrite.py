"""Shards made of shards: what is taken, under which keys, in which order, and what the account says."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_tools.__main__ import main
from data_tools.build.accounts import read_accounts
from data_tools.corpus import ShardReader, open_corpus
from data_tools.format.index import index_path, open_index
from data_tools.format.manifest import read_manifest
from data_tools.format.writer import write_shard
from packing import contents, data_tools, jpeg, photo_folder, write_jsonl


@pytest.fixture
def packed(tmp_path):
    """Three shards of four photos, one of two captions; and a row that was skipped."""
    folder = photo_folder(tmp_path / "photos", 12)
    rows = [{"image": f"photo.{number}.jpg", "caption": f"caption {number}", "place": number} for number in range(12)]
    rows += [{"image": "photo.3.jpg", "caption": "another"}, {"image": "missing.jpg", "caption": "nothing"}]
    table = write_jsonl(folder / "captions.jsonl", rows)
    data_tools("pack", table, tmp_path / "packed", "--samples-per-shard", 4)
    return tmp_path / "packed"


@pytest.fixture
def foreign(tmp_path):
    """Two tars whose keys repeat; uids in the json."""
    (tmp_path / "tars").mkdir()
    for tar in range(2):
        samples = {
            f"{number:04d}": {
                "jpg": jpeg(10 * tar + number),
                "txt": f"text {tar} {number}".encode(),
                "json": json.dumps({"uid": f"{tar:016x}{number:016x}", "deep": {"n": number}}).encode(),
            }
            for number in range(5)
        }
        write_shard(tmp_path / f"tars/{tar}.tar", samples.items())
    return tmp_path / "tars"


def run(*words, code=0):
    assert main(list(map(str, words))) == code


def samples(folder):
    """key -> members, of all shards."""
    corpus = open_corpus(folder)
    with ShardReader(corpus) as reader:
        found = [reader.read(*corpus.locate(position)) for position in range(corpus.num_samples)]
    return {sample.key: sample.members for sample in found}


def ids_file(tmp_path, ids):
    (tmp_path / "ids.txt").write_text("".join(f"{one}\n" for one in ids))
    return tmp_path / "ids.txt"


# ---- reshard --------------------------------------------------------------------------------------------------------


def test_all_samples_are_there_as_they_were(packed, tmp_path, capsys):
    run("reshard", packed, tmp_path / "new", "--samples-per-shard", 5, "--workers", 1)
    assert "took 12 of 12 samples, and wrote 12" in capsys.readouterr().out
    assert samples(tmp_path / "new") == samples(packed)
    assert [shard.samples for shard in read_manifest(tmp_path / "new/manifest.json").shards] == [5, 5, 2]
    run("verify", tmp_path / "new", "--decode", 1, "--workers", 1)
    kept = [row for row in read_accounts(packed) if row["status"] == "packed"]
    assert sorted(map(repr, read_accounts(tmp_path / "new"))) == sorted(map(repr, kept))


def test_the_bytes_do_not_depend_on_workers_and_a_second_run_changes_nothing(packed, tmp_path):
    for workers in (1, 2):
        data_tools("reshard", packed, tmp_path / str(workers), "--samples-per-shard", 5, "--workers", workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    whole = contents(tmp_path / "1")
    (tmp_path / "1/shard-000001.parquet").unlink()
    run("reshard", packed, tmp_path / "1", "--samples-per-shard", 5)
    assert contents(tmp_path / "1") == whole


def test_shards_are_cut_by_bytes(packed, tmp_path):
    tars = [path.stat().st_size for path in packed.glob("*.tar")]
    run("reshard", packed, tmp_path / "new", "--shard-bytes", max(tars) // 2)
    shards = read_manifest(tmp_path / "new/manifest.json").shards
    assert len(shards) > 3
    assert sum(shard.samples for shard in shards) == 12
    run("reshard", packed, tmp_path / "tiny", "--shard-bytes", 1)
    assert [shard.samples for shard in read_manifest(tmp_path / "tiny/manifest.json").shards] == [1] * 12


def test_repeated_keys_get_others_and_nothing_is_lost(foreign, tmp_path, capsys):
    run("reshard", foreign, tmp_path / "new", "--workers", 1)
    assert "5 of them have another key" in capsys.readouterr().out
    found = samples(tmp_path / "new")
    assert len(found) == 10
    assert sorted(members["txt"] for members in found.values()) == sorted(
        f"text {tar} {number}".encode() for tar in range(2) for number in range(5)
    )
    assert {key for key in found if len(key) == 4} == {f"{number:04d}" for number in range(5)}
    run("verify", tmp_path / "new")
    rows = list(read_accounts(tmp_path / "new"))
    assert {row["source"] for row in rows} == {f"{tar}.tar:{number:04d}" for tar in range(2) for number in range(5)}
    for row in rows:
        assert found[row["key"]]["txt"].decode() == row["captions"][0]
        assert json.loads(row["metadata"])["uid"].endswith(row["captions"][0][-1])
        assert row["width"] is None
        assert len(row["sha256"]) == 64


def test_a_subset_by_keys_ids_and_fields(packed, foreign, tmp_path, capsys):
    key = next(iter(samples(packed)))
    file = ids_file(tmp_path, [key, "photo.3.jpg", "nobody", "photo.3.jpg"])
    run("reshard", packed, tmp_path / "some", "--ids", file)
    told = capsys.readouterr().out
    assert "2 of 3 ids name 2 samples" in told
    assert "without a sample: nobody" in told
    assert key in samples(tmp_path / "some")
    assert {row["id"] for row in read_accounts(tmp_path / "some")} >= {"photo.3.jpg"}
    run("reshard", packed, tmp_path / "rest", "--without", file)
    assert len(samples(tmp_path / "rest")) == 10
    assert not samples(tmp_path / "rest").keys() & samples(tmp_path / "some").keys()
    run("reshard", foreign, tmp_path / "uids", "--ids", ids_file(tmp_path, [f"{1:016x}{3:016x}"]), "--field", "uid")
    assert [members["txt"] for members in samples(tmp_path / "uids").values()] == [b"text 1 3"]
    run("reshard", foreign, tmp_path / "deep", "--ids", ids_file(tmp_path, [4]), "--field", "deep.n")
    assert len(samples(tmp_path / "deep")) == 2


def test_datacomps_uid_files_are_read(foreign, tmp_path):
    uids = np.array([(0, 2), (1, 4)], np.dtype("u8,u8"))
    np.save(tmp_path / "uids.npy", uids)
    run("reshard", foreign, tmp_path / "new", "--ids", tmp_path / "uids.npy", "--field", "uid")
    assert {members["txt"] for members in samples(tmp_path / "new").values()} == {b"text 0 2", b"text 1 4"}


def test_copies_stay_out_by_their_weight(tmp_path):
    write_shard(tmp_path / "own.tar", [(key, {"jpg": jpeg(1), "txt": key.encode()}) for key in ("a", "bb")])
    run("hash", tmp_path / "own.tar")
    run("dedup", tmp_path / "own.tar")
    run("reshard", tmp_path / "own.tar", tmp_path / "new", "--column", "dedup")
    assert list(samples(tmp_path / "new")) == ["bb"]


def test_what_a_damaged_tar_lost_is_listed(tmp_path, capsys):
    write_shard(tmp_path / "own.tar", [(f"s{number}", {"jpg": jpeg(number)}) for number in range(5)])
    index = open_index(index_path(tmp_path / "own.tar"))
    data = bytearray((tmp_path / "own.tar").read_bytes())
    data[int(index.offsets[2]) : int(index.offsets[3])] = bytes(int(index.offsets[3] - index.offsets[2]))
    (tmp_path / "own.tar").write_bytes(data)
    run("reshard", tmp_path / "own.tar", tmp_path / "new")
    assert "lost with damaged tars: 1" in capsys.readouterr().out
    assert len(samples(tmp_path / "new")) == 4
    (lost,) = [row for row in read_accounts(tmp_path / "new") if row["status"] == "skipped"]
    assert (lost["error_class"], lost["source"]) == ("lost", "own.tar:2")


def test_class_names_stay(tmp_path):
    for number, name in enumerate(("cat", "dog")):
        photo_folder(tmp_path / "photos" / name, 2 + number)
    data_tools("pack", tmp_path / "photos", tmp_path / "packed", "--labels", "folder")
    run("reshard", tmp_path / "packed", tmp_path / "new")
    assert open_corpus(tmp_path / "new").classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--samples-per-shard", 0], "--samples-per-shard is too small"),
        (["--name", "a.b"], "bad --name"),
        (["--field", "uid"], "--field says where ids stand"),
    ],
)
def test_wrong_words(packed, tmp_path, words, said, capsys):
    run("reshard", packed, tmp_path / "new", *words, code=2)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_wrong_files_of_ids(packed, tmp_path, capsys):
    np.save(tmp_path / "floats.npy", np.zeros(3))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "empty.txt").write_text("\n")
    for name, said in [
        ("floats.npy", "holds no ids"),
        ("objects.npy", "cannot read"),
        ("latin.txt", "is no text"),
        ("empty.txt", "no ids in"),
        ("nowhere.txt", "no file of ids"),
    ]:
        run("reshard", packed, tmp_path / "new", "--ids", tmp_path / name, code=1)
        assert said in capsys.readouterr().err
    run("reshard", packed, tmp_path / "new", "--ids", ids_file(tmp_path, ["nobody"]), code=1)
    assert "no sample is chosen" in capsys.readouterr().err


def test_another_input_is_refused(packed, foreign, tmp_path, capsys):
    run("reshard", packed, tmp_path / "new")
    run("reshard", foreign, tmp_path / "new", code=1)
    assert "holds shards of another input or other settings" in capsys.readouterr().err


# ---- delete ---------------------------------------------------------------------------------------------------------


def test_deleted_samples_leave_nothing_but_their_names(packed, tmp_path, capsys):
    data_tools("hash", packed)
    before = samples(packed)
    run("delete", packed, "--ids", ids_file(tmp_path, ["photo.3.jpg", "photo.5.jpg", "nobody"]))
    told = capsys.readouterr().out
    assert "2 of 3 ids name 2 samples" in told
    assert "10 stay" in told
    assert samples(packed).items() <= before.items()
    assert len(samples(packed)) == 10
    rows = [row for row in read_accounts(packed) if row["error_class"] == "deleted"]
    assert sorted(row["id"] for row in rows) == ["photo.3.jpg", "photo.3.jpg", "photo.5.jpg"]
    for row in rows:
        assert (row["captions"], row["sha256"], row["metadata"], row["status"]) == ([], None, "{}", "skipped")
    gone = [data for key, members in before.items() if key not in samples(packed) for data in members.values()]
    files = contents(packed)
    assert gone
    assert not [name for name, data in files.items() for member in gone if len(member) > 20 and member in data]
    run("verify", packed)
    assert "missing_file" in {row["error_class"] for row in read_accounts(packed)}


def test_shards_without_them_stay_as_they_are(packed, tmp_path):
    data_tools("hash", packed)
    before = contents(packed)
    key, shard = next((row["key"], row) for row in read_accounts(packed) if row["status"] == "packed")
    assert shard
    run("delete", packed, "--ids", ids_file(tmp_path, [key]))
    after = contents(packed)
    names = [shard.name for shard in read_manifest(packed / "manifest.json").shards]
    assert sum(name.endswith("-r1") for name in names) == 1
    for name in names:
        if not name.endswith("-r1"):
            files = [file for file in before if file.startswith(f"{name}.")]
            assert {file: after[file] for file in files} == {file: before[file] for file in files}
    old = next(name for name in names if name.endswith("-r1")).removesuffix("-r1")
    assert not [file for file in after if file.startswith(f"{old}.")]


def test_deleting_again_counts_on(packed, tmp_path, capsys):
    run("delete", packed, "--ids", ids_file(tmp_path, ["photo.3.jpg"]))
    ids = [row["id"] for row in read_accounts(packed) if row["key"] and row["status"] == "packed"]
    run("delete", packed, "--ids", ids_file(tmp_path, ids[:1] + ids[-1:]))
    assert len(samples(packed)) == 9
    run("verify", packed)
    capsys.readouterr()
    run("delete", packed, "--ids", ids_file(tmp_path, ["photo.3.jpg"]))
    assert "1 of them were taken out before" in capsys.readouterr().out


def test_files_that_a_killed_deletion_left_go_with_the_same_command(packed, tmp_path, capsys):
    before = contents(packed)
    file = ids_file(tmp_path, ["photo.3.jpg"])
    run("delete", packed, "--ids", file)
    after = contents(packed)
    for name in before.keys() - after.keys():
        (packed / name).write_bytes(before[name])
    run("delete", packed, "--ids", file)
    assert "1 of them were taken out before" in capsys.readouterr().out
    assert contents(packed) == after


def test_a_whole_shard_may_go(packed, tmp_path):
    table = pq.read_table(packed / "shard-000001.parquet")
    run("delete", packed, "--ids", ids_file(tmp_path, table["key"].to_pylist()))
    assert len(samples(packed)) == 8
    run("verify", packed)


def test_packing_again_does_not_bring_them_back(packed, tmp_path, capsys):
    run("delete", packed, "--ids", ids_file(tmp_path, ["photo.3.jpg"]))
    run("pack", tmp_path / "photos/captions.jsonl", packed, "--samples-per-shard", 4, code=1)
    assert "holds shards of another input or other settings" in capsys.readouterr().err


def test_nothing_is_changed_by_a_dry_run_or_by_ids_of_others(packed, foreign, tmp_path, capsys):
    before = contents(packed)
    run("delete", packed, "--ids", ids_file(tmp_path, ["photo.3.jpg"]), "--dry-run")
    assert "would take 1 of 12 samples out of 1 shards" in capsys.readouterr().out
    run("delete", packed, "--ids", ids_file(tmp_path, ["nobody"]), code=1)
    assert "no id names a sample" in capsys.readouterr().err
    assert contents(packed) == before
    run("delete", foreign, "--ids", ids_file(tmp_path, ["0001"]), code=1)
    assert "reshard" in capsys.readouterr().err
