"""Fields: what of a sample training and evaluation see, what a sample may lack, and what a batch makes of them."""

from __future__ import annotations

import json
import pickle
from itertools import islice

import pytest
import torch

from data_tools.corpus import Sample
from data_tools.errors import UserError
from data_tools.media.bad import BadSampleError
from data_tools.media.members import DEFAULT_FIELDS, Fields
from pretrain.stream.draw import Draw, Purpose
from pretrain.stream.eval_reader import EvalReader
from pretrain.stream.fields.field import Shown, micro_batches
from pretrain.stream.fields.image import Image
from pretrain.stream.fields.label import Label
from pretrain.stream.fields.text import Text
from pretrain.stream.loader import StreamSource
from pretrain.stream.samples import Samples, padding_of
from pretrain.towers.cut import TextRule
from stream_corpora import IMAGE, characters, members, pixels, stream_of, tokens, write_corpus

SETTINGS = {"seed": 3, "global_batch": 8, "window": 4}
RULE = TextRule(pad=ord(" "), buckets=2)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Pairs, texts alone and pictures alone, of other keys each."""
    folder = tmp_path_factory.mktemp("corpora")
    changes = {
        "pairs": {},
        "texts": {n: {"jpg": None, "cls": None} for n in range(30)},
        "pictures": {n: {"txt": None, "json": None} for n in range(30)},
    }
    made = {}
    for number, (name, change) in enumerate(changes.items()):
        (folder / name).mkdir()
        shown = {n: {"txt": f"{name} {n}".encode() if name != "pictures" else None} | own for n, own in change.items()}
        made[name] = write_corpus(folder / name, [24 + number], shown)
    return made


def first(corpus, fields, steps=3, **settings):
    with stream_of(corpus, fields=lambda *_: fields, **SETTINGS, **settings) as stream:
        return list(islice(stream.iterate(0), steps))


@pytest.mark.parametrize(("name", "field"), [("texts", Text(characters)), ("pictures", Image(IMAGE))])
def test_a_corpus_needs_only_what_its_fields_ask_for(corpora, name, field):
    kind = "text" if name == "texts" else "image"
    for workers in (0, 1):
        for batch in first(corpora[name], {kind: field}, workers=workers):
            assert set(batch.inputs) == set(batch.identity) == {kind}
            assert (len(batch.keys), batch.bad) == (8, [])
    assert len(batch.captions) == (8 if kind == "text" else 0)
    found = list(EvalReader(corpora[name], {kind: field}, 10))
    assert [key for batch in found for key in batch.keys if key] == [
        f"{n:06d}" for n in range(corpora[name].num_samples)
    ]
    assert all(set(batch.inputs) == {kind} for batch in found)


def test_sources_of_several_kinds_share_one_mixture(corpora):
    """Of optional fields a row says who has them, at every world size; what is missing is padding and no bad sample."""
    sources = [
        StreamSource(corpora[name], weight=weight) for name, weight in (("pairs", 2), ("texts", 1), ("pictures", 1))
    ]
    fields = {"text": Text(characters, optional=True), "image": Image(IMAGE, optional=True)}
    whole = first(sources, fields, steps=6)
    for step, batch in enumerate(whole):
        text, image = (batch.inputs[name]["present"] for name in ("text", "image"))
        assert batch.bad == []
        assert text.tolist() == [source != 2 for source in batch.slots.sources]
        assert image.tolist() == [source != 1 for source in batch.slots.sources]
        assert torch.equal((pixels(batch) != 0).flatten(1).any(dim=1), image)
        assert torch.equal(tokens(batch), characters(batch.captions))
        assert [bool(caption) for caption in batch.captions] == text.tolist()
        ranks = [first(sources, fields, steps=6, rank=rank, world_size=2)[step] for rank in range(2)]
        assert torch.equal(torch.cat([rank.inputs["image"]["present"] for rank in ranks]), image)
    with pytest.raises(UserError, match="has the expected image"):
        first(sources, {"text": fields["text"], "image": Image(IMAGE)})


def test_an_optional_field_may_be_lacked_but_not_broken(tmp_path):
    change = {
        1: {"jpg": None},
        2: {"jpg": b"no picture"},
        3: {"txt": b" ", "json": b"{}"},
        4: {"cls": None},
        5: {"cls": b"x"},
    }
    corpus = write_corpus(tmp_path, [8], change)
    optional = {
        "text": Text(characters, optional=True),
        "label": Label(optional=True),
        "image": Image(IMAGE, optional=True),
    }
    (batch,) = first(corpus, optional, steps=1)
    assert sorted((bad.key, bad.kind) for bad in batch.bad) == [("000002", "undecodable"), ("000005", "bad_label")]
    for field, lacking in (("image", "000001"), ("text", "000003"), ("label", "000004")):
        absent = {key for key, there in zip(batch.keys, batch.inputs[field]["present"], strict=True) if not there}
        assert absent == {lacking}
    assert batch.inputs["label"]["class"][batch.keys.index("000004")] == -1
    found = next(iter(EvalReader(write_corpus(tmp_path, [2], {1: {"jpg": None}}), optional, 2)))
    assert found.inputs["image"]["present"].tolist() == [True, False]


def test_what_a_bad_sample_left_in_a_row_is_gone():
    """A substitute that lacks an optional field has its padding, not the picture and number of the sample before."""
    fields = {"label": Label(optional=True), "image": Image(IMAGE, optional=True)}
    samples = Samples(fields, 1, padding_of(fields))
    samples.put(0, Sample("bad", 1, members(1)), fields, Draw(0, 0, 1))
    samples.put(0, Sample("good", 2, {"txt": b"a text"}), fields, Draw(0, 0, 2))
    inputs, _ = samples.finish(1)
    assert not inputs["image"]["pixels"].any()
    assert inputs["label"]["class"].tolist() == [-1]


def test_a_batch_is_cut_for_its_micro_batches(corpora):
    rule = pickle.loads(pickle.dumps(RULE))
    fields = {"text": Text(characters, rule=RULE), "image": Image(IMAGE, patch_dropout=0.5)}
    (batch,) = first(corpora["pairs"], fields, steps=1, micro_batch=3)
    parts = micro_batches(batch.inputs, 3)
    assert [len(part["image"]["pixels"]) for part in parts] == [3, 3, 2]
    for number, part in enumerate(parts):
        rows = slice(3 * number, 3 * number + 3)
        want = {"tokens": tokens(batch)[rows], **rule(tokens(batch)[rows])}
        assert set(part["text"]) == set(want)
        assert all(torch.equal(part["text"][name], row) for name, row in want.items())
        assert part["image"]["pixels"].data_ptr() == pixels(batch)[rows].data_ptr()
        assert torch.equal(part["image"]["patch_bits"], batch.inputs["image"]["patch_bits"][rows])


def test_patch_bits_are_of_the_sample_and_travel_where_patches_are_left_out(corpora):
    for workers in (0, 1):
        (batch,) = first(corpora["pairs"], {"image": Image(IMAGE, patch_dropout=0.5)}, steps=1, workers=workers)
        draws = [Draw(3, 0, int(id)) for id in batch.ids]
        assert batch.inputs["image"]["patch_bits"].tolist() == [draw.signed(Purpose.PATCHES) for draw in draws]
    (batch,) = first(corpora["pairs"], {"image": Image(IMAGE)}, steps=1)
    assert set(batch.inputs["image"]) == {"pixels"}


def test_training_and_evaluation_read_through_the_same_fields(tmp_path):
    """A field that neither knows, with two rows of its own."""
    corpus = write_corpus(tmp_path, [8])
    fields = {"size": Bytes(), "image": Image(IMAGE)}
    (batch,) = first(corpus, fields, steps=1)
    found = next(iter(EvalReader(corpus, fields, 8)))
    trained = {key: row.tolist() for key, row in zip(batch.keys, batch.inputs["size"]["bytes"], strict=True)}
    evaluated = {key: row.tolist() for key, row in zip(found.keys, found.inputs["size"]["bytes"], strict=True)}
    assert trained == evaluated == {f"{n:06d}": [len(data) for data in members(n).values()] for n in range(8)}


def caption_of(sample, draw, **options):
    return Text(characters, **options).train(sample, draw, {}).texts[0]


def test_a_text_is_one_caption_where_the_json_has_none():
    sample = Sample("k", 1, {"txt": b"two\nlines ", "json": b'{"width": 3}'})
    assert caption_of(sample, Draw(0, 0, 1)) == "two lines"


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        ("json:meta.alt", "deep"),
        ("json:none;json:captions", "a"),
        ("txt;json:captions", "plain"),
        ("empty.txt;json:title", "title"),
    ],
)
def test_a_key_mapping_names_the_caption(captions, expected):
    content = {"captions": ["a", "b"], "title": "title", "meta": {"alt": ["deep"]}}
    sample = Sample("k", 1, {"txt": b"plain", "empty.txt": b" ", "json": json.dumps(content).encode()})
    mapping = Fields(captions=tuple(captions.split(";")))
    assert caption_of(sample, Draw(0, 0, 1), mapping=mapping, choose="first") == expected
    assert mapping.lacks_image(sample) is not None


def test_a_key_mapping_names_the_image():
    sample = Sample("k", 1, {"jpg": b"thumbnail", "full.jpg": b"picture"})
    assert DEFAULT_FIELDS.image_bytes(sample) == b"thumbnail"
    assert Fields(image=("full.jpg", "jpg")).image_bytes(sample) == b"picture"


@pytest.mark.parametrize(
    ("members", "kind"),
    [
        ({"txt": b"x" * 100_000}, "huge_text"),
        ({"json": b'{"captions": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"}, "bad_json"),
        ({"json": b"[1]"}, "bad_json"),
        ({"json": b'{"captions": {"a": 1}}'}, "bad_json"),
        ({"json": b'{"captions": []}'}, "no_caption"),
    ],
)
def test_texts_that_are_no_captions(members, kind):
    with pytest.raises(BadSampleError) as caught:
        caption_of(Sample("k", 1, members), Draw(0, 0, 1))
    assert caught.value.kind == kind


def test_captions_are_chosen_evenly():
    choices = [caption_of(Sample("k", n, members(7)), Draw(0, 0, n)) for n in range(3000)]
    assert all(900 < choices.count(caption) < 1100 for caption in set(choices))
    assert len(set(choices)) == 3


@pytest.mark.parametrize(("cls", "kind"), [(b"x", "bad_label"), (b"-1", "bad_label"), (b"3", "bad_label")])
def test_labels_are_checked(cls, kind):
    with pytest.raises(BadSampleError) as caught:
        Label(3).train(Sample("k", 1, {"cls": cls}), Draw(0, 0, 1), Label(3).rows(1))
    assert caught.value.kind == kind


class Bytes:
    """A field of a test: the sizes of a sample's members, int64 [n, 4]."""

    optional = False

    def rows(self, n):
        return {"bytes": torch.zeros(n, 4, dtype=torch.int64)}

    def train(self, sample, draw, out):
        return self.evaluate(sample, out)

    def evaluate(self, sample, out):
        sizes = [len(sample.members[name]) for name in members(0)]
        out["bytes"].copy_(torch.tensor(sizes))
        return Shown()

    def finish(self, rows, shown, micro_batch):
        return rows

    def identity(self, rows, shown):
        return rows["bytes"].sum(dim=1)

    def lacks(self, sample):
        return None
