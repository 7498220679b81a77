"""A run that learns from a stored teacher: its vectors lie in the tars, a resume is exact, and what has none is
replaced or absent."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch

import runs
import tiny
from data_tools.corpus import ShardReader, open_corpus
from data_tools.format.writer import write_shard
from data_tools.media.members import DEFAULT_FIELDS
from pretrain.config.reading import load_config
from pretrain.engine.reader import CheckpointReader
from pretrain.job import Job
from pretrain.process.runtime import start
from pretrain.stream.fields.image import image_settings
from pretrain.stream.transform import ImageTransform
from pretrain.tasks import ContrastiveConfig
from ranks import run_ranks
from training import train

SIZE = 20  # of the teacher's features; the student has 24
LACKING = 5  # the sample without a vector of its image
WORDS = [
    "objectives={infonce: {}, image_features: {type: feature_distillation, weight: 50}, "
    "text_features: {type: feature_distillation, fields: [text, teacher_text], weight: 50}, "
    "relational_distillation: {}, interactive_contrastive: {weight: 0.5}}",
    "fields={teacher_image: {type: embedding, size: 20}, "
    "teacher_text: {type: embedding, size: 20, member: 'json:teacher.text'}}",
    *("data.workers=1", "data.max_bad_ratio=0.1", "evaluators={}"),
    *("optim.schedule=constant", "optim.lr=3e-3", "checkpoint.every=2 steps"),
]


@torch.no_grad()
def teach(corpus, folder):
    """The corpus in shards of their own, each sample with what a tiny teacher says of its image, as a member, and of
    its captions, in its json."""
    teacher = tiny.build(seed=9, embed_dim=SIZE).eval()
    transform = ImageTransform(image_settings(teacher.spec))
    samples = []
    with ShardReader(corpus) as reader:
        for shard, count in enumerate(corpus.counts):
            samples += [reader.read(shard, index) for index in range(int(count))]
    samples.sort(key=lambda sample: sample.key)
    for number, sample in enumerate(samples):
        pixels = transform.evaluate(DEFAULT_FIELDS.image_bytes(sample)).transpose(2, 0, 1)
        image = teacher.encode_image(torch.from_numpy(np.ascontiguousarray(pixels))[None])[0]
        texts = teacher.encode_text(teacher.tokenize(DEFAULT_FIELDS.all_captions(sample)))
        content = json.loads(sample.members["json"]) | {"teacher": {"text": texts.tolist()}}
        sample.members["json"] = json.dumps(content).encode()
        if number != LACKING:
            file = io.BytesIO()
            np.save(file, image.half().numpy())
            sample.members["teacher_image.npy"] = file.getvalue()
    folder.mkdir()
    for shard in range(0, len(samples), 20):
        write_shard(folder / f"t-{shard:06d}.tar", [(s.key, s.members) for s in samples[shard : shard + 20]])
    return samples[LACKING].key


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = runs.make_workspace(tmp_path_factory.mktemp("workspace"))
    (folder / "lacking").write_text(teach(open_corpus(folder / "shards"), folder / "taught"))
    return folder


def trained(rank, world_size, here, starts):
    """Run in turn what `starts` says, (run.dir, words)."""
    for name, words in starts:
        words = [f"data.train={here / 'taught'}", f"run.dir={here / name}", *WORDS, *words]
        config = load_config(ContrastiveConfig, here / "config.yaml", words)
        with contextlib.redirect_stdout(io.StringIO()):
            assert train(Job(config, start(distributed=True))) == 0


def weights(folder):
    return CheckpointReader(sorted(folder.glob("checkpoints/step-*"))[-1]).weights()


@pytest.fixture(scope="module")
def runs_of(here):
    """A whole run of four steps, its twin that was stopped after two, and one where samples may lack the vector."""
    optional = "data.optional=[teacher_image]"
    starts = [
        ("whole", ["train.duration=4 steps"]),
        ("parted", ["train.duration=2 steps", "train.zero_stage=3", "train.micro_batch=4"]),
        ("parted", ["train.duration=4 steps", "train.zero_stage=3", "train.micro_batch=4"]),
        ("cached", ["train.duration=4 steps", "train.zero_stage=3", "train.micro_batch=4"]),
        ("optional", ["train.duration=4 steps", optional]),
    ]
    run_ranks(2, trained, here, starts, timeout=300)
    return here


NAMES = ("infonce", "image_features", "text_features", "relational_distillation", "interactive_contrastive")


def test_a_resume_is_exact(runs_of):
    """At ZeRO 3, with the gradient cache; and it trains what a run without either does."""
    parted, cached, whole = (weights(runs_of / name) for name in ("parted", "cached", "whole"))
    assert {"heads.image_to_teacher_image.linear.weight", "heads.text_to_teacher_text.linear.bias"} < cached.keys()
    assert all(torch.equal(parted[name], value) for name, value in cached.items())
    assert runs.losses(runs_of / "parted") == runs.losses(runs_of / "cached")
    assert runs.losses(runs_of / "cached") == pytest.approx(runs.losses(runs_of / "whole"), rel=1e-4)
    assert cached["heads.image_to_teacher_image.linear.weight"].shape == (SIZE, 24)
    assert whole.keys() == cached.keys()


def test_every_loss_is_logged_and_the_student_nears_its_teacher(runs_of):
    logged = runs.rows(runs_of / "whole", "train")
    assert [row["step"] for row in logged] == [1, 2, 3, 4]
    for row in logged:
        weighted = dict(zip(NAMES, (1, 50, 50, 1, 0.5), strict=True))
        assert row["loss"] == pytest.approx(
            sum(row[f"loss_{name}"] * weight for name, weight in weighted.items()), rel=1e-5
        )
    for name in ("image_features", "text_features"):
        assert logged[-1][f"loss_{name}"] < logged[0][f"loss_{name}"], name


def test_a_sample_without_a_vector_is_replaced_or_absent(runs_of):
    """An epoch of three steps has all samples, so each run has met it."""
    key = (runs_of / "lacking").read_text()
    found = {name: [json.loads(line) for path in (runs_of / name).glob("quarantine-*.jsonl")
                    for line in path.read_text().splitlines()] for name in ("whole", "optional")}  # fmt: skip
    assert {(row["key"], row["kind"]) for row in found["whole"]} == {(key, "no_embedding")}
    assert found["optional"] == []
    assert all(row["bad_samples"] == 0 for row in runs.rows(runs_of / "optional", "train"))
    assert runs.rows(runs_of / "whole", "train")[-1]["bad_samples"] > 0
    assert runs.losses(runs_of / "optional") != runs.losses(runs_of / "whole")
