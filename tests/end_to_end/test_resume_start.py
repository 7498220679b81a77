"""A resume needs nothing that only a start reads: what `init` and `model.init` held, prompts, a tokenizer."""

import json
import shutil

import pytest
import torch
import yaml

import model_files
import runs
import tiny
from data_tools.errors import UserError
from pretrain.config.reading import load_config
from pretrain.engine.reader import CheckpointReader
from pretrain.export.open_clip_format import write as write_open_clip
from pretrain.plan.dry_run import dry_run
from pretrain.tasks import ClassifyConfig, ContrastiveConfig
from pretrain.tasks.paths import check_settings
from ranks import run_ranks
from text_towers import CONFIGS, architecture
from training import train_in_turn

QUIET = ("data.workers=0", "train.precision=fp32", "checkpoint.every=2 steps", "log.every=100 steps")
TUNED = ("optim.lr=3e-3", "train.micro_batch=4", *QUIET)


def trained(rank, world_size, starts):
    """Train in turn what `starts` lists, (kind, config file, overrides): exit codes, or what was raised."""
    return train_in_turn([load_config(*one) for one in starts])


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Shards, settings of both jobs, and weights to start from: an export with a tokenizer's folder of its own."""
    folder = runs.make_workspace(tmp_path_factory.mktemp("workspace"))
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    del settings["evaluators"]
    settings["model"]["init"] = str(folder / "export")
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(settings))
    del settings["model"]
    (folder / "finetune.yaml").write_text(yaml.safe_dump(settings))
    (folder / "prompts.txt").write_text("a {c}\n")
    (folder / "export").mkdir()
    write_open_clip(tiny.build(seed=5), folder / "export")
    return folder


def tune(here, name, *words):
    return ClassifyConfig, here / "finetune.yaml", [f"run.dir={here / name}", *TUNED, *words]


def pretrain(here, name, *words):
    return ContrastiveConfig, here / "pretrain.yaml", [f"run.dir={here / name}", *QUIET, *words]


def weights(folder):
    return CheckpointReader(sorted(folder.glob("checkpoints/step-*"))[-1]).weights()


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def begun(here):
    """Whole runs of four steps, and their twins that were stopped after two; what they started from is then another
    thing, or gone."""
    init, prompts = f"init={here / 'first'}", f"templates={here / 'prompts.txt'}"
    two, four = "train.duration=2 steps", "train.duration=4 steps"
    starts = [
        pretrain(here, "first", "train.duration=1 steps"),
        tune(here, "whole", init, prompts, four),
        tune(here, "tuned", init, prompts, two),
        pretrain(here, "pretrained whole", four),
        pretrain(here, "pretrained", two),
    ]
    assert run_ranks(2, trained, starts, timeout=300) == [[0] * 5] * 2
    shutil.copytree(here / "tuned", here / "tuned again")
    shutil.rmtree(here / "export")
    (here / "prompts.txt").unlink()
    return here


def test_a_resume_is_exact_whatever_became_of_the_start(begun):
    here, prompts = begun, f"templates={begun / 'prompts.txt'}"
    four = "train.duration=4 steps"
    on = [
        pretrain(here, "first", "train.duration=2 steps"),  # its model.init is gone; then `init` is another model
        tune(here, "tuned", f"init={here / 'first'}", prompts, four),
        pretrain(here, "pretrained", four),
    ]
    assert run_ranks(2, trained, on, timeout=300) == [[0] * 3] * 2
    assert_same(weights(here / "tuned"), weights(here / "whole"))
    assert_same(weights(here / "pretrained"), weights(here / "pretrained whole"))
    shutil.rmtree(here / "first")
    assert run_ranks(2, trained, [tune(here, "tuned again", four)], timeout=300) == [[0]] * 2
    assert_same(weights(here / "tuned again"), weights(here / "whole"))
    kept = yaml.safe_load((here / "tuned again" / "config.yaml").read_text())
    assert kept["init"] == str(here / "first")  # on record still
    before, after = (json.loads((sorted((here / name).glob("checkpoints/step-*"))[-1] / "model.json").read_text())
                     for name in ("whole", "tuned again"))  # fmt: skip
    assert before == after


