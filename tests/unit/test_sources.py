"""`data.train=PATH`, the commonest override, and batches from which nothing is learned."""

from __future__ import annotations

import pytest

from data_tools.errors import UsageError
from pretrain.config.reading import dump_config, load_config
from pretrain.config.tree import ImageSource, Source
from pretrain.objectives import OF_PAIRS
from pretrain.tasks import ClassifyConfig, ContrastiveConfig

PLAIN = "run: {dir: runs/a}\n"
ONE = PLAIN + "data: {train: [{urls: shards, captions: txt}]}\n"


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def read(text, *overrides, kind=ContrastiveConfig):
        (tmp_path / "config.yaml").write_text(text)
        return load_config(kind, tmp_path / "config.yaml", overrides)

    return read


@pytest.mark.parametrize(
    ("word", "urls"),
    [
        ("shards/train", ["shards/train"]),
        ("a,b", ["a", "b"]),
        ("[a,b]", ["a", "b"]),
        ("['a', \"b\"]", ["a", "b"]),
        ("s-{000..009}.tar", ["s-{000..009}.tar"]),
        ("s-{a,b}.tar,t.tar", ["s-{a,b}.tar", "t.tar"]),
        ("[s-{0..1}.tar, t-{a,b}.tar]", ["s-{0..1}.tar", "t-{a,b}.tar"]),
        ("https://h/s.tar?sig=a,b&x=y", ["https://h/s.tar?sig=a,b&x=y"]),
        ("s3://a/s-{0..9}.tar,s3://b/t.tar", ["s3://a/s-{0..9}.tar", "s3://b/t.tar"]),
        ("2024", ["2024"]),
        ("1e3", ["1e3"]),
        ("null,no", ["null", "no"]),
        ("a b", ["a b"]),
        ("a: b", ["a: b"]),
        ("with,comma", ["with,comma"]),
        ("\u56fe\u7247", ["\u56fe\u7247"]),
    ],
)
@pytest.mark.parametrize("text", [PLAIN, ONE])
def test_a_path_is_a_source(load, tmp_path, word, urls, text):
    (tmp_path / "with,comma").touch()
    config = load(text, f"data.train={word}")
    assert config.data.train == [Source(urls=url) for url in urls]
    assert load(dump_config(config)).data.train == [Source(urls=url.replace("sig=a,b&x=y", "***")) for url in urls]


def test_sources_and_paths_mix_and_take_further_settings(load):
    config = load(PLAIN, "data.train=[{urls: a, weight: 2}, b]", "data.train.1.weight=1")
    assert config.data.train == [Source("a", 2.0), Source("b", 1.0)]
    assert load(ONE, "data.train=x", "data.train.0.captions=json:t").data.train == [Source("x", captions="json:t")]
    assert load(ONE, "data.train.0=x").data.train == [Source("x")]
    for text in ("data: {train: a}\n", "data: {train: [a]}\n", "data: {train: [{urls: a}]}\n"):
        assert load(PLAIN + text).data.train == [Source("a")]
    assert load(PLAIN + "init: runs/b\n", "data.train=x", kind=ClassifyConfig).data.train == [ImageSource("x")]


@pytest.mark.parametrize("word", ["", "[]", "  "])
def test_no_source_is_refused_with_the_word_to_use(load, word):
    with pytest.raises(UsageError, match=r"data\.train breaks its rule.*data\.train=FOLDER"):
        load(PLAIN, f"data.train={word}")


@pytest.mark.parametrize("loss", OF_PAIRS)
def test_a_batch_of_one_pair_is_refused_by_every_contrastive_loss(load, loss):
    with pytest.raises(UsageError, match=r"train\.global_batch breaks its rule; got 1; expected >= 2"):
        load(ONE, "train.global_batch=1", f"objectives.{loss}.weight=1")
    assert load(ONE, "train.global_batch=2", f"objectives.{loss}.weight=1").train.global_batch == 2
