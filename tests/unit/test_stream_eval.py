"""The evaluation reader: every sample once, in order, padded alike on every rank."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import xxhash

from data_tools.errors import UserError
from data_tools.media.members import Fields
from pretrain.stream.transform import ImageSettings, ImageTransform
from stream_corpora import CONTEXT, characters, classes, members, pixels, reader_of, tokens, write_corpus

IMAGE = ImageSettings(16)
COUNTS = [7, 4]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("shards"), COUNTS)


def read(corpus, batch=4, tokenize=characters, **ranks):
    reader = reader_of(corpus, tokenize, batch, **ranks)
    batches = list(reader)
    assert len(batches) == len(reader)
    return batches


def test_every_sample_once_in_corpus_order(corpus):
    batches = read(corpus)
    assert [key for batch in batches for key in batch.keys] == [f"{n:06d}" for n in range(11)]
    assert torch.cat([batch.positions for batch in batches]).tolist() == list(range(11))
    assert [len(pixels(batch)) for batch in batches] == [4, 4, 3]
    expected = ImageTransform(IMAGE).evaluate(members(9)["jpg"])
    assert np.array_equal(pixels(batches[2])[1].permute(1, 2, 0).numpy(), expected)


def test_all_captions_with_the_position_of_their_image(corpus):
    for batch in read(corpus):
        captions = [
            c for position in batch.positions.tolist() for c in json.loads(members(position)["json"])["captions"]
        ]
        assert batch.captions == captions
        assert torch.equal(tokens(batch), characters(captions))
        assert batch.text_image.tolist() == [p for p in batch.positions.tolist() for _ in range(3)]


def test_images_and_texts_are_told_apart_as_in_training(corpus):
    """By the bytes of the image and the tokens of the text."""
    signed = lambda data: np.uint64(xxhash.xxh3_64_intdigest(data)).astype(np.int64)  # noqa: E731
    for batch in read(corpus):
        of_images, of_texts = batch.identity["image"], batch.identity["text"]
        assert of_images.tolist() == [signed(members(position)["jpg"]) for position in batch.positions.tolist()]
        assert of_texts.tolist() == [signed(text.numpy().tobytes()) for text in tokens(batch)]


def test_labels_where_there_are_any(corpus, tmp_path):
    assert torch.cat([classes(batch) for batch in read(corpus)]).tolist() == [n % 3 for n in range(11)]
    unlabelled = write_corpus(tmp_path, [3], {n: {"cls": None} for n in range(3)})
    assert "label" not in read(unlabelled)[0].inputs


@pytest.mark.parametrize("world_size", [2, 3, 4, 16])
def test_ranks_have_equal_padded_batches(corpus, world_size):
    ranks = [read(corpus, batch=2, rank=rank, world_size=world_size) for rank in range(world_size)]
    shapes = {tuple(len(pixels(batch)) for batch in rank) for rank in ranks}
    assert len(shapes) == 1
    positions = torch.cat([batch.positions for rank in ranks for batch in rank])
    assert positions[positions >= 0].tolist() == list(range(11))
    keys = [key for rank in ranks for batch in rank for key in batch.keys]
    assert [key for key in keys if key] == [f"{n:06d}" for n in range(11)]
    for rank in ranks:
        for batch in rank:
            padding = batch.positions < 0
            assert (pixels(batch)[padding] == 0).all()
            assert (classes(batch)[padding] == -1).all()
            assert tokens(batch).shape == (len(batch.captions), CONTEXT)
            assert len(batch.captions) == len(batch.text_image) >= 1


def test_lines_of_a_text_are_captions_where_the_layout_or_the_mapping_says_so(tmp_path):
    corpus = write_corpus(tmp_path, [1], {0: {"txt": b"first\n\n second \n", "json": b'{"id": 1}'}})
    assert read(corpus)[0].captions == ["first second"]
    assert read(corpus, mapping=Fields(captions=("lines",)))[0].captions == ["first", "second"]
    (tmp_path / "nshards.txt").write_text("1")  # as CLIP_benchmark writes beside its tars
    assert read(corpus)[0].captions == ["first", "second"]


def test_without_a_tokenizer_captions_are_not_needed(tmp_path):
    corpus = write_corpus(tmp_path, [2], {n: {"txt": None, "json": None} for n in range(2)})
    batch = read(corpus, tokenize=None)[0]
    assert "text" not in batch.inputs
    assert classes(batch).tolist() == [0, 1]


def test_it_can_be_read_again(corpus):
    reader = reader_of(corpus, characters, 4)
    first, second = list(reader), list(reader)
    assert all(torch.equal(pixels(a), pixels(b)) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"jpg": b"x"}, r"cannot evaluate on sample 000002 .*undecodable: no known image format"),
        ({"txt": b"", "json": b"{}"}, "cannot evaluate on sample 000002 .*no_caption"),
        ({"cls": b"x"}, "cannot evaluate on sample 000002 .*bad_label"),
        ({"cls": None}, "cannot evaluate on sample 000002 .*no_label"),
    ],
)
def test_unreadable_samples_are_errors(tmp_path, change, message):
    corpus = write_corpus(tmp_path, [4], {2: change})
    with pytest.raises(UserError, match=message):
        read(corpus)


def test_a_corpus_without_captions_fails_at_once(tmp_path):
    corpus = write_corpus(tmp_path, [1], {0: {"txt": None, "json": None}})
    with pytest.raises(UserError, match="has the expected caption"):
        reader_of(corpus, characters, 4)
