"""Runs with other losses than InfoNCE: the same on any number of ranks and resumed, exported, warned of their start."""

import contextlib
import io
import json

import open_clip
import pytest
from safetensors.torch import load_file

import runs
from packing import data_tools
from pretrain.config.reading import load_config
from pretrain.export import cli as export_cli
from pretrain.job import Job
from pretrain.process.runtime import start
from pretrain.tasks import ContrastiveConfig
from ranks import run_ranks
from training import train

LOSSES = {
    "sigmoid": ["objectives=sigmoid"],
    "multi_positive": ["objectives={multi_positive: {label_smoothing: 0.1, learn_temperature: false}}"],
    "margin": ["objectives.margin.negatives=hardest"],
    "several": ["objectives={infonce: {}, sigmoid: {weight: 0.01}, margin: {weight: 0.5}}"],
}
BIASED = ("sigmoid", "several")
PLAIN = ["data.workers=0", "evaluators={}", "optim.schedule=constant"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Shards with one sample for each (image, caption), so that images come twice."""
    folder = runs.make_workspace(tmp_path_factory.mktemp("workspace"))
    data_tools("pack", folder / "table.jsonl", folder / "pairs", "--pairs", "--samples-per-shard", "20")
    return folder


def trained(rank, world_size, workspace, run_dir, words):
    """Runs to the end; returns what rank 0 printed."""
    words = [f"data.train.0.urls={workspace / 'pairs'}", f"run.dir={run_dir}", *PLAIN, *words]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        config = load_config(ContrastiveConfig, workspace / "config.yaml", words)
        assert train(Job(config, start(distributed=True))) == 0
    return printed.getvalue()


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_one_rank(workspace, name):
    """Two ranks at ZeRO 3 with the gradient cache, stopped and resumed, against one rank in one go."""
    words = [*LOSSES[name], "optim.warmup=0 steps"]
    one, two = workspace / f"{name}-one", workspace / f"{name}-two"
    run_ranks(1, trained, workspace, one, [*words, "train.duration=4 steps"])
    for duration in ("2 steps", "4 steps"):
        more = [f"train.duration={duration}", "train.zero_stage=3", "train.micro_batch=4"]
        run_ranks(2, trained, workspace, two, [*words, *more])
    assert runs.losses(two) == pytest.approx(runs.losses(one), rel=1e-5)
    logged = runs.rows(two, "train")
    assert all(("logit_bias" in row) == (name in BIASED) for row in logged)
    assert (len({row["logit_scale"] for row in logged}) > 1) == (name in BIASED)
    if name == "several":
        sums = [row["loss_infonce"] + 0.01 * row["loss_sigmoid"] + 0.5 * row["loss_margin"] for row in logged]
        assert sums == pytest.approx([row["loss"] for row in logged], rel=1e-4)


def test_a_sigmoid_run_is_exported_with_its_bias(workspace, tmp_path):
    run_ranks(1, trained, workspace, tmp_path / "run", ["objectives=sigmoid", "train.duration=2 steps"])
    assert export_cli.main([str(tmp_path / "run"), str(tmp_path / "out"), "--formats", "open_clip"]) == 0
    model, *_ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    weights = load_file(next((tmp_path / "out").glob("open_clip*.safetensors")))
    assert model.logit_bias.item() == weights["logit_bias"].item() != 0
    assert weights["logit_bias"].shape == ()


def test_a_clip_model_goes_on_under_the_sigmoid_loss(workspace, tmp_path):
    """Its weights have no bias: that is said, the scale starts anew with it, and a bias far from fitting is doubted."""
    words = ["objectives.infonce.temperature=0.05", "train.duration=2 steps"]
    run_ranks(1, trained, workspace, tmp_path / "clip", words)
    assert export_cli.main([str(tmp_path / "clip"), str(tmp_path / "out"), "--formats", "open_clip"]) == 0
    weights = next((tmp_path / "out").glob("open_clip*.safetensors"))
    words = ["objectives=sigmoid", f"model.init={weights}", "train.duration=2 steps"]
    first, other = (
        run_ranks(1, trained, workspace, tmp_path / name, [*words, *more])[0]
        for name, more in (("fitting", []), ("far", ["objectives.sigmoid.logit_bias=-10"]))
    )
    assert "missing and left as built: logit_bias" in first
    assert "warning" not in first
    assert "logit_bias=-10 suits a global batch of 22,026, this one is 16" in other
    assert runs.rows(tmp_path / "fitting", "train")[0]["logit_scale"] == pytest.approx(10, rel=0.01)
    assert (
        json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["model_cfg"].get("init_logit_bias") is None
    )
