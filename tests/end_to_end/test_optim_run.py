"""Whole runs with a tower that is locked at first, a rate that cools down, a moving average, another optimizer."""

import math

import pytest
import torch
from safetensors.torch import load_file

import runs
from data_tools.errors import UserError
from pretrain.config.reading import load_config
from pretrain.engine.weights import load_trained
from pretrain.evaluate import cli as evaluate_cli
from pretrain.evaluate.results import read_records
from pretrain.export import cli as export_cli
from pretrain.job import Job
from pretrain.process.runtime import start
from pretrain.tasks import ClassifyConfig, ContrastiveConfig
from pretrain.tasks.classify import build_classifier
from pretrain.towers.parts import tower_of
from ranks import RankError, run_ranks
from training import train

PLAIN = ["data.workers=0", "evaluators={}", "optim.schedule=constant"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return runs.make_workspace(tmp_path_factory.mktemp("workspace"))


def trained(rank, world_size, path, words):
    config = load_config(ContrastiveConfig, path, [*PLAIN, *words])
    assert train(Job(config, start(distributed=True))) == 0


def test_a_locked_tower_keeps_its_weights_until_it_is_unlocked(workspace, tmp_path):
    """At another stage and on more ranks, though its optimizer states are not in the checkpoint."""
    config, run, out = workspace / "config.yaml", tmp_path / "run", tmp_path / "out"
    run_ranks(1, trained, config, [f"run.dir={tmp_path / 'first'}", "train.duration=1 steps"])
    assert export_cli.main([str(tmp_path / "first"), str(out), "--formats", "open_clip"]) == 0
    before = load_file(next(out.glob("open_clip*.safetensors")))
    words = [f"run.dir={run}", f"model.init={next(out.glob('open_clip*.safetensors'))}", "optim.warmup=0 steps"]
    run_ranks(1, trained, config, [*words, "train.duration=2 steps", "model.locked=[image]", "train.zero_stage=1"])
    assert changed(run, before) == {"text", "logits"}
    run_ranks(2, trained, config, [*words, "train.duration=4 steps", "train.zero_stage=3"])
    assert changed(run, before) == {"image", "text", "logits"}


def changed(run, before):
    """The parts of the newest checkpoint's model that are not as `before`."""
    now = load_trained(run).clip.state_dict()
    return {
        tower_of(f"clip.{name}") for name in now if not torch.equal(now[name].reshape(before[name].shape), before[name])
    }


def test_the_rate_cools_down_to_the_end(workspace, tmp_path):
    words = [f"run.dir={tmp_path / 'run'}", "optim.lr=1e-3", "optim.warmup=2 steps", "optim.cooldown=2 steps"]
    run_ranks(1, trained, workspace / "config.yaml", [*words, "train.duration=6 steps"])
    rates = [row["lr"] for row in runs.rows(tmp_path / "run", "train")]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3 * (1 - math.sqrt(1 / 2))])


def test_the_moving_average_is_exported_and_evaluated(workspace, tmp_path):
    run, results = tmp_path / "run", tmp_path / "results.jsonl"
    words = [f"run.dir={run}", "optim.ema=0.9", "train.duration=3 steps", "train.zero_stage=3", "model.text_buckets=1"]
    run_ranks(2, trained, workspace / "config.yaml", [*words, f"evaluators.retrieval.data={workspace / 'shards'}"])
    weights = {}
    for name, words in (("raw", []), ("average", ["--ema"])):
        assert export_cli.main([str(run), str(tmp_path / name), "--formats", "open_clip", *words]) == 0
        weights[name] = load_file(next((tmp_path / name).glob("open_clip*.safetensors")))
        task = ["--task", "retrieval", "--data", str(workspace / "shards"), "--workers", "0"]
        assert evaluate_cli.main(["--model", str(run), *task, "--output", str(results), *words]) == 0
    want = load_trained(run, ema=True).export_state()
    assert all(torch.equal(weights["average"][name], value) for name, value in want.items())
    assert any(not torch.equal(weights["raw"][name], value) for name, value in want.items())
    raw, average = read_records(results)
    assert raw["model"]["digest"] != average["model"]["digest"]
    assert (raw["model"]["ema"], average["model"]["ema"]) == (False, True)
    (during,) = runs.rows(run, "eval")
    for name in average["metrics"]:
        assert during[name] == pytest.approx(raw["metrics"][name], rel=1e-5)
        assert during[f"ema_{name}"] == pytest.approx(average["metrics"][name], rel=1e-5)
    assert during["validation_loss"] != pytest.approx(during["ema_validation_loss"], rel=1e-4)
    classifier, _ = build_classifier(
        ClassifyConfig(init=str(run), init_ema=True), ("cat", "dog"), start(distributed=False)
    )
    tuned = classifier.towers.export_state()
    assert all(torch.equal(tuned[name], value) for name, value in want.items())
    cards = [(tmp_path / name / "README.md").read_text() for name in ("raw", "average")]
    assert ["exponential moving average" in card for card in cards] == [False, True]
    assert all("text_to_image_recall@1" in card and "ema_" not in card for card in cards)


@pytest.mark.parametrize(
    ("name", "rate", "stages", "states"),
    [
        ("lion", 1e-4, (1, 3), "exp_avg"),
        ("lamb", 1e-2, (0, 0), "exp_avg, exp_avg_sq"),
        ("muon", 1e-3, (0, 0), "exp_avg, exp_avg_sq, momentum_buffer"),
    ],
)
def test_it_is_resumed_and_another_optimizer_refused(workspace, tmp_path, name, rate, stages, states):
    """Stopped and resumed on other ranks, Lion at another stage too, as if it had not been."""
    words = [f"optim.name={name}", f"optim.lr={rate}", "optim.warmup=0 steps"]
    one, two = tmp_path / "one", tmp_path / "two"
    whole = ["train.duration=4 steps", f"train.zero_stage={stages[0]}"]
    run_ranks(1, trained, workspace / "config.yaml", [*words, f"run.dir={one}", *whole])
    for ranks, duration, stage in zip((1, 2), (2, 4), stages, strict=True):
        more = [f"run.dir={two}", f"train.duration={duration} steps", f"train.zero_stage={stage}"]
        run_ranks(ranks, trained, workspace / "config.yaml", [*words, *more])
    assert runs.losses(two) == pytest.approx(runs.losses(one), rel=1e-4)
    other = "lion" if name != "lion" else "adamw"
    last = [f"optim.name={other}", f"run.dir={two}", "train.duration=6 steps", "train.zero_stage=1"]
    with pytest.raises(RankError, match=f"was trained with another optimizer; got its states are {states}; expected"):
        run_ranks(1, trained, workspace / "config.yaml", last)


def test_a_cooldown_longer_than_the_run_is_refused(workspace, tmp_path):
    words = [f"run.dir={tmp_path / 'run'}", "optim.cooldown=9 steps", "train.duration=6 steps"]
    with pytest.raises(RankError, match="longer than the run; got 32 and 144 samples of 96") as caught:
        run_ranks(1, trained, workspace / "config.yaml", words)
    assert UserError.__name__ in str(caught.value)
