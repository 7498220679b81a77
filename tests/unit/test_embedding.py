"""Stored vectors: what NumPy writes and what a json holds are read alike, and a damaged one is a bad sample."""

from __future__ import annotations

import io
import json
import pickle
import random

import numpy as np
import pytest
import torch

from data_tools.corpus import Sample
from data_tools.errors import UserError
from data_tools.media.bad import BadSampleError
from data_tools.media.members import Fields
from pretrain.stream.draw import Draw
from pretrain.stream.eval_reader import EvalReader
from pretrain.stream.fields import EmbeddingConfig
from pretrain.stream.fields.embedding import Embedding
from pretrain.stream.fields.field import FieldContext
from pretrain.stream.fields.image import Image
from pretrain.stream.fields.text import Text
from stream_corpora import IMAGE, characters, stream_of, write_corpus

SIZE = 5
PLACE = "teacher.npy"
FIELD = Embedding(PLACE, SIZE, normalise=False)
CAPTIONS = json.dumps({"captions": ["one", "two", "three"]}).encode()
JSON = Embedding("json:teacher.image", SIZE, normalise=False)


def npy(array, **options) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asanyarray(array), **options)
    return file.getvalue()


def vector(number, dtype=np.float32):
    return np.random.default_rng(number).normal(size=SIZE).astype(dtype)


def read(field, members, draw=None):
    """The row that a sample of these members becomes."""
    out = {name: row[0] for name, row in field.rows(1).items()}
    sample = Sample("k", 1, members)
    shown = field.evaluate(sample, out) if draw is None else field.train(sample, draw, out)
    assert shown.texts == ()
    return out["values"].numpy()


def of_json(value):
    return {"json": json.dumps({"teacher": {"image": value}}).encode()}


def kind_of(field, members):
    with pytest.raises(BadSampleError) as caught:
        read(field, members)
    assert caught.value.reason.isprintable()
    assert len(caught.value.reason) < 300
    return caught.value.kind


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f2", ">f4"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_what_numpy_writes_is_read(dtype, version):
    want = vector(1, np.dtype(dtype))
    got = read(FIELD, {PLACE: npy(want, version=version)})
    assert got.dtype == np.float32
    assert np.array_equal(got, want.astype(np.float32))
    assert np.array_equal(read(FIELD, {PLACE: npy(want[None])}), got)


def test_a_list_in_a_json_is_read_as_its_member_would_be():
    want = vector(2)
    got = read(JSON, of_json([float(x) for x in want]))
    assert np.array_equal(got, want)
    assert read(JSON, of_json([1, 2, 3, 4, 5])).tolist() == [1, 2, 3, 4, 5]


def test_vectors_get_unit_norm():
    huge = np.float32([3e38, 4e38 * 0.75, 0, 0, 0])  # squares beyond fp32
    for value in (vector(3), vector(3, np.float16), huge, np.float32([1e-40] * SIZE)):
        got = read(Embedding(PLACE, SIZE), {PLACE: npy(value)})
        want = value.astype(np.float64) / np.linalg.norm(value.astype(np.float64))
        assert got == pytest.approx(want, rel=1e-6)
    assert kind_of(Embedding(PLACE, SIZE), {PLACE: npy(np.zeros(SIZE, np.float32))}) == "bad_embedding"
    assert not read(FIELD, {PLACE: npy(np.zeros(SIZE, np.float32))}).any()


