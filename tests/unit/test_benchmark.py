"""The benchmark: what it reads from the two trainers, what it makes of it, and that both sides train the same."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_tools.errors import UserError
from launch.benchmark import cli, environment, report, throughput, train, trainers
from launch.benchmark.trainers import Layout, Outcome, Trial
from micro_trial import micro_trial
from pretrain.process import precision

OURS = {name: importlib.metadata.version(name).partition("+")[0] for name in ("torch", "torchvision")}
FITTING = {"open_clip_torch": "3.3.0", "webdataset": "0.2.86", **OURS}


@pytest.fixture(scope="module")
def trial(tmp_path_factory) -> Trial:
    return micro_trial(tmp_path_factory.mktemp("benchmark"))


# ---- the peer's environment -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"torch": OURS["torch"] + "+cpu"}, None),
        ({"webdataset": None}, "webdataset missing"),
        ({"webdataset": "0.2.100"}, "too new"),
        ({"webdataset": "1.0.2"}, "too new"),
        ({"open_clip_torch": "3.2.0"}, "wanted 3.3.0"),
        ({"torch": "2.0.0"}, "ours is"),
    ],
)
def test_an_environment_that_does_not_fit_is_noticed(change, fault):
    faults = environment._faults(FITTING | change)
    assert (fault is None and not faults) or (len(faults) == 1 and fault in faults[0])


def test_versions_are_asked_of_the_other_interpreter():
    found = environment.peer_versions(Path(sys.executable))
    assert found["torch"] == importlib.metadata.version("torch")
    assert environment.peer_versions(Path("false")) == dict.fromkeys(FITTING)


# ---- reading the trainers' logs -------------------------------------------------------------------------------------

_LINE = (
    "2026-11-22,16:01:02 | INFO | Train Epoch: 0 [ 256/3072 (8%)] Data (t): 1.500 Batch (t): 12.527, 20.4358/s, "
    "20.4358/s/gpu LR: 0.000100 Logit Scale: 14.286 Contrastive_loss: 5.6050 (5.6050) Loss: 5.6050 (5.6050)\n"
)


def test_steps_are_read_from_open_clips_log(trial, tmp_path, monkeypatch):
    def write_log(name, command, variables, folder, limit):
        (folder / "run").mkdir()
        (folder / "run" / "out.log").write_text("Model:\n" + _LINE * 3)
        assert variables == {"OMP_NUM_THREADS": "2"}

    monkeypatch.setattr(trainers, "run_logged", write_log)
    outcome = trainers.run_open_clip(trial, Layout(1, 2, "fp32"), tmp_path / "run", 1, Path("python"))
    assert outcome.losses == (5.605,) * 3
    assert outcome.samples_per_second(8, skip=1) == pytest.approx(20.4358)


def test_steps_are_read_from_our_metrics(trial, tmp_path, monkeypatch):
    def write_metrics(name, command, variables, folder, limit):
        (folder / "run").mkdir()
        rows = [{"kind": "train", "seconds": seconds, "loss": 4.0} for seconds in (5.0, 6.0, 8.0)]
        rows.insert(2, {"kind": "eval", "seconds": 7.0})
        (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert "--num_accelerators" in command

    monkeypatch.setattr(trainers, "run_logged", write_metrics)
    outcome = trainers.run_ours(trial, Layout(2, 1, "fp32"), tmp_path / "run", 1)
    assert outcome.step_seconds == (5.0, 1.0, 2.0)
    assert outcome.samples_per_second(8, skip=1) == pytest.approx(16 / 3)


def test_a_training_with_missing_steps_is_refused(trial, tmp_path):
    short = Outcome("open_clip", Layout(1, 1, "fp32"), tmp_path, (1.0,), (4.0,))
    with pytest.raises(UserError, match=r"1 logged steps.*expected 3 steps"):
        trainers._checked(trial, short)
    with pytest.raises(UserError, match="finite losses"):
        trainers._checked(trial, replace(short, step_seconds=(1.0,) * 3, losses=(4.0, float("nan"), 4.0)))


@pytest.mark.parametrize(
    ("code", "got"), [("exit 3", "exit code 3, last line: oh no"), ("sleep 60", "no end after 1 s")]
)
def test_a_failed_training_says_how_it_ended(tmp_path, code, got):
    with pytest.raises(UserError, match=got):
        trainers.run_logged("training by open_clip", ["bash", "-c", f"echo oh no; {code}"], {}, tmp_path, 1)


def test_our_settings_are_a_valid_config_and_theirs_say_the_same(trial, tmp_path):
    from pretrain.config.reading import load_config
    from pretrain.tasks import ContrastiveConfig

    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(trainers._our_settings(trial, Layout(2, 1, "bf16"), tmp_path)))
    config = load_config(ContrastiveConfig, path)
    theirs = trainers._their_arguments(trial, Layout(2, 1, "bf16"), tmp_path)
    said = dict(zip(theirs[1:-2:2], theirs[2:-2:2], strict=True))
    assert float(said["--lr"]) == config.optim.lr
    assert float(said["--wd"]) == config.optim.weight_decay
    assert (float(said["--beta1"]), float(said["--beta2"])) == tuple(config.optim.betas)
    assert float(said["--eps"]) == config.optim.eps
    assert int(said["--batch-size"]) * 2 == config.train.global_batch
    assert config.train.duration == "3 steps"
    assert (config.train.precision, said["--precision"]) == ("bf16", "amp_bf16")
    assert said["--train-num-samples"] == "24"


# ---- figures --------------------------------------------------------------------------------------------------------


def test_medians_ranges_and_ratios(tmp_path):
    def outcome(trainer: str, seconds: float) -> Outcome:
        return Outcome(trainer, Layout(1, 1, "fp32"), tmp_path, (100.0, seconds, seconds), (1.0,) * 3)

    seconds = [(1.0, 2.0), (2.0, 2.0), (0.5, 4.0)]
    results = [(outcome("dualstream", ours), outcome("open_clip", theirs)) for ours, theirs in seconds]
    figures = throughput.summary(results, global_batch=8, skip=1)
    assert figures["dualstream"] == {"median": 8.0, "min": 4.0, "max": 16.0}
    assert figures["open_clip"] == {"median": 4.0, "min": 2.0, "max": 4.0}
    assert figures["ratio_of_medians"] == 2.0
    assert figures["ratio_per_pair"] == {"median": 2.0, "min": 1.0, "max": 8.0}


def test_pairs_alternate_their_order(trial, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(throughput, "run_ours", lambda *_: ran.append("ours"))
    monkeypatch.setattr(throughput, "run_open_clip", lambda *_: ran.append("theirs"))
    bench = throughput.Bench(tmp_path, Path("python"), lambda text: None, 60)
    throughput.alternate(bench, trial, Layout(1, 1, "fp32"), Layout(1, 1, "fp32"), 3)
    assert ran == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]


def test_the_probe_picks_the_peers_faster_layout_and_precision(trial, tmp_path, monkeypatch):
    seconds = {(1, "fp32"): 2.0, (2, "fp32"): 1.0, (1, "bf16"): 4.0, (2, "bf16"): 0.5}

    def run(probe, layout, folder, limit, python):
        took = (seconds[layout.ranks, layout.precision],) * probe.steps_per_epoch
        return Outcome("open_clip", layout, folder, took, ())

    monkeypatch.setattr(throughput, "run_open_clip", run)
    bench = throughput.Bench(tmp_path, Path("python"), lambda text: None, 60)
    layouts = [Layout(ranks, 1, precision) for ranks, precision in seconds]
    best, rates = throughput.fastest_layout(bench, trial, layouts, skip=1)
    assert best == Layout(2, 1, "bf16")
    assert rates == {"1 x 1, fp32": 4.0, "2 x 1, fp32": 8.0, "1 x 1, bf16": 2.0, "2 x 1, bf16": 16.0}


@pytest.mark.parametrize(
    ("words", "ours", "theirs"),
    [
        (["--precision", "auto"], "fp32", {"fp32", "bf16"}),
        (["--precision", "bf16"], "bf16", {"bf16"}),
    ],
)
def test_the_peer_may_choose_where_the_precision_is_left_open(trial, monkeypatch, words, ours, theirs):
    monkeypatch.setattr(precision, "ability", lambda device: precision.Ability(False, 90.0, "an old processor"))
    monkeypatch.setattr(train.os, "sched_getaffinity", lambda _: range(2))
    args = cli.build_parser().parse_args(["train", "--shards", "s", "--model", "m", "--global-batch", "8", *words])
    layout, candidates = train._layouts(args, replace(trial, workers=0))
    assert layout == Layout(2, 1, ours)
    assert {one.precision for one in candidates} == theirs
    assert {one.ranks for one in candidates} == {1, 2}


def test_the_report_is_strict_json_and_says_where_it_comes_from(tmp_path):
    report.write_report(tmp_path / "new" / "report.json", {"rate": 1.5, "path": Path("a")})
    written = json.loads((tmp_path / "new" / "report.json").read_text())
    origin = {name: written.pop(name) for name in ("command", "commit", "machine", "torch")}
    assert written == {"rate": 1.5, "path": "a"}
    assert origin["command"] == sys.argv
    assert origin["machine"]["cores"] >= 1
    assert origin["torch"] == torch.__version__
    with pytest.raises(ValueError, match="JSON"):
        report.write_report(tmp_path / "bad.json", {"rate": float("nan")})
    assert not (tmp_path / "bad.json").exists()


@pytest.mark.parametrize("kind", ["train --shards {shards} --model", "memory --model", "step --model"])
@pytest.mark.parametrize(
    ("model", "message"),
    [("ViT-B-31", "did you mean ViT-B-32"), ("no-such.json", "no-such.json cannot be read; got No such file")],
)
def test_an_unknown_architecture_is_one_line(trial, capsys, kind, model, message):
    assert cli.main([*kind.format(shards=trial.source).split(), model]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recall"], "--recall needs a held-out corpus"),
        (["--steps", "5", "--skip-steps", "5"], "leaves nothing to measure"),
        (["--pairs", "0"], "--pairs is not positive"),
        (["--precision", "fp8"], "invalid choice"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(trial, capsys, words, message):
    assert cli.main(["train", "--shards", trial.source, "--model", trial.model, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("words", "steps"), [([], 20), (["--loss-curve"], 100), (["--loss-curve", "--steps", "3"], 3)])
def test_the_default_loss_curve_goes_far_beyond_its_warmup(trial, words, steps):
    args = cli.build_parser().parse_args(["train", "--shards", trial.source, "--model", trial.model, *words])
    cli._check(args)
    assert args.steps == steps
    if words == ["--loss-curve"]:
        assert args.steps >= 5 * args.warmup
