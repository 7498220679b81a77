"""Pictures mirrored and recoloured, words left out: what they do, and that ranks and workers do not enter it."""

from __future__ import annotations

import io
import json
from itertools import islice

import numpy as np
import pytest
import torch
import xxhash
from PIL import Image
from torchvision.transforms.v2 import functional as reference

import tiny
from pretrain.config.tree import DataConfig, ModelConfig, Source, TrainConfig
from pretrain.process.runtime import start
from pretrain.stream.augment import drop_words, jitter_colors, mirror
from pretrain.stream.draw import Draw, Purpose
from pretrain.stream.sources import train_sources, train_stream
from pretrain.stream.transform import ImageSettings, ImageTransform
from pretrain.tasks import ContrastiveConfig
from pretrain.tasks.contrastive import pair_fields
from pretrain.towers.spec import resolve_spec
from stream_corpora import characters, pixels, stream_of, write_corpus

PICTURE = np.random.default_rng(0).integers(0, 256, (32, 24, 3)).astype(np.uint8)
CAPTION = " ".join(f"w{i}" for i in range(11))
ALL = {"image": ImageSettings(16, flip=0.5, color_jitter=0.4), "word_dropout": 0.5}


def test_a_share_of_the_pictures_is_mirrored():
    drawn = [mirror(PICTURE, 0.3, Draw(1, epoch, 9)) for epoch in range(2000)]
    mirrored = sum(np.array_equal(pixels, PICTURE[:, ::-1]) for pixels in drawn)
    assert 0.25 < mirrored / 2000 < 0.35
    assert sum(np.array_equal(pixels, PICTURE) for pixels in drawn) == 2000 - mirrored


@pytest.mark.parametrize("sample", range(8))
def test_colours_change_as_torchvision_changes_them(sample):
    draw = Draw(1, 2, sample)
    brightness, contrast = (1 + 0.4 * (2 * u - 1) for u in draw.pair(Purpose.COLORS))
    saturation = 1 + 0.4 * (2 * draw.pair(Purpose.COLORS, 1)[0] - 1)
    planes = torch.from_numpy(PICTURE).permute(2, 0, 1)
    planes = reference.adjust_brightness(planes, brightness)
    planes = reference.adjust_contrast(planes, contrast)
    expected = reference.adjust_saturation(planes, saturation).permute(1, 2, 0).numpy()
    pixels = jitter_colors(PICTURE, 0.4, draw)
    assert np.abs(pixels.astype(int) - expected).max() <= 2  # grey levels: three roundings
    assert np.abs(pixels.astype(int) - PICTURE).max() > 8


def test_a_share_of_the_words_is_left_out():
    drawn = [drop_words(CAPTION, 0.2, Draw(1, epoch, 9)).split() for epoch in range(2000)]
    assert all(words == [word for word in CAPTION.split() if word in words] for words in drawn)  # order kept
    for word in CAPTION.split():
        assert 0.16 < sum(word not in words for words in drawn) / 2000 < 0.24


def test_a_caption_keeps_a_word():
    assert {drop_words("two words", 0.99, Draw(1, epoch, 9)) for epoch in range(2000)} == {"two", "words"}
    assert drop_words("", 0.5, Draw(1, 2, 3)) == ""


def test_nothing_changes_unasked():
    assert mirror(PICTURE, 0, Draw(1, 2, 3)) is PICTURE
    assert jitter_colors(PICTURE, 0, Draw(1, 2, 3)) is PICTURE
    assert drop_words("  as  it is ", 0, Draw(1, 2, 3)) == "  as  it is "


def test_the_draws_are_frozen():
    """A change would alter the training data of every run that uses them."""
    draws = [Draw(1, 2, i) for i in range(20)]
    pixels = [jitter_colors(mirror(PICTURE, 0.5, draw), 0.4, draw) for draw in draws]
    assert xxhash.xxh3_64_hexdigest(np.ascontiguousarray(pixels)) == "5fc7f4e3d99a8a9e"
    assert [drop_words("a b c d e", 0.5, draw) for draw in draws[:4]] == ["c e", "a b e", "b c e", "a b"]


def test_evaluation_is_left_alone():
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, "PNG")
    plain, changed = (ImageTransform(settings) for settings in (ImageSettings(16), ALL["image"]))
    assert np.array_equal(plain.evaluate(buffer.getvalue()), changed.evaluate(buffer.getvalue()))
    assert not np.array_equal(*(pictures.train(buffer.getvalue(), Draw(1, 2, 3)) for pictures in (plain, changed)))


def test_ranks_and_workers_do_not_enter(tmp_path):
    corpus = write_corpus(tmp_path, [23, 31, 16])

    def steps(**settings):
        common = {"seed": 3, "global_batch": 16, "window": 4, "tokenize": characters}
        with stream_of(corpus, **(common | ALL | settings)) as stream:
            return list(islice(stream.iterate(0), 6))

    whole, plain = steps(), steps(image=ImageSettings(16), word_dropout=0.0)
    for ranks in (2, 4):
        parts = [steps(rank=rank, world_size=ranks, workers=rank % 2) for rank in range(ranks)]
        for step, batches in enumerate(zip(*parts, strict=True)):
            assert torch.equal(torch.cat([pixels(batch) for batch in batches]), pixels(whole[step]))
            assert [caption for batch in batches for caption in batch.captions] == whole[step].captions
    assert not torch.equal(pixels(whole[0]), pixels(plain[0]))
    assert whole[0].captions != plain[0].captions
    assert np.array_equal(whole[0].ids, plain[0].ids)


def test_the_settings_reach_the_stream(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(tiny.MODEL_CFG))
    write_corpus(tmp_path, [23])

    def first(**data):
        data = DataConfig(train=[Source(urls=str(tmp_path / "s-000000.tar"))], **data)
        model = ModelConfig(name=str(tmp_path / "tiny.json"))
        config = ContrastiveConfig(data=data, model=model, train=TrainConfig(global_batch=8))
        sources = train_sources(config.data)
        fields = pair_fields(config, resolve_spec(config.model.name))
        with train_stream(config, sources, fields, start(distributed=False), inspect_only=True) as stream:
            return next(stream.iterate(0))

    plain = first()
    assert torch.equal(pixels(first(flip=1.0)), pixels(plain).flip(-1))
    assert not torch.equal(pixels(first(color_jitter=0.4)), pixels(plain))
    assert all(len(caption.split()) == 1 for caption in first(word_dropout=0.999).captions)  # of two
    assert all(len(caption.split()) == 2 for caption in plain.captions)
