"""What is a caption, the same for training, evaluation, packing and previews."""

from __future__ import annotations

import json

import pytest

from data_tools.__main__ import main
from data_tools.corpus import Sample, ShardReader, open_corpus
from data_tools.format.writer import write_shard
from data_tools.media.bad import BadSampleError
from data_tools.media.captions import MAX_TEXT, captions_of_text, has_caption_lines
from data_tools.media.members import DEFAULT_FIELDS, parse_fields
from packing import jpeg, photo_folder
from pretrain.config.tree import DataConfig, Source
from pretrain.evaluate.bench import Bench
from pretrain.process.runtime import Runtime
from pretrain.stream.draw import Draw
from pretrain.stream.fields.text import Text
from pretrain.stream.sources import train_sources
from pretrain.towers.cut import TextRule
from pretrain.towers.spec import resolve_spec

TEXTS = [
    (b"one", ["one"], ["one"]),
    (b" one \n", ["one"], ["one"]),
    (b"one\ntwo", ["one two"], ["one", "two"]),
    (b"one\r\ntwo\r\n", ["one two"], ["one", "two"]),
    (b"one\rtwo", ["one two"], ["one", "two"]),
    (b"\n\n one \n\n\n two\n ", ["one two"], ["one", "two"]),
    (b"\xef\xbb\xbfone\ntwo", ["one two"], ["one", "two"]),
    ("caf\u00e9\u2028au lait".encode(), ["caf\u00e9\u2028au lait"], ["caf\u00e9\u2028au lait"]),
    (b" \n ", [], []),
    (b"", [], []),
]


@pytest.mark.parametrize(("data", "joined", "split"), TEXTS)
def test_a_text_is_one_caption_or_one_a_line(data, joined, split):
    assert captions_of_text(data) == joined
    assert captions_of_text(data, lines=True) == split


def test_texts_that_are_no_captions():
    assert captions_of_text(b"x" * MAX_TEXT + b"\n") == ["x" * MAX_TEXT]
    assert len(captions_of_text((b"x" * 60_000 + b"\n") * 3, lines=True)) == 3
    for data, kind in (
        (b"x" * (MAX_TEXT + 1), "huge_text"),
        (b" " * (1 << 20), "huge_text"),
        (b"\xff\xfeo\0", "bad_text"),
    ):
        with pytest.raises(BadSampleError) as caught:
            captions_of_text(data)
        assert caught.value.kind == kind


def test_json_and_tables_keep_their_texts_as_they_stand():
    sample = Sample("k", 1, {"json": json.dumps({"captions": ["one\ntwo", " ", "a \ud800 b"]}).encode()})
    assert DEFAULT_FIELDS.all_captions(sample) == ["one\ntwo", "a ? b"]


def training_texts(tar, places: str) -> set[str]:
    """Every text that the source of a training stream may show."""
    (source,) = train_sources(DataConfig(train=[Source(urls=str(tar), captions=places)]))
    with ShardReader(source.corpus) as reader:
        sample = reader.read(0, 0)
    field = Text(len, source.mapping, source.choose)
    return {field.train(sample, Draw(0, epoch, sample.id), {}).texts[0] for epoch in range(50)}


def evaluation_texts(tar, places: str) -> list[str]:
    bench = Bench(Runtime(0, 1, 0, None, 1), resolve_spec("ViT-B-32"), TextRule(), workers=0)
    return next(iter(bench.reader(bench.corpus(str(tar)), texts=True, captions=places))).captions


@pytest.mark.parametrize("layout", [False, True], ids=["plain", "CLIP_benchmark"])
@pytest.mark.parametrize("places", ["json:captions;txt", "lines", "txt"])
def test_training_and_evaluation_read_the_same_texts(tmp_path, places, layout):
    write_shard(tmp_path / "0.tar", [("a", {"jpg": jpeg(), "txt": b"one\ntwo\n\nthree\n"})])
    if layout:
        (tmp_path / "nshards.txt").write_text("1\n")
    assert has_caption_lines(tmp_path / "0.tar") == layout
    expected = ["one", "two", "three"] if layout or places == "lines" else ["one two three"]
    assert training_texts(tmp_path / "0.tar", places) == set(expected)
    assert evaluation_texts(tmp_path / "0.tar", places) == expected


@pytest.mark.parametrize("options", [(), ("--captions", "lines"), ("--captions", "lines", "--pairs")], ids=str)
def test_packing_and_training_read_the_same_texts(tmp_path, options, capsys):
    photos = photo_folder(tmp_path / "photos", 1)
    (photos / "photo.0.txt").write_bytes(b"one\r\ntwo\n\nthree\n")
    assert main(["pack", str(photos), str(tmp_path / "shards"), *options]) == 0
    corpus = open_corpus(tmp_path / "shards")
    with ShardReader(corpus) as reader:
        samples = [reader.read(0, index) for index in range(corpus.num_samples)]
    expected = ["one", "two", "three"] if options else ["one two three"]
    assert sorted(text for sample in samples for text in DEFAULT_FIELDS.all_captions(sample)) == sorted(expected)
    assert len(samples) == (3 if "--pairs" in options else 1)
    assert samples[0].members["txt"].decode() in expected


def test_the_preview_shows_the_same_texts(tmp_path, capsys):
    write_shard(tmp_path / "0.tar", [("a", {"jpg": jpeg(), "txt": b"one\ntwo"})])
    assert main(["preview", str(tmp_path / "0.tar"), str(tmp_path / "p.html")]) == 0
    assert "<li>one two</li>" in (tmp_path / "p.html").read_text()
    (tmp_path / "nshards.txt").write_text("1\n")
    assert main(["preview", str(tmp_path / "0.tar"), str(tmp_path / "p.html")]) == 0
    assert "<li>one</li><li>two</li>" in (tmp_path / "p.html").read_text()


def test_mappings_are_written_alike_everywhere():
    assert parse_fields(None, None) == parse_fields(None, "json:captions;txt")
    assert parse_fields("JPG;full.png", "lines").image == ("jpg", "full.png")
