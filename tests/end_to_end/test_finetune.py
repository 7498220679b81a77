"""Fine-tuning from a run and from an export, resumed, linear and full."""

import pytest
import torch
import yaml

import runs
from data_tools.errors import UserError
from pretrain.engine.weights import CheckpointReader, load_trained


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A pretraining run of two steps, and config.yaml turned into a fine-tuning one."""
    folder = runs.make_workspace(tmp_path_factory.mktemp("workspace"))
    done = runs.run(runs.command(folder, folder / "pretrained", "train.duration=2 steps", "evaluators={}"))
    assert done.returncode == 0, done.stdout + done.stderr
    config = yaml.safe_load((folder / "config.yaml").read_text())
    del config["model"], config["evaluators"]["retrieval"]
    config |= {"init": str(folder / "pretrained"), "mode": "full"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def finetune(workspace, name, *overrides, ranks=1):
    return runs.run(runs.command(workspace, workspace / name, *overrides, job="finetune", ranks=ranks))


def weights(run_dir):
    return CheckpointReader(sorted(run_dir.glob("checkpoints/step-*"))[-1]).weights()


def test_full_on_two_ranks_learns_the_image_tower(workspace):
    words = ("optim.lr=3e-3", "train.duration=25 epochs", "train.micro_batch=4", "data.crop_scale=[1.0,1.0]")
    done = finetune(workspace, "full", *words, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "none missing" in done.stdout
    assert "zero-shot text weights" in done.stdout
    losses = runs.losses(workspace / "full")
    assert min(losses.values()) < 0.5 * losses[1]
    assert runs.rows(workspace / "full", "eval")[-1]["top1"] > 0.5
    before, after = load_trained(workspace / "pretrained").state_dict(), weights(workspace / "full")
    assert not torch.equal(after["towers.clip.visual.proj"], before["clip.visual.proj"])
    assert torch.equal(after["towers.clip.text_projection"], before["clip.text_projection"])


def test_linear_leaves_the_tower_alone(workspace):
    done = finetune(workspace, "linear", "mode=linear", "train.zero_stage=2")
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = load_trained(workspace / "pretrained").state_dict(), weights(workspace / "linear")
    for name, value in before.items():
        assert torch.equal(after[f"towers.{name}"], value), name
    assert after["head.weight"].abs().sum() > 0


def test_another_size_is_interpolated_and_said(workspace):
    done = finetune(workspace, "larger", "image_size=64", "train.duration=1 steps")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 resized (visual.positional_embedding)" in done.stdout


def test_random_start_and_resume(workspace):
    words = ("random=true", f"init={workspace / 'tiny.json'}")
    assert finetune(workspace, "random", *words, "train.duration=2 steps").returncode == 0
    done = finetune(workspace, "random", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming from" in done.stdout
    assert sorted(runs.losses(workspace / "random")) == [1, 2, 3, 4, 5, 6]


def test_a_diverging_run_names_its_samples(workspace):
    done = finetune(
        workspace, "diverged", "optim.lr=100", "optim.weight_decay=100", "optim.warmup=0 steps", "train.micro_batch=8"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    line = next(line for line in done.stderr.splitlines() if line.startswith("error"))
    assert "was stopped before its update" in line
    assert "features not finite of samples" in line


def test_a_classifier_is_no_start_for_another(workspace):
    assert finetune(workspace, "first", "train.duration=1 steps").returncode == 0
    with pytest.raises(UserError, match="fine-tuned classifier"):
        load_trained(workspace / "first")
    with pytest.raises(UserError, match="is missing"):
        load_trained(workspace / "nowhere")
