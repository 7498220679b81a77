"""How a pack ends: nothing packed leaves no corpus, many skipped rows say why, `rows` shows the account, full disks."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import resource
import subprocess
import sys

import pyarrow
import pyarrow.parquet as pq
import pytest

from data_tools.__main__ import main
from data_tools.corpus import open_corpus
from data_tools.errors import UserError
from data_tools.format import commit
from packing import ROOT, contents, jpeg, photo_folder, write_jsonl


@pytest.fixture
def run(capsys):
    """Run a verb in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([*map(str, arguments)])
        return code, *capsys.readouterr()

    return call


def table(folder, good: int, bad: int, gone: int = 0):
    """A table of `good` photos, `bad` files that are none, and `gone` ones."""
    folder.mkdir(exist_ok=True)
    for number in range(good + bad):
        (folder / f"{number}.jpg").write_bytes(jpeg(number) if number < good else b"no image")
    rows = [{"image": f"{number}.jpg", "caption": f"caption {number}"} for number in range(good + bad + gone)]
    return write_jsonl(folder / "t.jsonl", rows)


def test_nothing_packed_leaves_no_corpus_and_stands_in_nobodys_way(run, tmp_path):
    out = tmp_path / "out"
    code, said, error = run("pack", table(tmp_path / "in", 0, 7, 2), out, "--samples-per-shard", 4, "--workers", 1)
    assert code == 1
    assert "nothing was packed; got 9 rows, all skipped: missing_file 2, undecodable 7" in error
    assert error.count("\n") == 1
    assert said.count("no known") == 3
    assert "packed 0" not in said
    assert {path.suffix for path in out.iterdir()} == {".parquet"}
    with pytest.raises(UserError):
        open_corpus(out)
    assert run("verify", out)[0] == 1
    code, said, _ = run("rows", out, "--status", "skipped")
    assert (code, said.count("undecodable"), said.count("missing_file")) == (0, 7, 2)
    other = photo_folder(tmp_path / "photos", 3)
    assert run("pack", other, out, "--workers", 1)[0] == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "manifest.json",
        *(f"shard-000000.{s}" for s in ("idx", "parquet", "tar")),
    ]
    assert run("verify", out)[0] == 0


def test_mended_files_pack_into_the_same_folder(run, tmp_path):
    source = table(tmp_path / "in", 0, 3)
    assert run("pack", source, tmp_path / "out", "--workers", 1)[0] == 1
    table(tmp_path / "in", 3, 0)
    assert run("pack", source, tmp_path / "out", "--workers", 1)[0] == 0
    assert run("pack", source, tmp_path / "fresh", "--workers", 1)[0] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_parquet_files_of_others_stay(run, tmp_path):
    (tmp_path / "out").mkdir()
    pq.write_table(pyarrow.table({"a": [1]}), tmp_path / "out" / "mine.parquet")
    assert run("pack", table(tmp_path / "in", 0, 3), tmp_path / "out", "--workers", 1)[0] == 1
    assert run("pack", photo_folder(tmp_path / "photos", 3), tmp_path / "out", "--workers", 1)[0] == 0
    assert (tmp_path / "out" / "mine.parquet").exists()


@pytest.mark.parametrize(("good", "bad", "share"), [(95, 5, None), (94, 6, "6.0 %"), (1, 9, "90 %")])
def test_many_skipped_rows_end_with_reasons_examples_and_the_list(run, tmp_path, good, bad, share):
    out, rows = tmp_path / "out", table(tmp_path / "in", good, bad - 1, 1)
    for _ in range(2):  # the second finds its shards there
        code, said, _ = run("pack", rows, out, "--workers", 1, "--samples-per-shard", 30)
        assert code == 0
        assert f"skipped {bad} rows: missing_file 1, undecodable {bad - 1}\n" in said
        tail = said.split("manifest.json\n")[1].splitlines()
        if not share:
            assert tail == []
            continue
        assert tail[:2] == [f"{share} of the rows were skipped:", f"  undecodable {bad - 1}, such as"]
        assert len([line for line in tail if "no known" in line]) == 3
        assert tail[-2] == f"    t.jsonl:{good + bad}: no file {good + bad - 1}.jpg"
        assert tail[-1] == f"all of them: python -m data_tools rows {out} --status skipped"