def test_what_contradicts_the_checkpoint_is_refused_and_leaves_the_record(begun):
    """On all ranks; the good run's settings stay, and its status says what happened."""
    here, four = begun, "train.duration=4 steps"
    shutil.copytree(here / "whole", here / "refused")
    names = sorted({tiny.WORDS[number % len(tiny.WORDS)] for number in range(runs.IMAGES)})
    other = json.dumps([*names[:2], "whale", *names[3:]])
    words = [[f"classes={other}"], ["image_size=64"], ["seed=3"], ["run.resume=never", f"init={here / 'pretrained'}"]]
    before = (here / "refused" / "config.yaml").read_bytes()
    starts = [tune(here, "refused", four, *more) for more in words]
    starts += [pretrain(here, "refused", four, "model.init=null"), tune(here, "new", four)]
    first, second = run_ranks(2, trained, starts, timeout=300)
    assert first == second
    parts = [
        ("another model", "head.classes.2: 'whale' where the checkpoint has", repr(names[2])),
        ("another model", "image_size", "64 where the checkpoint has 32"),
        ("seed", "3"),
        ("already holds",),
        ("another model", "head"),
        ("'init' is not set", "init=RUN_OR_EXPORT_DIR"),
    ]
    for text, wanted in zip(first, parts, strict=True):
        assert all(part in text for part in wanted), text
    assert (here / "refused" / "config.yaml").read_bytes() == before
    status = runs.status(here / "refused")
    assert (status["state"], status["step"]) == ("failed", 4)
    assert "another model" in status["reason"]


def test_a_dry_run_looks_at_what_the_run_would_go_on_from(begun, capsys):
    here, four = begun, "train.duration=4 steps"
    for kind, path, words in (tune(here, "whole", four), pretrain(here, "pretrained whole", four)):
        config = load_config(kind, path, words)
        check_settings(config)
        assert dry_run(config) == 0
        printed = capsys.readouterr().out
        assert "resuming from" in printed
        assert "initialised from" not in printed


def test_a_run_says_that_it_switches_dropout_off(here, tmp_path, capsys):
    kind, settings, _ = CONFIGS["bert"]
    kind(**settings).save_pretrained(tmp_path)
    words = [f"run.dir={tmp_path / 'run'}", f"model.name={architecture(tmp_path)}", "model.init=null", *QUIET]
    assert dry_run(load_config(ContrastiveConfig, here / "pretrain.yaml", words)) == 0
    assert capsys.readouterr().out.count("dropout is set to 0, places of the text tower") == 1


def test_a_resumed_classifier_needs_no_tokenizer(tmp_path):
    """That of an `init` in transformers' form lies in its folder."""
    from checkpoints import write
    from classifier_run import build
    from pretrain.engine.weights import describe, load_classifier

    model = build()
    text_cfg = tiny.MODEL_CFG["text_cfg"] | {"hf_tokenizer_name": str(tmp_path / "gone")}
    spec = {**describe(model.spec)["spec"], "model_cfg": tiny.MODEL_CFG | {"text_cfg": text_cfg}}
    head = {"classes": list(model.classes), "scale": model.scale}
    write(tmp_path / "run", 3, model, description={"spec": spec, "head": head})
    images, _ = tiny.batch(tiny.build(), 2)
    with torch.no_grad():
        assert torch.equal(load_classifier(tmp_path / "run").scores(images), model.scores(images))


def test_places_that_only_a_start_reads_are_asked_for_by_a_start_alone(tmp_path):
    """And told before torch is there."""
    import checkpoints

    shards = tmp_path / "s.tar"
    shards.touch()
    base = [f"run.dir={tmp_path / 'run'}", f"data.train={shards}"]
    (tmp_path / "c.yaml").write_text("seed: 0\n")
    name = model_files.architecture_with(tmp_path / "m.json")
    kinds = {
        ClassifyConfig: [[], [f"init={tmp_path}/gone"], [f"init={tmp_path}/gone.json", "random=true"],
                         ["init=null", f"templates={tmp_path}/gone.txt"]],
        ContrastiveConfig: [[f"model.name={name}", f"model.init={tmp_path}/gone"]],
    }  # fmt: skip
    configs = [load_config(kind, tmp_path / "c.yaml", base + words) for kind, rows in kinds.items() for words in rows]
    for config in configs:
        with pytest.raises(UserError, match=r"'init' is not set|gone.*is missing|gone\.json cannot be read"):
            check_settings(config)
    checkpoints.write(tmp_path / "run", 3)
    for config in configs:
        check_settings(config)
