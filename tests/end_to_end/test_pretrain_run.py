"""Runs as a user starts them: killed and resumed, stopped by a signal, at other world sizes."""

import signal
import time

import pytest

import runs

STEPS = 12
LONG = f"train.duration={STEPS} steps"  # so that a checkpoint is committed, beside the training, before the end


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return runs.make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def undisturbed(workspace):
    """The losses of a run on two ranks that nothing disturbs."""
    folder = workspace / "undisturbed"
    done = runs.run(runs.command(workspace, folder, LONG, ranks=2))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_a_run_reports_itself(undisturbed):
    assert sorted(runs.losses(undisturbed)) == list(range(1, STEPS + 1))
    assert runs.status(undisturbed)["state"] == "done"
    train, evaluation = runs.rows(undisturbed, "train")[-1], runs.rows(undisturbed, "eval")[-1]
    assert train["samples"] == STEPS * runs.BATCH
    assert {"lr", "grad_norm", "logit_scale", "samples_per_second", "data_wait", "bad_samples"} <= set(train)
    assert {"image_to_text_recall@10", "validation_loss", "top1"} <= set(evaluation)
    assert list((undisturbed / "tensorboard").glob("events*"))
    saves = runs.rows(undisturbed, "checkpoint")
    assert [row["step"] for row in saves] == list(range(2, STEPS + 1, 2))
    newest = (undisturbed / "checkpoints" / f"step-{STEPS:09d}").glob("rank-*")
    assert saves[-1]["checkpoint_bytes"] == sum(path.stat().st_size for path in newest)
    assert all(0 < row["checkpoint_stall"] <= row["checkpoint_seconds"] for row in saves[:1])


def test_killed_and_resumed_equals_undisturbed_bit_for_bit(workspace, undisturbed):
    folder = workspace / "killed"
    words = runs.command(workspace, folder, LONG, ranks=2)
    runs.run_until(words, folder, 2, signal.SIGKILL, kind="checkpoint")
    time.sleep(1)  # ranks are in the launcher's group, dead with it
    assert runs.status(folder)["state"] == "running"
    assert max(runs.losses(folder)) < STEPS
    done = runs.run(words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming from" in done.stdout
    assert runs.losses(folder) == runs.losses(undisturbed)


def test_resumed_on_one_rank_agrees(workspace, undisturbed):
    folder = workspace / "smaller"
    words = runs.command(workspace, folder, LONG, ranks=2)
    runs.run_until(words, folder, 2, signal.SIGKILL, kind="checkpoint")
    done = runs.run(runs.command(workspace, folder, LONG))
    assert done.returncode == 0, done.stdout + done.stderr
    want, got = runs.losses(undisturbed), runs.losses(folder)
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(workspace, number):
    folder = workspace / number.name
    words = runs.command(workspace, folder, "train.duration=200 steps", "checkpoint.every=null")
    code, output = runs.run_until(words, folder, 3, number)
    assert code == 75, output
    status = runs.status(folder)
    assert (status["state"], status["reason"]) == ("stopped", number.name)
    assert status["checkpoint"].endswith(f"step-{status['step']:09d}")
    last = max(runs.losses(folder))
    done = runs.run(runs.command(workspace, folder, f"train.duration={last + 1} steps", "checkpoint.every=null"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "settings changed" in done.stdout
    assert runs.status(folder)["state"] == "done"
    again = runs.run(runs.command(workspace, folder, f"train.duration={last + 1} steps", "checkpoint.every=null"))
    assert again.returncode == 0, again.stderr
    assert max(runs.losses(folder)) == last + 1


def test_ranks_whose_launcher_was_killed_save_and_end(workspace):
    folder = workspace / "orphaned"
    words = runs.command(workspace, folder, "train.duration=100000 steps", "checkpoint.every=null", ranks=2)
    runs.run_until(words, folder, 3, signal.SIGTERM, whole_group=False)
    deadline = time.monotonic() + 60
    while runs.status(folder)["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert runs.status(folder)["state"] == "stopped"
    assert runs.status(folder)["reason"] in ("SIGTERM", "the launcher is gone")


def test_an_interrupt_reaches_ranks_and_launcher_and_is_one_request(workspace):
    """As Ctrl-C on a terminal: the whole group gets it, and the launcher passes it on to the ranks as SIGTERM.
    Whichever of the two a rank sees first names the stop."""
    folder = workspace / "interrupted"
    words = runs.command(workspace, folder, "train.duration=100000 steps", "checkpoint.every=null", ranks=2)
    _, output = runs.run_until(words, folder, 3, signal.SIGINT)
    assert output.count("saves a checkpoint after this step and stops") == 1, output
    deadline = time.monotonic() + 60
    while runs.status(folder)["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.2)
    status = runs.status(folder)
    assert status["state"] == "stopped"
    assert status["reason"] in ("SIGINT", "SIGTERM")
    assert status["checkpoint"].endswith(f"step-{status['step']:09d}")
    assert status["seconds_left"] is None


def test_bf16_cached_stage_3_trains(workspace):
    folder = workspace / "cached"
    words = runs.command(
        workspace, folder, "train.precision=bf16", "train.micro_batch=4", "train.zero_stage=3", ranks=2
    )
    done = runs.run(words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert runs.status(folder)["state"] == "done"


def test_the_best_and_the_multiples_stay(workspace):
    folder = workspace / "retention"
    rules = ("checkpoint.every=null", "checkpoint.keep_every=2 steps", "checkpoint.keep_best=-validation_loss")
    done = runs.run(runs.command(workspace, folder, *rules, "eval.every=1 steps", "train.duration=9 steps"))
    assert done.returncode == 0, done.stdout + done.stderr
    losses = {row["step"]: row["validation_loss"] for row in runs.rows(folder, "eval")}
    best = min(losses, key=lambda step: losses[step])
    assert (folder / "checkpoints" / "best").read_text() == f"step-{best:09d}\n"
    left = {int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")}
    assert {2, 4, 6, 8, 9, best} <= left


def test_dry_run_writes_nothing(workspace):
    folder = workspace / "dry"
    words = [*runs.command(workspace, folder, "train.precision=auto"), "--dry-run"]
    done = runs.run(words, ONEDNN_MAX_CPU_ISA="AVX2")  # as on a processor of that kind
    assert done.returncode == 0, done.stderr
    assert "precision: fp32 on " in done.stdout
    assert "has no units for bf16" in done.stdout
    assert "precision: fp32\n" in done.stdout  # of the resolved settings
    assert "GiB per rank, total" in done.stdout
    assert "6 steps" in done.stdout
    assert not folder.exists()
    absent = runs.run([*runs.command(workspace, folder, "model.init=absent.safetensors"), "--dry-run"])
    assert absent.returncode == 1
    assert "absent.safetensors" in absent.stderr
    assert not folder.exists()
