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
from pretrain import assemble
from pretrain.config import PretrainConfig
from pretrain.runtime import Runtime, start
from pretrain.settings import load_config
from pretrain.towers.spec import resolve_spec
from stream_corpora import picture, write_corpus


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
    config = load_config(PretrainConfig, workspace / "config.yaml")
    cpu = start(distributed=False)
    for rank in range(world_size):
        runtime = Runtime(rank, world_size, 0, cpu.device, 1)
        sources = assemble.train_sources(config.data)
        spec = resolve_spec(config.model.name)
        with assemble.train_stream(config, sources, spec, "caption", runtime, look_only=True) as stream:
            yield next(islice(stream.iterate(0), step - 1, None)).keys


def test_the_keys_are_those_that_training_takes(workspace):
    step = 6  # past an epoch of the second source
    rows = [
        line.split("\t") for line in inspect(workspace, "--step", str(step), "--world-size", "3", "--keys").splitlines()
    ]
    assert [row[:2] for row in rows] == [[str(rank), str(n)] for rank in range(3) for n in range(8)]
    assert [row[4] for row in rows] == [key for keys in trained(workspace, step, 3) for key in keys]
    assert {(row[2], row[3]) for row in rows} <= {
        ("0", str(workspace / "a" / "s-000000.tar")),
        ("0", str(workspace / "a" / "s-000001.tar")),
        ("1", str(workspace / "b" / "s-000000.tar")),
    }
    one = inspect(workspace, "--step", str(step), "--world-size", "3", "--rank", "1", "--keys")
    assert [line.split("\t") for line in one.splitlines()] == rows[8:16]


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
    ],
)
def test_usage_faults(workspace, words, message):
    assert message in inspect(workspace, *words, code=2)