@pytest.mark.parametrize("order", ["C", "F"])
def test_each_caption_has_a_vector_of_its_own(order):
    """That of the caption which the text field takes, whatever is drawn."""
    vectors = np.array([vector(n) for n in range(3)], order=order)
    members = {PLACE: npy(vectors), "json": CAPTIONS}
    for choose in ("random", "first"):
        field, text = Embedding(PLACE, SIZE, normalise=False, choose=choose), Text(characters, choose=choose)
        seen = set()
        for number in range(20):
            draw = Draw(0, 0, number)
            (caption,) = text.train(Sample("k", number, members), draw, {}).texts
            place = ["one", "two", "three"].index(caption)
            assert np.array_equal(read(field, members, draw), vectors[place])
            seen.add(place)
        assert seen == ({0, 1, 2} if choose == "random" else {0})
    assert np.array_equal(read(FIELD, members), vectors[0])
    assert kind_of(FIELD, {PLACE: npy(vectors), "txt": b"one caption"}) == "bad_embedding"
    assert kind_of(FIELD, {PLACE: npy(vectors)}) == "no_caption"
    one_for_all = {PLACE: npy(vectors[:1]), "json": CAPTIONS}
    assert np.array_equal(read(FIELD, one_for_all, Draw(0, 0, 1)), vectors[0])


