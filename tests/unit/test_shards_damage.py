"""Every kind of damage that `verify` and `index` must notice, with the place where it starts."""

from __future__ import annotations

import io
import os
import shutil
import tarfile

import pytest

from data_tools.corpus import ShardReader, open_corpus
from data_tools.errors import UserError
from data_tools.format.index import index_path
from data_tools.format.survey import build_index, survey_tar
from data_tools.format.tar import BLOCK, TarDamageError, TarLayoutError
from data_tools.format.writer import write_shard
from packing import data_tools, jpeg, photo_folder

SAMPLES = [(f"key{number}", {"jpg": bytes([number]) * 700, "txt": b"text"}) for number in range(6)]
# Of every sample: jpg header, two blocks of data, txt header, one block of data.
SPAN = 5 * BLOCK


def overwrite(path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def cut_at_header(path):
    os.truncate(path, 3 * SPAN)


def cut_in_header(path):
    os.truncate(path, 3 * SPAN + 100)


def cut_in_data(path):
    os.truncate(path, 3 * SPAN + BLOCK + 300)


def cut_in_end_marker(path):
    os.truncate(path, 6 * SPAN + BLOCK)


def bad_checksum(path):
    overwrite(path, 3 * SPAN + 5, b"X")


def bad_size_field(path):
    overwrite(path, 3 * SPAN + 124, b"zzzzzzzzzzz")


def zero_hole_in_header(path):
    overwrite(path, 3 * SPAN, bytes(2 * BLOCK))


def data_after_end(path):
    with open(path, "ab") as file:
        file.write(b"appended")


def empty_file(path):
    os.truncate(path, 0)


def garbage(path):
    path.write_bytes(os.urandom(6 * SPAN))


DAMAGES = {
    cut_at_header: (3 * SPAN, "ends without an end-of-archive marker"),
    cut_in_header: (3 * SPAN, "cut inside the header"),
    cut_in_data: (3 * SPAN, "cut inside the data of 'key3.jpg'"),
    cut_in_end_marker: (6 * SPAN, "end-of-archive marker is cut short"),
    bad_checksum: (3 * SPAN, "checksum does not match"),
    bad_size_field: (3 * SPAN, "checksum does not match"),
    zero_hole_in_header: (3 * SPAN, f"zeros where a header is due (data go on at byte {3 * SPAN + 2 * BLOCK})"),
    data_after_end: (6 * SPAN, "zeros where a header is due"),
    empty_file: (0, "the file is empty"),
    garbage: (0, "is no tar"),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_walk_names_the_damage_and_its_place(tmp_path, damage):
    path = tmp_path / "s.tar"
    write_shard(path, SAMPLES)
    damage(path)
    offset, what = DAMAGES[damage]
    if damage is garbage:
        with pytest.raises(UserError, match=r"is no tar; got a file that begins with b.*; expected a plain tar"):
            survey_tar(path)
        return
    if damage is empty_file:
        with pytest.raises(TarDamageError) as caught:
            survey_tar(path)
        assert caught.value.offset == offset
        said = str(caught.value)
    else:
        survey = survey_tar(path)
        assert (survey.damages, survey.losses[0].start) == (1, offset)
        said = survey.describe_losses(path)[0]
    assert what in said
    assert str(path) in said


def test_tarfile_would_have_been_silent(tmp_path):
    """Why the walk exists: the reference reader takes these for a whole, shorter tar."""
    for damage in (cut_at_header, bad_checksum, zero_hole_in_header):
        path = tmp_path / f"{damage.__name__}.tar"
        write_shard(path, SAMPLES)
        damage(path)
        with tarfile.open(path) as tar:
            assert len(tar.getmembers()) == 6


def foreign(path, names: list[str], data: bytes = b"data", kind: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(path, "w", format=kind) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_samples_must_be_contiguous_and_unique(tmp_path):
    path = tmp_path / "s.tar"
    for names, what in (
        (["a.jpg", "b.jpg", "a.txt"], "key 'a' again after other samples"),
        (["a.jpg", "a.txt", "b.jpg", "a.jpg"], "key 'a' again after other samples"),
        (["a.jpg", "a.JPG"], "member 'a.JPG' twice in one sample"),
    ):
        foreign(path, names)
        with pytest.raises(TarLayoutError, match=what):
            build_index(path)
    foreign(path, ["__meta__/info.json", "README", "a.jpg", ".hidden", "a.txt", "b.c/d.jpg"])
    assert build_index(path).num_samples == 2


def test_sparse_files_are_refused_and_old_headers_accepted(tmp_path):
    path = tmp_path / "s.tar"
    foreign(path, ["a.jpg"])
    content = bytearray(path.read_bytes())
    content[156:157], content[257:265] = b"\0", bytes(8)  # the header of 1979: no type, no magic
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)
    assert build_index(path).num_samples == 1
    content[156:157] = b"S"
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)
    with pytest.raises(TarDamageError, match="sparse"):
        build_index(path)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    data_tools("pack", photo_folder(folder / "photos"), folder / "shards", "--samples-per-shard", 4)
    return folder / "shards"


def flip_bit_in_data(folder):
    tar = folder / "shard-000001.tar"
    at = tar.read_bytes().index(b"\xff\xd8\xff") + 200
    overwrite(tar, at, bytes([tar.read_bytes()[at] ^ 1]))


def flip_bit_in_index(folder):
    index = folder / "shard-000001.idx"
    overwrite(index, 70, bytes([index.read_bytes()[70] ^ 1]))


def index_of_another_shard(folder):
    shutil.copy(folder / "shard-000000.idx", folder / "shard-000001.idx")


def no_index(folder):
    os.unlink(folder / "shard-000001.idx")


def no_tar(folder):
    os.unlink(folder / "shard-000001.tar")


def no_parquet(folder):
    os.unlink(folder / "shard-000001.parquet")


def altered_parquet(folder):
    overwrite(folder / "shard-000001.parquet", 50, b"\0\1\2\3")


def cut_tar(folder):
    os.truncate(folder / "shard-000001.tar", 5 * BLOCK + 7)


def swapped_tar(folder):
    for suffix in ("tar", "idx", "parquet"):
        shutil.copy(folder / f"shard-000000.{suffix}", folder / f"shard-000001.{suffix}")


def foreign_tar_in_folder(folder):
    foreign(folder / "shard-000007.tar", ["a.jpg"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_bit_in_data, "shard-000001.tar changed: its hash is not the manifest's"),
        (flip_bit_in_index, "index altered (its hash does not match)"),
        (index_of_another_shard, "and its index differ (content changed)"),
        (no_index, "missing index"),
        (no_tar, "missing shard"),
        (no_parquet, "missing"),
        (altered_parquet, "shard-000001.parquet changed"),
        (cut_tar, "(sample 0 of 4)"),
        (swapped_tar, "in more than one shard: shard-000000.tar, shard-000001.tar"),
        (foreign_tar_in_folder, "shard-000007.tar is not in the manifest"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_verify_reports_damage_and_fails(packed, tmp_path, damage, message, capsys):
    from data_tools.__main__ import main

    folder = shutil.copytree(packed, tmp_path / "shards")
    assert main(["verify", str(folder), "--workers", "1"]) == 0
    assert "no problems" in capsys.readouterr().out
    damage(folder)
    assert main(["verify", str(folder), "--workers", "1"]) == 1
    printed = capsys.readouterr()
    assert message in printed.out
    assert printed.err.count("\n") == 1
    assert "problems: " in printed.err


def test_a_key_that_stands_in_many_shards_is_named_once_for_each(tmp_path, capsys):
    from data_tools.__main__ import main

    for number in range(3):
        foreign(tmp_path / f"{number}.tar", ["0000.jpg", "0001.jpg"], jpeg())
    assert main(["verify", *(str(tmp_path / f"{number}.tar") for number in range(3))]) == 1
    printed = capsys.readouterr().out
    assert printed.count("in more than one shard: 0.tar, 1.tar, 2.tar") == 4
    assert printed.count("key '0000'") == printed.count("key '0001'") == 2


def test_preview_shows_what_a_damaged_sample_has(tmp_path):
    from data_tools.__main__ import main

    rows = [{"json": b"{", "cls": b"x"}, {"json": b"[1]", "txt": b"a text"}, {"json": b'{"captions": "a string"}'}]
    write_shard(tmp_path / "a.tar", [(f"{n}", {"jpg": jpeg(), **row}) for n, row in enumerate(rows)])
    assert main(["preview", str(tmp_path / "a.tar"), str(tmp_path / "p.html")]) == 0
    page = (tmp_path / "p.html").read_text()
    for text in ("bad_json: Expecting property name", "bad_json: the json is no object", "a text", "a string"):
        assert text in page


def test_verify_decodes_images_of_foreign_tars(tmp_path, capsys):
    from data_tools.__main__ import main

    write_shard(tmp_path / "good.tar", [(f"k{n:02}", {"jpg": jpeg(), "txt": b"text"}) for n in range(40)])
    write_shard(tmp_path / "bad.tar", [("x", {"jpg": b"\xff\xd8\xff not an image", "txt": b"text"})])
    assert main(["verify", str(tmp_path / "good.tar"), "--decode", "0.5"]) == 0
    share = int(capsys.readouterr().out.split(" images decoded")[0].split()[-1])
    assert 10 <= share <= 30
    assert main(["verify", str(tmp_path / "bad.tar")]) == 0
    assert main(["verify", str(tmp_path), "--decode", "1"]) == 1
    printed = capsys.readouterr().out
    assert "sample x: undecodable: jpg does not decode" in printed
    assert "41 images decoded" in printed


def test_index_names_what_cannot_be_read_and_indexes_the_rest(tmp_path, capsys):
    from data_tools.__main__ import main

    for number in range(3):
        foreign(tmp_path / f"{number}.tar", ["a.jpg", "a.txt", "b.jpg", "b.txt", "c.jpg", "c.txt"])
    overwrite(tmp_path / "1.tar", BLOCK * 4 + 3, b"?")  # the header of b.jpg
    (tmp_path / "2.tar").write_bytes(b"text" * 1000)
    assert main(["index", str(tmp_path / "{0..2}.tar"), "--workers", "2"]) == 1
    printed = capsys.readouterr()
    assert "indexed 2 of 3 tars, 6 samples, 1 of them lost" in printed.out
    assert "members: 5 jpg, 5 txt" in printed.out
    place = f"at byte {4 * BLOCK}; nothing up to byte {6 * BLOCK} can be read"
    assert f"damaged tar {tmp_path / '1.tar'}: a header whose checksum does not match {place}" in printed.out
    assert f"{tmp_path / '2.tar'} is no tar; got a file that begins with b'texttext" in printed.out
    assert printed.err == "error: 1 of 3 tars have no index; remedy: see above what to do about each\n"
    assert [index_path(tmp_path / f"{n}.tar").exists() for n in range(3)] == [True, True, False]
    assert main(["index", str(tmp_path / "{0..1}.tar")]) == 1
    assert "1 of 2 tars are damaged; got at least 1 of 6 samples lost" in capsys.readouterr().err


def read_what_is_left(corpus) -> tuple[dict[str, bytes], list[int]]:
    """The members of the samples that can be read, and the places of those that cannot."""
    found, lost = {}, []
    with ShardReader(corpus) as reader:
        for place in range(corpus.num_samples):
            try:
                sample = reader.read(0, place)
            except TarDamageError:
                lost.append(place)
                continue
            found |= {f"{sample.key}.{kind}": data for kind, data in sample.members.items()}
    return found, lost


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_one_damaged_header_costs_the_sample_that_it_stood_in(tmp_path, kind):
    """What is intact is judged by tarfile on the tar before it was damaged."""
    folder = "" if kind == tarfile.USTAR_FORMAT else "f" * 120 + "/"  # such names have a header of their own
    names = [f"{folder}{key:03d}.{suffix}" for key in range(160) for suffix in ("jpg", "json", "txt")]
    path = tmp_path / "s.tar"
    foreign(path, names, b"data" * 200, kind)
    with tarfile.open(path) as tar:
        members = {member.name.removeprefix(folder): member for member in tar}
        contents = {name: tar.extractfile(member).read() for name, member in members.items()}
    sound = path.read_bytes()
    for hurt in ("000.jpg", "080.jpg", "080.json", "080.txt", "159.txt"):
        for at in {members[hurt].offset, members[hurt].offset_data - BLOCK}:
            path.write_bytes(sound)
            overwrite(path, at + 3, b"?")
            index_path(path).unlink(missing_ok=True)
            corpus = open_corpus(path)
            expected = f"{path} is damaged: at least 1 of 160 samples were lost before it was indexed"
            assert (corpus.num_samples, corpus.damaged) == (160, (expected,))
            found, lost = read_what_is_left(corpus)
            assert lost == [int(hurt[:3])], hurt
            left = {folder + name: data for name, data in contents.items() if name[:3] != hurt[:3]}
            assert found == left


def test_training_replaces_what_a_damaged_tar_lost_and_evaluation_refuses(tmp_path):
    from stream_corpora import characters, reader_of, stream_of

    path = tmp_path / "s.tar"
    write_shard(path, [(f"{key:03d}", {"jpg": jpeg(key), "txt": b"a caption"}) for key in range(40)])
    index_path(path).unlink()
    with tarfile.open(path) as tar:
        at = next(member.offset for member in tar if member.name == "020.jpg")
    overwrite(path, at + 3, b"?")
    corpus = open_corpus(path)
    with stream_of(corpus, seed=0, global_batch=8, window=8, tokenize=characters) as stream:
        assert any("at least 1 of 40 samples were lost" in line for line in stream.describe())
        steps = stream.iterate()
        bad = [sample for _ in range(stream.steps_per_epoch) for sample in next(steps).bad if sample.kind == "damaged"]
    assert [(sample.index, sample.shard) for sample in bad] == [(20, str(path))]
    with pytest.raises(UserError, match=r"cannot evaluate on sample number 20 of .*damaged"):
        list(reader_of(corpus, None, 8))


def test_missing_tar_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="missing shard"):
        build_index(tmp_path / "none.tar")
