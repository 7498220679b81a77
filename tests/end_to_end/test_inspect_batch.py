"""`launch/inspect_batch.py`: the samples of a step, the very ones that training takes."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice

import pytest
import yaml

import tiny
from packing import ROOT
from pretrain.config.reading import load_config
from pretrain.process.runtime import Runtime, start
from pretrain.stream.sources import train_sources, train_stream
from pretrain.tasks import ClassifyConfig, ContrastiveConfig
from pretrain.tasks.classify import label_fields
from pretrain.tasks.contrastive import pair_fields
from pretrain.towers.spec import resolve_spec
from stream_corpora import picture, write_corpus

SIX = ("--step", "6", "train.duration=2 epochs")  # past an epoch of the second source


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    for name, counts in (("a", [40, 40]), ("b", [40])):
        (folder / name).mkdir()
        write_corpus(folder / name, counts, {30: {"jpg": picture(30)[:150]}} if name == "a" else None)
    (folder / "tiny.json").write_text(json.dumps(tiny.MODEL_CFG))
    config = {
        "run": {"dir": str(folder / "run")},
        "data": {
            "train": [
                {"urls": str(folder / "a" / "s-{000000..000001}.tar"), "weight": 2},
                {"urls": str(folder / "b" / "s-000000.tar"), "weight": 1, "captions": "txt"},
            ],
            "window": 8,
        },
        "model": {"name": str(folder / "tiny.json")},
        "train": {"global_batch": 24},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def inspect(workspace, *words, code=0):
    command = [sys.executable, str(ROOT / "launch" / "inspect_batch.py"), "--config", str(workspace / "config.yaml")]
    done = subprocess.run([*command, *words], cwd="/", capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def trained(workspace, step, world_size):
    """(key, shard name) of every rank's samples at `step`, as the training stream delivers them."""
    config = load_config(ContrastiveConfig, workspace / "config.yaml")
    cpu = start(distributed=False)
    for rank in range(world_size):
        runtime = Runtime(rank, world_size, 0, cpu.device, 1)
        sources = train_sources(config.data)
        fields = pair_fields(config, resolve_spec(config.model.name))
        with train_stream(config, sources, fields, runtime, inspect_only=True) as stream:
            yield next(islice(stream.iterate(0), step - 1, None)).keys


def test_the_keys_are_those_that_training_takes(workspace):
    step = 6
    rows = [line.split("\t") for line in inspect(workspace, *SIX, "--world-size", "3", "--keys").splitlines()]
    assert [row[:2] for row in rows] == [[str(rank), str(n)] for rank in range(3) for n in range(8)]
    assert [row[4] for row in rows] == [key for keys in trained(workspace, step, 3) for key in keys]
    assert {(row[2], row[3]) for row in rows} <= {
        ("0", str(workspace / "a" / "s-000000.tar")),
        ("0", str(workspace / "a" / "s-000001.tar")),
        ("1", str(workspace / "b" / "s-000000.tar")),
    }
    one = inspect(workspace, *SIX, "--world-size", "3", "--rank", "1", "--keys")
    assert [line.split("\t") for line in one.splitlines()] == rows[8:16]


def test_the_batches_of_a_fine_tune_are_shown_with_their_classes(workspace):
    tree = yaml.safe_load((workspace / "config.yaml").read_text())
    own = {"task": "classify", "init": tree.pop("model")["name"], "random": True, "classes": ["ant", "bee", "cow"]}
    tree["data"]["train"] = [{"urls": tree["data"]["train"][0]["urls"]}]
    path = workspace / "finetune.yaml"
    path.write_text(yaml.safe_dump(tree | own))
    config = load_config(ClassifyConfig, path)
    fields = label_fields(config, tiny.SPEC, 3)
    with train_stream(
        config, train_sources(config.data), fields, start(distributed=False), inspect_only=True
    ) as stream:
        batch = next(stream.iterate(0))
    keys = inspect(workspace, "--config", str(path), "--step", "1", "--keys").splitlines()
    assert [line.split("\t")[4] for line in keys] == batch.keys
    names = [own["classes"][number] for number in batch.inputs["label"]["class"].tolist()]
    said = inspect(workspace, "--config", str(path), "--step", "1").splitlines()[1:]
    assert len(set(names)) == 3
    assert all(f"{name!r}" in line for name, line in zip(names, said, strict=True))
    page = workspace / "finetune.html"
    inspect(workspace, "--config", str(path), "--step", "1", "--html", str(page))
    assert page.read_text().count("<img") == 24


def test_a_page_shows_pictures_captions_and_replacements(workspace):
    for step in range(1, 6):  # the bad sample is in one of an epoch's steps
        page = workspace / f"step-{step}.html"
        text = inspect(workspace, "--step", str(step))
        assert inspect(workspace, "--step", str(step), "--html", str(page)).strip() == str(page)
        html = page.read_text()
        assert html.count("<img") == 24
        assert html.count("class=r") == text.count("in place of a bad sample")
        if "1 in place of bad ones" in text.splitlines()[0]:
            break
    else:
        pytest.fail("no step replaced the bad sample")
    assert not (workspace / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "0"], "--step is not positive; got 0"),
        (["--step", "1", "--world-size", "2", "--rank", "2"], "--rank does not fit --world-size; got 2"),
        (["--step", "1", "--world-size", "5"], "24 is not divisible by the world size"),
        (["--step", "6"], "--step is beyond the end of the run; got 6; expected 1 to 5"),
    ],
)
def test_usage_faults(workspace, words, message):
    assert message in inspect(workspace, *words, code=2)


KEYS = ["half\ud800", "\x1b[2Jclear", "a\nb\tc\r", "\u202eturned", "x" * 5000]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A corpus whose captions a terminal would obey or could not write."""
    folder = tmp_path_factory.mktemp("odd")
    captions = {n: {"json": json.dumps({"captions": [KEYS[n % 5]]}).encode(), "txt": None} for n in range(24)}
    write_corpus(folder, [24], captions)
    (folder / "tiny.json").write_text(json.dumps(tiny.MODEL_CFG))
    config = {
        "run": {"dir": str(folder / "run")},
        "data": {"train": [{"urls": str(folder / "s-000000.tar")}], "window": 8},
        "model": {"name": str(folder / "tiny.json")},
        "train": {"global_batch": 24},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_captions_that_no_terminal_takes_are_shown_short_and_harmless(odd):
    page = odd / "page.html"
    text = inspect(odd, "--step", "1")
    inspect(odd, "--step", "1", "--html", str(page))
    assert len(text.splitlines()) == 25
    assert max(map(len, text.splitlines())) < 500
    for shown in (text, page.read_text(encoding="utf-8")):
        assert not set(shown) & set("\x1b\r\u202e")
        assert "half" in shown
        assert "x" * 400 not in shown


def test_a_reader_that_leaves_ends_it_without_a_word(odd):
    script = f"{sys.executable} {ROOT}/launch/inspect_batch.py --config {odd}/config.yaml --step 1 --keys | head -n 1"
    done = subprocess.run(["bash", "-c", script], cwd="/", capture_output=True, text=True, timeout=120)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")
