"""Runs with low-rank matrices on real ranks: resumed exactly, refused with other settings, started from, predicted with
and exported without them."""

import json

import pytest
import torch
import yaml

import runs
import tiny
from pretrain.config.reading import load_config
from pretrain.engine.reader import CheckpointReader
from pretrain.engine.weights import load_classifier, load_trained
from pretrain.export.writer import export_model
from pretrain.plan.dry_run import dry_run
from pretrain.tasks import TASKS
from ranks import run_ranks
from training import train_in_turn

WORDS = (
    *("adapters={lora: {rank: 4}}", "optim.lr=1e-2", "train.precision=fp32", "train.micro_batch=4"),
    *("data.workers=0", "checkpoint.every=2 steps"),
)
OF = {
    "contrastive": ("train.zero_stage=3", "optim.ema=0.5", "checkpoint.keep_best=-validation_loss"),
    "classify": ("train.zero_stage=2",),
}
TWO, FOUR, OTHER = "train.duration=2 steps", "train.duration=4 steps", "adapters.lora.rank=8"
BLOCK = "clip.visual.transformer.resblocks.0"


def settings(task, folder, name, *words):
    words = [f"run.dir={folder / name}", *WORDS, *OF[task], *words]
    return load_config(TASKS[task].settings, folder / f"{task}.yaml", words)


def trained(rank, world_size, configs):
    return train_in_turn(configs)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Whole runs of both tasks, and twins that were stopped after two steps, started wrongly, and went on."""
    folder = runs.make_workspace(tmp_path_factory.mktemp("workspace"))
    given = yaml.safe_load((folder / "config.yaml").read_text())
    del given["evaluators"]["classification"]
    (folder / "contrastive.yaml").write_text(yaml.safe_dump(given))
    del given["model"], given["evaluators"]["retrieval"]
    (folder / "classify.yaml").write_text(yaml.safe_dump(given | {"init": str(folder / "contrastive whole")}))
    configs = []
    for task in OF:
        configs += [settings(task, folder, f"{task} whole", FOUR)]
        configs += [settings(task, folder, f"{task} stopped", *words) for words in ((TWO,), (FOUR, OTHER), (FOUR,))]
    (folder / "outcomes.json").write_text(json.dumps(run_ranks(2, trained, configs, timeout=300)[0]))
    return folder


def newest(folder):
    return CheckpointReader(sorted(folder.glob("checkpoints/step-*"))[-1])


@pytest.mark.parametrize("task", OF)
def test_a_resume_is_exact_and_one_with_other_settings_is_refused(here, task):
    outcomes = json.loads((here / "outcomes.json").read_text())
    whole, stopped, refused, resumed = outcomes[:4] if task == "contrastive" else outcomes[4:]
    assert (whole, stopped, resumed) == (0, 0, 0)
    assert "was written by another model; got model.adapters.lora.rank: 8 where the checkpoint has 4" in refused
    want, got = newest(here / f"{task} whole"), newest(here / f"{task} stopped")
    assert want.shapes == got.shapes
    for kind in want.kinds:
        one, other = want.weights(kind), got.weights(kind)
        assert all(torch.equal(one[name], other[name]) for name in one), kind
    assert list(runs.losses(here / f"{task} whole")) == [1, 2, 3, 4]
    assert runs.losses(here / f"{task} whole") == runs.losses(here / f"{task} stopped")


def test_base_weights_stay_and_keep_their_names(here):
    first, last = (CheckpointReader(here / "contrastive whole" / "checkpoints" / f"step-{n:09d}") for n in (2, 4))
    native = tiny.build().state_dict().keys()
    before, after = first.weights(), last.weights()
    added = after.keys() - native
    assert native < after.keys()
    assert len(added) == 2 * 2 * 4 * 2  # towers, layers, linear layers of each, A and B
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == added | {"clip.logit_scale"}
    for kind in ("exp_avg", "ema"):
        assert {name for name in after if last.holds(name, kind)} == moved
    assert last.model()["adapters"]["lora"]["rank"] == 4


def test_whoever_opens_a_run_gets_merged_towers(here, tmp_path):
    plain, average = load_trained(here / "contrastive whole"), load_trained(here / "contrastive whole", ema=True)
    assert plain.state_dict().keys() == average.state_dict().keys() == tiny.build().state_dict().keys()
    weights, name = newest(here / "contrastive whole").weights(), f"{BLOCK}.attn.in_proj"
    up, down = (weights[f"{name}.lora_{kind}.weight"].double() for kind in "BA")
    want = weights[f"{name}_weight"].double() + 16 / 4 * up @ down
    torch.testing.assert_close(plain.state_dict()[f"{name}_weight"].double(), want, rtol=0, atol=1e-7)
    assert not torch.equal(plain.state_dict()[f"{name}_weight"], average.state_dict()[f"{name}_weight"])
    row = runs.rows(here / "contrastive whole", "eval")[-1]
    assert {"validation_loss", "ema_validation_loss"} < row.keys()
    assert export_model(plain, tmp_path / "out", ["open_clip"])


def test_a_classifier_starts_from_the_merged_run_and_is_opened_merged(here, tmp_path):
    classifier, start = load_classifier(here / "classify whole"), load_trained(here / "contrastive whole").state_dict()
    saved = newest(here / "classify whole").weights()
    base = {name.removeprefix("towers."): value for name, value in saved.items() if ".lora_" not in name}
    assert base.keys() - start.keys() == {"head.weight"}
    assert all(torch.equal(base[name], value) for name, value in start.items())
    name = f"{BLOCK}.mlp.c_fc.weight"
    assert not torch.equal(classifier.towers.state_dict()[name], start[name])
    assert export_model(classifier, tmp_path / "out", ["timm"])


@pytest.mark.parametrize(("task", "learning"), [("contrastive", "8,193"), ("classify", "4,480")])
def test_a_dry_run_says_how_much_learns(here, capsys, task, learning):
    """Rank 4 beside 32 -> 96, 32 -> 32, 32 -> 128 and 128 -> 32, in two layers of a tower; the scale; 16 classes."""
    assert dry_run(settings(task, here, "planned", FOUR)) == 0
    assert f" parameters, {learning} of them learn" in capsys.readouterr().out