def test_rows_shows_what_went_in(run, tmp_path):
    out = tmp_path / "out"
    run("pack", table(tmp_path / "in", 60, 4, 2), out, "--workers", 1, "--samples-per-shard", 20)
    _, said, _ = run("rows", out)
    assert said.splitlines()[0].split() == ["source", "status", "error_class", "error", "captions"]
    assert said.splitlines()[-1] == "50 of 66 rows; --limit N shows more, --output all"
    _, said, _ = run("rows", out, "--limit", 100)
    assert {line.split()[0] for line in said.splitlines()[1:-1]} == {f"t.jsonl:{n}" for n in range(1, 67)}
    _, said, _ = run("rows", out, "--where", "error_class=missing_file", "--columns", "source,error")
    assert sorted(said.splitlines()[1:-1]) == ["t.jsonl:65  no file 64.jpg", "t.jsonl:66  no file 65.jpg"]
    assert run("rows", out, "--status", "packed", "--where", "error_class=missing_file")[1] == "0 rows\n"
    for name in ("all.csv", "all.jsonl"):
        assert run("rows", out, "--output", tmp_path / name)[1] == f"wrote 66 rows to {tmp_path / name}\n"
    written = [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert [json.loads(line) for line in (tmp_path / "all.jsonl").open()] == written
    read = list(csv.DictReader(io.StringIO((tmp_path / "all.csv").read_text(), newline="")))
    assert [row["source"] for row in read] == [row["source"] for row in written]
    assert [row["captions"] for row in read] == [json.dumps(row["captions"]) for row in written]


def test_rows_refuses_what_it_cannot_show(run, tmp_path):
    photos = photo_folder(tmp_path / "photos", 2)
    run("pack", photos, tmp_path / "out", "--workers", 1)
    out = tmp_path / "out"
    for arguments, word in (
        ([photos], "no account of rows"),
        ([tmp_path / "none"], "no such folder"),
        ([out, "--where", "colour=red"], "no column 'colour'"),
        ([out, "--columns", "x"], "no column 'x'"),
        ([out, "--where", "source"], "bad --where"),
        ([out, "--limit", "0"], "not positive"),
        ([out, "--output", tmp_path / "a.xlsx"], "another suffix"),
        ([out, "--output", tmp_path / "none/a.csv"], "no folder"),
    ):
        code, _, error = run("rows", *arguments)
        assert code in (1, 2)
        assert word in error
        assert error.count("\n") == 1
    account = tmp_path / "out" / "shard-000000.parquet"
    whole = pq.read_table(account)
    for changed in (whole.drop_columns(["status"]), whole.set_column(3, "status", pyarrow.array([1, 2]))):
        pq.write_table(changed, account)
        code, said, error = run("rows", tmp_path / "out")
        assert (code, said, error.count("\n")) == (1, "", 1)
        assert "account" in error
    account.write_bytes(account.read_bytes()[:-9])
    assert "cannot read the account" in run("rows", tmp_path / "out")[2]


def test_a_row_that_is_hostile_stays_on_its_line(run, tmp_path):
    rows = [
        {"image": f"{name}.jpg", "caption": f"{name}\x1b[2J\nnext" + "x" * 5000} for name in ("a\x1b]0;b\x07", "c\nd")
    ]
    run("pack", write_jsonl(tmp_path / "t.jsonl", rows), tmp_path / "out", "--workers", 1)
    said = run("rows", tmp_path / "out")[1]
    assert said.count("\n") == 4
    assert not set(said) & {"\x1b", "\x07"}
    assert max(map(len, said.splitlines())) < 400


def test_a_second_pack_says_which_settings_differ(run, tmp_path):
    photos = photo_folder(tmp_path / "photos", 3)
    run("pack", photos, tmp_path / "out", "--workers", 1)
    error = run("pack", photos, tmp_path / "out", "--samples-per-shard", 5)[2]
    assert "got samples_per_shard 10000; expected samples_per_shard 5; remedy: choose another output folder" in error
    (photos / "photo.1.txt").write_text("another caption")
    assert "got another content; expected the same rows and files" in run("pack", photos, tmp_path / "out")[2]


@pytest.mark.parametrize("claim", [b"", b"[]", b"{", b"[" * 99_999, b'{"config_digest": 1, "config": 5}', b"\xff"])
def test_a_damaged_claim_is_one_line(run, tmp_path, claim):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pack.json").write_bytes(claim)
    code, _, error = run("pack", photo_folder(tmp_path / "photos", 2), tmp_path / "out", "--workers", 1)
    assert (code, error.count("\n")) == (1, 1)
    assert "pack.json" in error


# ---- disks that take no more ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EROFS"])
@pytest.mark.parametrize("point", [1, 3, 5, 7])
def test_a_full_disk_is_named_with_file_and_remedy(run, tmp_path, monkeypatch, code, point):
    photos = photo_folder(tmp_path / "photos", 6)
    calls = []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == point:
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    with monkeypatch.context() as patch:
        patch.setattr(commit.os, "fsync", fsync)
        result, _, error = run("pack", photos, tmp_path / "out", "--workers", 1)
    assert result == 1
    assert error.count("\n") == 1
    name = ("pack.json", "shard-000000.tar", "shard-000000.idx", "shard-000000.parquet")[point // 2]
    assert error.startswith(f"error: cannot write {tmp_path / 'out' / name}; got ")
    assert "remedy: " in error
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix == ".tmp"]
    assert run("pack", photos, tmp_path / "out", "--workers", 1)[0] == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_the_kernel_refusing_a_write_is_reported_from_any_process(tmp_path, workers):
    """A limit on file sizes is the fault of this kind that needs no disk of its own."""
    photos = photo_folder(tmp_path / "photos", 40)
    command = [sys.executable, "-m", "data_tools", "pack", photos, tmp_path / "out", "--samples-per-shard", "20"]
    done = subprocess.run(
        [*command, "--workers", str(workers)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"error: cannot write {tmp_path}/out/shard-00000" in done.stderr
    assert "a file larger than allowed; remedy: raise the limit" in done.stderr


def test_other_refusals_of_the_system_name_the_file_too(run, tmp_path, monkeypatch):
    photos = photo_folder(tmp_path / "photos", 2)
    (tmp_path / "file").write_text("")
    assert run("pack", photos, tmp_path / "file")[2] == f"error: cannot use {tmp_path}/file; got File exists\n"
    for code, word in (("EACCES", "permission denied; remedy: "), ("EIO", "got refused")):
        fault = OSError(getattr(errno, code), "refused", str(tmp_path / "out"))
        with monkeypatch.context() as patch:
            patch.setattr("pathlib.Path.mkdir", lambda *_, fault=fault, **__: (_ for _ in ()).throw(fault))
            error = run("pack", photos, tmp_path / "out")[2]
        assert error.startswith(f"error: cannot use {tmp_path}/out; got ")
        assert word in error
