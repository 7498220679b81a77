"""Pairs and texts alone in one run: InfoNCE counts the pairs that are there, masked words all texts."""

import contextlib
import io

import open_clip
import pytest
import torch
from safetensors.torch import load_file

import runs
import tiny
from data_tools.format.writer import write_shard
from pretrain.config.reading import load_config
from pretrain.export import cli as export_cli
from pretrain.job import Job
from pretrain.process.runtime import start
from pretrain.tasks import ContrastiveConfig
from ranks import run_ranks
from training import train

TEXTS = 40
PLAIN = ["data.workers=0", "evaluators={}", "optim.schedule=constant"]
WORDS = ["objectives={infonce: {}, mlm: {weight: 0.5}}", "fields={masked_text: {share: 0.4}}", "optim.warmup=0 steps"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Beside the shards of pairs one of texts without images."""
    folder = runs.make_workspace(tmp_path_factory.mktemp("workspace"))
    (folder / "texts").mkdir()
    texts = [" ".join(tiny.WORDS[(n * k + 3) % len(tiny.WORDS)] for k in range(1, 9)) for n in range(TEXTS)]
    write_shard(folder / "texts" / "t-000000.tar", [(f"t{n:03d}", {"txt": t.encode()}) for n, t in enumerate(texts)])
    return folder


def trained(rank, world_size, workspace, run_dir, words):
    """Runs to the end; returns what was printed."""
    sources = f"data.train=[{{urls: {workspace / 'shards'}}}, {{urls: {workspace / 'texts'}}}]"
    words = [f"run.dir={run_dir}", sources, "data.optional=[image]", *PLAIN, *WORDS, *words]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        config = load_config(ContrastiveConfig, workspace / "config.yaml", words)
        assert train(Job(config, start(distributed=True))) == 0
    return printed.getvalue()


def weights(run_dir):
    """Every tensor of the newest checkpoint, optimizer states too."""
    newest = max((run_dir / "checkpoints").glob("step-*"))
    return {
        f"{path.name}: {name}": value
        for path in sorted(newest.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def test_a_run_is_the_same_on_two_ranks_and_resumed_bit_for_bit(workspace, tmp_path):
    sharded = ["train.zero_stage=3", "train.micro_batch=4"]
    (said,) = run_ranks(1, trained, workspace, tmp_path / "one", ["train.duration=4 steps"])
    run_ranks(2, trained, workspace, tmp_path / "straight", [*sharded, "train.duration=4 steps"])
    for duration in ("2 steps", "4 steps"):
        run_ranks(2, trained, workspace, tmp_path / "stopped", [*sharded, f"train.duration={duration}"])
    assert runs.losses(tmp_path / "straight") == pytest.approx(runs.losses(tmp_path / "one"), rel=1e-5)
    straight, stopped = (runs.rows(tmp_path / name, "train") for name in ("straight", "stopped"))
    for name in ("loss", "loss_infonce", "loss_mlm"):
        assert [row[name] for row in straight] == [row[name] for row in stopped]
    for row in straight:
        assert row["loss"] == pytest.approx(row["loss_infonce"] + 0.5 * row["loss_mlm"], rel=1e-5)
    kept, again = weights(tmp_path / "straight"), weights(tmp_path / "stopped")
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    assert any("heads.words" in name for name in kept)
    assert said.count("sees only what stands before it") == 1


def test_what_is_exported_is_the_towers(workspace, tmp_path):
    words = ["train.duration=1 steps", "heads={words: {tied: true}}"]
    run_ranks(1, trained, workspace, tmp_path / "run", words)
    assert export_cli.main([str(tmp_path / "run"), str(tmp_path / "out"), "--formats", "open_clip"]) == 0
    model, *_ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    found = load_file(next((tmp_path / "out").glob("open_clip*.safetensors")))
    assert found.keys() == model.state_dict().keys()