def of_shape(shape) -> bytes:
    """The header that says so."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('a file was run')",)


def wrong():
    """Contents that are no vector of SIZE finite numbers."""
    good = npy(vector(4))
    objects = io.BytesIO()
    np.save(objects, np.array([Evil()], object), allow_pickle=True)
    zipped = io.BytesIO()
    np.savez(zipped, vector(4))
    header = b"\x93NUMPY\x01\x00"
    return {
        "empty": b"",
        "cut in its numbers": good[:-1],
        "longer than it says": good + b"\0",
        "cut in its header": good[:60],
        "of objects": objects.getvalue(),
        "a bare pickle": pickle.dumps(Evil()),
        "a zip": zipped.getvalue(),
        "of doubles": npy(vector(4, np.float64)),
        "of integers": npy(np.arange(SIZE)),
        "of records": npy(np.zeros(SIZE, [("a", "<f4")])),
        "of another size": npy(np.zeros(SIZE + 1, np.float32)),
        "of no size": npy(np.float32(1)),
        "of three axes": npy(np.zeros((1, 1, SIZE), np.float32)),
        "of no vectors": npy(np.zeros((0, SIZE), np.float32)),
        "not a number": npy(np.float32([1, 2, np.nan, 4, 5])),
        "infinite": npy(np.float16([1, 2, np.inf, 4, 5])),
        "one of two not finite": npy(np.float32([[1] * SIZE, [np.inf] * SIZE])),
        "larger than memory": header
        + b"\x76\x00"
        + b"{'descr': '<f4', 'fortran_order': False, 'shape': (%d,)}" % 10**18,
        "of more axes than an array has": of_shape((1,) * 65) + good[-4:],
        "of no vectors, each larger than memory": of_shape((0, 10**30)),
        "of a negative size": of_shape((-SIZE,)) + good[-20:],
        "nested without end": header + b"\xff\xff" + b"(" * 65535,
        "a header that is code": good.replace(b"(5,)", b"exit"),
        "an unknown version": good.replace(b"NUMPY\x01", b"NUMPY\x03"),
        "huge": npy(np.zeros((1 << 22) + SIZE, np.float32)),
    }


def test_what_is_no_vector_is_a_bad_sample():
    for name, data in wrong().items():
        assert kind_of(FIELD, {PLACE: data}) == "bad_embedding", name


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, "no_embedding"),
        ([], "bad_embedding"),
        ("1 2 3 4 5", "bad_embedding"),
        (["1", "2", "3", "4", "5"], "bad_embedding"),
        ([True] * SIZE, "bad_embedding"),
        ([None] * SIZE, "bad_embedding"),
        ({"a": 1}, "bad_embedding"),
        ([[1] * SIZE, [1]], "bad_embedding"),
        ([[[1] * SIZE]], "bad_embedding"),
        ([[1] * SIZE, 1], "bad_embedding"),
        ([1] * (SIZE + 1), "bad_embedding"),
        ([float("nan")] * SIZE, "bad_embedding"),
        ([1e39] * SIZE, "bad_embedding"),
        ([10**400] * SIZE, "bad_embedding"),
    ],
)
def test_lists_that_are_no_vectors(value, kind):
    assert kind_of(JSON, of_json(value)) == kind


def test_a_sample_without_a_vector_lacks_it():
    assert kind_of(FIELD, {"txt": b"a"}) == kind_of(JSON, {"txt": b"a"}) == "no_embedding"
    assert kind_of(JSON, {"json": b"[1]"}) == "bad_json"
    assert FIELD.lacks(Sample("k", 1, {"txt": b"a"})) == "embedding (teacher.npy)"
    assert FIELD.lacks(Sample("k", 1, {PLACE: b""})) is JSON.lacks(Sample("k", 1, of_json([]))) is None


def test_damaged_bytes_raise_nothing_else():
    """Any change of a file is another vector or a bad sample."""
    good, draw = npy(vector(5)), random.Random(0)
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(draw.choice((1, 1, 2, 8))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            got = read(FIELD, {PLACE: bytes(data[: draw.choice((len(data), draw.randrange(len(data))))])})
        except BadSampleError:
            continue
        assert np.isfinite(got).all()


def test_a_stream_gives_vectors_to_all_that_have_them(tmp_path):
    """Beside images; a sample without one is replaced and listed, or absent where it may lack it."""
    change = {n: {PLACE: npy(vector(n))} for n in range(24) if n not in (3, 7)} | {7: {PLACE: b"no vector"}}
    corpus = write_corpus(tmp_path, [24], change)
    for optional in (False, True):
        fields = {"image": Image(IMAGE), "teacher": Embedding(PLACE, SIZE, normalise=False, optional=optional)}
        for workers in (0, 1):
            with stream_of(
                corpus, fields=lambda *_, fields=fields: fields, seed=3, global_batch=24, window=4, workers=workers
            ) as stream:
                batch = next(stream.iterate(0))
            assert {bad.key: bad.kind for bad in batch.bad} == {"000007": "bad_embedding"} | (
                {} if optional else {"000003": "no_embedding"}
            )
            rows = batch.inputs["teacher"]
            assert rows["values"].dtype == torch.float32
            for place, key in enumerate(batch.keys):
                want = np.zeros(SIZE, np.float32) if key == "000003" else vector(int(key))
                assert np.array_equal(rows["values"][place].numpy(), want)
                assert not optional or bool(rows["present"][place]) == (key != "000003")
            same = {int(one): key for one, key in zip(batch.identity["teacher"], batch.keys, strict=True)}
            assert len(same) == len(set(batch.keys))
    evaluated = next(iter(EvalReader(corpus, fields, 4))).inputs["teacher"]
    assert evaluated["present"].tolist() == [True, True, True, False]
    assert np.array_equal(evaluated["values"][1].numpy(), vector(1))


def test_a_corpus_of_another_kind_is_refused_at_once(tmp_path):
    corpus, settings = write_corpus(tmp_path, [20]), {"seed": 3, "global_batch": 8, "window": 4}
    with pytest.raises(UserError, match=r"embedding \(teacher.npy\)"):
        stream_of(corpus, fields=lambda *_: {"teacher": FIELD}, **settings)


def test_a_field_is_made_of_its_settings():
    mapping = Fields(captions=("alt.txt",))
    context = FieldContext("teacher_image", mapping, "first", Text(characters), optional=True)
    plain = Embedding.of(EmbeddingConfig(size=7), context)
    assert plain == Embedding("teacher_image.npy", 7, True, mapping, "first", True)
    member = EmbeddingConfig(size=7, member="Clip.NPY", normalise=False)
    assert Embedding.of(member, context).place == "clip.npy"  # the index has extensions in lower case
    assert Embedding.of(EmbeddingConfig(size=7, member="json:Clip.Image"), context).place == "json:Clip.Image"
    assert not Embedding.of(member, context).normalise
