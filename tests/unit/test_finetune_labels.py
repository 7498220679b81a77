"""What a fine-tune may learn from: class names of foreign tars, labels that differ, a plan that says it all."""

from __future__ import annotations

import io
import json
import tarfile
import unicodedata

import pytest
import torch
import webdataset
import yaml

import tiny
from data_tools.corpus import open_corpus
from data_tools.errors import UsageError, UserError
from pretrain import cli
from pretrain.config.reading import load_config
from pretrain.evaluate.classes import class_numbers, renumber
from pretrain.process.runtime import start
from pretrain.stream.loader import StreamSource
from pretrain.tasks import ClassifyConfig
from pretrain.tasks.labels import check_labels, read_classes, set_classes
from stream_corpora import picture


def foreign_tar(path, labels):
    """A tar as another tool writes it: jpg and cls, no index, no names."""
    with webdataset.TarWriter(str(path)) as writer:
        for number, label in enumerate(labels):
            writer.write({"__key__": f"{number:05d}", "jpg": picture(number), "cls": label})
    return path


def config_file(folder, urls, **changes):
    arch = folder / "tiny.json"
    arch.write_text(json.dumps(tiny.MODEL_CFG))
    tree = {
        "init": str(arch),
        "random": True,
        "run": {"dir": str(folder / "run")},
        "data": {"train": [{"urls": str(urls)}], "workers": 0, "window": 8},
        "train": {"duration": "2 steps", "global_batch": 4},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree | changes))
    return path


@pytest.fixture
def labelled(tmp_path):
    return foreign_tar(tmp_path / "f-000.tar", [number % 3 for number in range(12)])


def test_names_for_a_foreign_tar_come_as_a_list_a_file_or_a_count(tmp_path, labelled):
    file = tmp_path / "names.txt"
    file.write_text("cat\ndog\nred bus\n")
    path = config_file(tmp_path, labelled)
    given = {"classes=[cat, dog, red bus]": 3, f"classes={file}": 3, "classes=3": 3, "classes=[0, 1, 2]": 3}
    found = [read_classes(load_config(ClassifyConfig, path, [word]).classes) for word in given]
    assert found == [("cat", "dog", "red bus")] * 2 + [("0", "1", "2")] * 2
    source = StreamSource(open_corpus(labelled))
    (named,) = set_classes([source], found[0])
    assert named.corpus.classes == found[0]
    assert named.corpus.digest == source.corpus.digest


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (None, "the training corpus names no classes"),
        (["cat"], "has one class, so there is nothing to learn"),
        (1, "has one class, so there is nothing to learn"),
        (["cat", "cat"], "has a name twice"),
        ("nowhere.txt", "class file nowhere.txt cannot be read"),
    ],
)
def test_settings_that_name_no_classes_are_refused(labelled, setting, message):
    with pytest.raises(UserError, match=message):
        set_classes([StreamSource(open_corpus(labelled))], setting)


def test_yaml_words_that_are_no_names_are_refused(tmp_path, labelled):
    for word in ("classes=[yes, no]", "classes=true", "classes=1.5", "classes=[a, null]", "classes={a: 1}"):
        with pytest.raises(UsageError, match="classes breaks its rule"):
            load_config(ClassifyConfig, config_file(tmp_path, labelled), [word])


@pytest.mark.parametrize("at", [None, 0, 7, 599])
def test_equal_labels_are_found_wherever_the_other_one_stands(tmp_path, at):
    """600 samples: more than are looked at all over the corpus, so one rare label is found by reading on."""
    labels = [1 + (number == at) for number in range(600)]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number, label in enumerate(labels):
            for name, data in ((f"{number:04d}.jpg", b"not looked at"), (f"{number:04d}.cls", str(label).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    sources = set_classes([StreamSource(open_corpus(tmp_path / "x.tar"))], 3)
    if at is not None:
        check_labels(sources, start(distributed=False))
        return
    with pytest.raises(UserError, match=r"all labels .* are equal.* label 1 \(1\) in all of 600 samples"):
        check_labels(sources, start(distributed=False))


def test_a_batch_of_one_image_is_refused(tmp_path, labelled):
    with pytest.raises(UsageError, match=r"train\.global_batch breaks its rule; got 1"):
        load_config(ClassifyConfig, config_file(tmp_path, labelled), ["train.global_batch=1"])


def test_classes_are_matched_by_name():
    known = ("cat", "dog", unicodedata.normalize("NFC", "caf\u00e9"))
    numbers = class_numbers((unicodedata.normalize("NFD", "caf\u00e9"), "cat"), known, "shards")
    assert numbers.tolist() == [2, 0]
    labels = torch.tensor([0, 1, 1, 2, -1])
    assert renumber(labels, numbers).tolist() == [2, 0, 0, -1, -1]
    assert renumber(labels, None) is labels
    with pytest.raises(UserError, match=r"got 1 of 2: Dog; .*is Dog the model's dog\?"):
        class_numbers(("cat", "Dog"), known, "shards")
    with pytest.raises(UserError) as caught:
        class_numbers(("x" * 5000, "a\nb\x1b[31m"), known, "shards")
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def test_the_dry_run_says_what_would_run_and_leaves_nothing(tmp_path, labelled, capsys):
    words = ["--config", str(config_file(tmp_path, labelled)), "--dry-run", "classes=[cat, dog, red bus]"]
    before = sorted(tmp_path.iterdir())
    assert cli.finetune(words) == 0
    out = capsys.readouterr().out
    for said in ("12 samples in 1 shards", "2 steps, 8 samples", "classes:  3: cat, dog, red bus", "head of 3 classes"):
        assert said in out
    model = tiny.build()
    size = sum(p.numel() for p in model.parameters()) + 3 * 24
    learning = sum(p.numel() for p in model.clip.visual.parameters()) + 3 * 24
    assert f"{size:,} parameters, {learning:,} of them learn" in out
    assert "activations of a micro-batch" in out
    assert "GiB per rank, total" in out
    assert {path.name for path in tmp_path.iterdir()} - {path.name for path in before} == {"f-000.idx"}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 1, "names no classes"),
        (("classes=2",), 1, "labels without a class name; got label 2, and 2 classes: 0, 1"),
        (("classes=5",), 0, ""),
        (("classes=3", "init=nowhere", "random=false"), 1, "nowhere"),
        (("classes=3", "evaluators.classification.data=none.tar"), 1, "none.tar"),
        (("classes=3", "train.global_batch=64"), 1, "batch"),
    ],
)
def test_the_dry_run_meets_the_faults_of_the_start(tmp_path, labelled, capsys, words, code, message):
    found = cli.finetune(["--config", str(config_file(tmp_path, labelled)), "--dry-run", *words])
    assert (found, True) == (code, message in capsys.readouterr().err)
