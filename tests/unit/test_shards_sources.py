"""What a user may name as a corpus: the same for indexing, verifying, previews, evaluation and training."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import shutil
import subprocess
import tarfile
import zipfile
from types import SimpleNamespace

import pytest

from data_tools.__main__ import main
from data_tools.corpus import ShardReader, open_corpus
from data_tools.corpus.sources import find
from data_tools.errors import UserError
from data_tools.format.index import index_path
from data_tools.format.manifest import Manifest, ShardRecord, write_manifest
from data_tools.format.survey import survey_tar
from data_tools.format.writer import write_shard
from packing import jpeg


def foreign(path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def pairs(path, keys: range) -> None:
    foreign(path, [member for key in keys for member in ((f"{key:04d}.jpg", jpeg(key)), (f"{key:04d}.txt", b"text"))])


@pytest.fixture
def folder(tmp_path):
    """Twelve plain tars, whose names sort otherwise as text than as numbers."""
    root = tmp_path / "tars"
    root.mkdir()
    for number in range(12):
        pairs(root / f"{number}.tar", range(2 * number, 2 * number + 2))
    return root


def keys(corpus) -> list[str]:
    with ShardReader(corpus) as reader:
        return [reader.read(shard, place).key for shard, count in enumerate(corpus.counts) for place in range(count)]


def test_every_way_to_name_plain_tars_gives_the_same_corpus(folder, monkeypatch):
    expected = [f"{key:04d}" for key in range(24)]
    monkeypatch.chdir(folder.parent)
    ways = [folder, f"{folder}/", "tars", "tars/{0..11}.tar", "tars/*.tar", "tars/*", f"{folder}/[0-9]*.tar", "t?rs"]
    ways += [
        [f"tars/{number}.tar" for number in range(12)],
        ["tars/?.tar", "tars/1?.tar"],
        "tars/{?,??}.tar",
        "./tars/../tars",
    ]
    digests = set()
    for way in ways:
        corpus = open_corpus(way)
        assert keys(corpus) == expected, way
        digests.add(corpus.digest)
    assert len(digests) == 1


def test_names_are_taken_as_they_are_before_they_are_patterns(tmp_path):
    for name in ("a[1].tar", "b{1,2}.tar", "c*.tar"):
        pairs(tmp_path / name, range(2))
        assert open_corpus(tmp_path / name).num_samples == 2


def test_home_is_known(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert open_corpus("~/tars").num_samples == 24


@pytest.mark.parametrize("source", ["tars", "tars/*.tar", "tars/{0..11}.tar"])
def test_every_verb_takes_every_name(folder, source, monkeypatch, capsys):
    monkeypatch.chdir(folder.parent)
    assert main(["verify", source]) == 0
    assert main(["index", source]) == 0
    assert main(["preview", source, str(folder.parent / "p.html")]) == 0
    printed = capsys.readouterr().out
    assert "verified 12 shards, 24 samples" in printed
    assert "indexed 12 of 12 tars, 24 samples\nmembers: 24 jpg, 24 txt\ncaptions (.txt): 24 on one line" in printed


def test_training_and_evaluation_take_a_folder_of_tars(folder):
    from pretrain.config.tree import DataConfig, Source
    from pretrain.stream.sources import train_sources
    from pretrain.tasks import ContrastiveConfig
    from pretrain.tasks.recipe import bench_of

    data = DataConfig(train=[Source(urls=str(folder))])
    towers = SimpleNamespace(rule=None, heads={})
    evaluated = bench_of(ContrastiveConfig(data=data), None, towers, None).corpus(str(folder))
    assert train_sources(data)[0].corpus.num_samples == evaluated.num_samples == 24


def clip_benchmark_root(root, splits: dict[str, int]) -> None:
    """The layout that CLIP_benchmark's `build_wds_dataset` reads: SPLIT/{0..N-1}.tar by SPLIT/nshards.txt, and the
    class names beside the splits."""
    (root / "classnames.txt").parent.mkdir()
    (root / "classnames.txt").write_text("cat\ndog\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    for split, count in splits.items():
        (root / split).mkdir()
        (root / split / "nshards.txt").write_text(f"{count}\n")
        for shard in range(count):
            members = [(f"s{2 * shard + k:07d}.{kind}", jpeg(k) if kind == "webp" else b"1")
                       for k in range(2) for kind in ("webp", "cls")]  # fmt: skip
            foreign(root / split / f"{shard}.tar", members)


def test_clip_benchmark_roots(tmp_path, capsys):
    root = tmp_path / "wds_birds"
    clip_benchmark_root(root, {"train": 11, "test": 3})
    with pytest.raises(UserError, match=r"several folders of shards; got test/, train/; .*such as .*wds_birds/test"):
        open_corpus(root)
    corpus = open_corpus(root / "train")
    assert corpus.classes == ("cat", "dog")
    assert [os.path.basename(path) for path in corpus.paths] == [f"{number}.tar" for number in range(11)]
    assert main(["index", str(root)]) == 0
    assert "indexed 14 of 14 tars, 28 samples" in capsys.readouterr().out
    assert main(["verify", str(root / "test")]) == 0
    shutil.rmtree(root / "train")
    assert open_corpus(root).num_samples == 6
    assert open_corpus(root).classes == ("cat", "dog")
    os.unlink(root / "test" / "1.tar")
    with pytest.raises(UserError, match=r"missing shard .*test/1.tar"):
        open_corpus(root)
    for text in ("two", "-1", "0", "9" * 50, "1e3", ""):
        (root / "test" / "nshards.txt").write_text(text)
        with pytest.raises(UserError, match="no count of shards"):
            open_corpus(root / "test")


def test_what_is_no_corpus_is_said_with_what_would_be(folder, tmp_path):
    write_shard(tmp_path / "a.tar", [("a", {"jpg": b""})])
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(jpeg())
    for source, message in (
        ("", "an empty name"),
        (" ", "an empty name"),
        (tmp_path / "pictures", "no manifest.json and no tars in .*data_tools pack"),
        (tmp_path / "a.idx", r"is an index; .*name its tar, .*a\.tar"),
        (f"{tmp_path}/x*.tar", "no shards match"),
        (f"{tmp_path}/nowhere", "no corpus at .*glob pattern"),
        (f"{tmp_path}/pictures/a.jpg", "is no tar; got a file that begins with .*data_tools pack"),
        ("http://127.0.0.1:9/*.tar", "glob pattern in a URL; remedy: name the tars with braces"),
        ("http://127.0.0.1:9/a.tar.gz", "is compressed"),
    ):
        with pytest.raises(UserError, match=message):
            open_corpus(source)


def compressors():
    yield "gz", gzip.compress, "gzip"
    yield "bz2", bz2.compress, "bzip2"
    yield "xz", lzma.compress, "xz"
    if shutil.which("zstd"):
        yield (
            "zst",
            lambda data: subprocess.run(["zstd", "-c"], input=data, capture_output=True, check=True).stdout,
            "zstd",
        )


def test_compressed_tars_are_called_compressed(tmp_path, capsys):
    pairs(tmp_path / "a.tar", range(2))
    plain = (tmp_path / "a.tar").read_bytes()
    for number, (suffix, compress, name) in enumerate(compressors()):
        place = tmp_path / str(number)
        place.mkdir()
        for path in (place / f"b.tar.{suffix}", place / "named_as.tar"):
            path.write_bytes(compress(plain))
            with pytest.raises(UserError, match=f"is compressed with {name}; expected a plain tar; remedy: unpack it"):
                open_corpus(path)
        with pytest.raises(UserError, match=f"holds compressed tars; got 1 such as b.tar.{suffix}"):
            open_corpus(place)
        assert main(["index", str(place / "named_as.tar")]) == 1
        printed = capsys.readouterr()
        assert f"is compressed with {name}" in printed.out
        assert "fetch" not in printed.out + printed.err
    with zipfile.ZipFile(tmp_path / "z.tar", "w") as archive:
        archive.writestr("a.jpg", jpeg())
    with pytest.raises(UserError, match="is a zip archive; expected a plain tar; remedy: unpack it, and make shards"):
        open_corpus(tmp_path / "z.tar")


@pytest.mark.parametrize(
    ("names", "found", "remedy"),
    [
        (["a.jpg", "b.jpg", "a.txt", "b.txt"], "key 'a' again after other samples", "tar --sort=name"),
        (["a.jpg", "a.txt", "b.jpg", "a.jpg", "a.txt"], "key 'a' again after other samples", "a key of its own"),
        (["a.jpg", "a.jpg"], "member 'a.jpg' twice in one sample", "a key of its own"),
        (["a.jpg", "a.JPG"], "member 'a.JPG' twice in one sample", "a key of its own"),
    ],
)
def test_keys_that_are_not_in_one_piece_are_no_damage(tmp_path, names, found, remedy, capsys):
    path = tmp_path / "s.tar"
    foreign(path, [(name, jpeg()) for name in names])
    for verb in ("index", "verify"):
        assert main([verb, str(path)]) == 1
        printed = capsys.readouterr()
        assert found in printed.out
        assert remedy in printed.out
        assert "fetch these tars" not in printed.out + printed.err
        assert "damaged tar" not in printed.out


@pytest.mark.parametrize("name", ["BZh", "PAR1", "ARROW1", "Rar!"])
def test_the_first_file_of_a_tar_may_be_named_like_the_beginning_of_another_format(tmp_path, name):
    foreign(tmp_path / "s.tar", [(f"{name}.jpg", jpeg()), (f"{name}.txt", b"a")])
    assert keys(open_corpus(tmp_path / "s.tar")) == [name]


def test_sorting_by_name_is_a_remedy(tmp_path):
    """Run what the message says, with GNU tar."""
    path, new, folder = tmp_path / "s.tar", tmp_path / "new.tar", tmp_path / "folder"
    names = ["b/a-1.jpg", "b/a.jpg", "a.jpg", "b/a-1.txt", "b/a.txt", "a.txt", "a0.jpg", "a0.txt"]
    foreign(path, [(name, jpeg()) for name in names])
    with pytest.raises(UserError, match=r"tar -xf OLD.tar -C FOLDER; tar --sort=name -cf NEW.tar -C FOLDER ."):
        survey_tar(path)
    folder.mkdir()
    subprocess.run(["tar", "-xf", path, "-C", folder], check=True)
    subprocess.run(["tar", "--sort=name", "-cf", new, "-C", folder, "."], check=True)
    assert sorted(keys(open_corpus(new))) == ["./a", "./a0", "./b/a", "./b/a-1"]


STRAYS = ["README.txt", "README.md", "README", "a/readme.md", "LICENSE", "license.txt", "notes.html", "labels.csv"]
STRAYS += ["run.log", "sums.md5", ".DS_Store", "._0000.jpg", "nshards.txt", "Makefile"]


def test_links_in_a_tar_are_counted_among_what_is_passed_over(tmp_path, capsys):
    """Without data of their own they are no members: webdataset skips them too."""
    path = tmp_path / "s.tar"
    pairs(path, range(2))
    with tarfile.open(path, "a") as tar:
        for name, kind in (("0002.jpg", tarfile.LNKTYPE), ("0003.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "0000.jpg"
            tar.addfile(info)
    assert main(["index", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "2 samples\n" in printed
    assert "passed over: 2 files that are no part of a sample, such as 0002.jpg, 0003.jpg" in printed
    assert keys(open_corpus(path)) == ["0000", "0001"]


def test_a_tar_without_samples_is_a_problem_for_every_verb(tmp_path, capsys):
    path = tmp_path / "s.tar"
    for members in ([], [("README.md", b"x")], [("Makefile", b"x")]):
        foreign(path, members)
        for verb in ("index", "verify"):
            assert main([verb, str(path)]) == 1
            assert f"no samples in {path}" in capsys.readouterr().out
        with pytest.raises(UserError, match="no samples in"):
            open_corpus(path)
        index_path(path).unlink(missing_ok=True)


@pytest.mark.parametrize("place", [0, 1, 2, 4])
def test_stray_files_are_passed_over_and_counted(tmp_path, place, capsys):
    path = tmp_path / "s.tar"
    members = [
        (f"{key}.{kind}", jpeg(key) if kind == "jpg" else b"text") for key in range(2) for kind in ("jpg", "txt")
    ]
    members[place:place] = [(name, b"about the corpus") for name in STRAYS]
    foreign(path, members)
    assert main(["index", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "2 samples\nmembers: 2 jpg, 2 txt\n" in printed
    assert f"passed over: {len(STRAYS)} files that are no part of a sample, such as README" in printed
    with ShardReader(open_corpus(path)) as reader:
        assert [reader.read(0, number).members["txt"] for number in range(2)] == [b"text"] * 2


def test_samples_that_are_named_like_documents_stay_samples(tmp_path):
    path = tmp_path / "s.tar"
    members = [
        ("readme.txt", b"a caption"),
        ("readme.jpg", jpeg()),
        ("x.csv", b"1"),
        ("x.jpg", jpeg()),
        ("y.jpg", jpeg()),
        ("y.html", b""),
    ]
    foreign(path, members)
    with ShardReader(open_corpus(path)) as reader:
        assert [sorted(reader.read(0, n).members) for n in range(3)] == [
            ["jpg", "txt"],
            ["csv", "jpg"],
            ["html", "jpg"],
        ]


def test_index_says_how_many_lines_captions_have(tmp_path, capsys):
    texts = [
        b"one",
        b"one\n",
        b"\n one\r\n",
        b"two\nlines",
        b"two\r\n\r\nlines\n",
        b"\xe2\x80\xa8",
        b"",
        "a\u2028b".encode(),
    ]
    foreign(tmp_path / "s.tar", [m for n, text in enumerate(texts) for m in ((f"{n}.png", jpeg()), (f"{n}.txt", text))])
    assert main(["index", str(tmp_path)]) == 0
    counts = [len([line for line in io.TextIOWrapper(io.BytesIO(text), "utf-8") if line.strip()]) for text in texts]
    expected = f"{counts.count(1)} on one line, {counts.count(2)} on several lines, {counts.count(0)} empty"
    assert f"captions (.txt): {expected}" in capsys.readouterr().out


def test_a_packed_folder_wins_over_the_tars_in_it(tmp_path):
    index = write_shard(tmp_path / "s.tar", [("a", {"jpg": jpeg()})])
    pairs(tmp_path / "other.tar", range(2))
    record = ShardRecord("s", 1, index.tar_bytes, index.tar_hash.hex())
    write_manifest(Manifest({}, "", {}, (record,)), tmp_path)
    assert open_corpus(tmp_path).num_samples == 1
    assert [found.manifest for found in find(str(tmp_path))] == [tmp_path / "manifest.json"]
    assert not index_path(tmp_path / "other.tar").exists()
