"""Evaluating on what was trained on is remarked, however the shards are called."""

from __future__ import annotations

import shutil

from data_tools.corpus import open_corpus
from pretrain.evaluate.overlap import remark, training_corpus
from stream_corpora import write_corpus


def test_shards_are_known_again_by_their_content(tmp_path):
    for name in ("train", "other"):
        (tmp_path / name).mkdir()
    train = write_corpus(tmp_path / "train", [5, 6])
    fresh = write_corpus(tmp_path / "other", [7])
    copy = tmp_path / "other" / "renamed.tar"
    shutil.copy(train.paths[1], copy)
    assert remark("val", fresh, train) is None
    assert remark("val", fresh, None) is None
    mixed = open_corpus([fresh.paths[0], str(copy)])
    assert "1 of 2 shards of val were trained on" in remark("val", mixed, train)
    assert "2 of 2 shards of a b were trained on" in remark("a\nb", train, train)


def test_a_run_folder_says_what_it_was_trained_on_and_anything_else_says_nothing(tmp_path):
    train = write_corpus(tmp_path, [5])
    run = tmp_path / "run"
    run.mkdir()
    assert training_corpus(run) is None
    (run / "config.yaml").write_text(f"data: {{train: [{{urls: {train.paths[0]}}}]}}")
    assert training_corpus(run).digest == train.digest
    for text in ("data: {train: [{urls: 's3://b/s.tar'}]}", f"data: {{train: [{{urls: {tmp_path}/none}}]}}", "a: [",
                 "data: 3", "- 1", "data: {train: [a]}", "\x00"):  # fmt: skip
        (run / "config.yaml").write_text(text)
        assert training_corpus(run) is None
