"""Faults as a user meets them: one clear line, a non-zero exit, no hang."""

import json

import pytest

import runs


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return runs.make_workspace(tmp_path_factory.mktemp("workspace"))


def fails(done, code, *texts):
    """The one line that a failed command printed."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == code, done.stdout + done.stderr
    assert len(lines) == 1, done.stderr
    for text in texts:
        assert text in lines[0]
    return lines[0]


@pytest.mark.parametrize(
    ("override", "code", "texts"),
    [
        ("optim.lrr=1", 2, ("optim.lrr", "did you mean 'optim.lr'")),
        ("train.precision=bf61", 2, ("train.precision", "fp32, bf16")),
        ("train.duration=soon", 2, ("train.duration", "epochs, steps, samples")),
        ("data.train.0.urls={w}/shards/shard-{{000000..000009}}.tar", 1, ("shard-000003.tar", "remedy")),
        ("data.train.0.urls={w}/images", 1, ("images",)),
        ("model.name=ViT-B-33", 1, ("ViT-B-33", "did you mean")),
        ("model.init={w}/none.safetensors", 1, ("none.safetensors", "missing")),
        ("train.global_batch=64", 1, ("64", "48")),
        ("evaluators.retrieval.data={w}/elsewhere", 1, ("elsewhere",)),
    ],
)
def test_one_clear_line(workspace, tmp_path, override, code, texts):
    word = override.format(w=workspace)
    fails(runs.run(runs.command(workspace, tmp_path / "run", word)), code, *texts)


def test_a_batch_that_does_not_divide_ends_every_rank(workspace, tmp_path):
    done = runs.run(runs.command(workspace, tmp_path / "run", "train.global_batch=15", ranks=2))
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1, done.stderr
    assert "global batch 15 is not divisible" in lines[0]
    assert "1 or 3 ranks" in lines[0]


def test_diverging_training_stops_before_the_update(workspace, tmp_path):
    folder = tmp_path / "run"
    done = runs.run(
        runs.command(
            workspace,
            folder,
            "optim.lr=100",
            "optim.weight_decay=100",
            "optim.warmup=0 steps",
            "checkpoint.every=1 steps",
        )
    )
    line = fails(done, 1, "was stopped before its update", "ranks [0]", "last good checkpoint")
    assert str(folder / "checkpoints") in line
    assert runs.status(folder)["state"] == "failed"


def test_another_corpus_or_model_is_not_resumed(workspace, tmp_path):
    folder = tmp_path / "run"
    assert runs.run(runs.command(workspace, folder, "train.duration=2 steps")).returncode == 0
    fails(runs.run(runs.command(workspace, folder, "seed=1")), 1, "seed")
    fails(runs.run(runs.command(workspace, folder, "model.name=ViT-B-32")), 1, "another model", "embed_dim")
    one = workspace / "shards" / "shard-000000.tar"
    fails(runs.run(runs.command(workspace, folder, f"data.train.0.urls={one}")), 1, "manifest_digest")
    fails(runs.run(runs.command(workspace, folder, "run.resume=never")), 1, "already holds")


def test_a_damaged_checkpoint_falls_back_and_then_fails(workspace, tmp_path):
    folder = tmp_path / "run"
    assert runs.run(runs.command(workspace, folder, "train.duration=4 steps")).returncode == 0
    newest, before = (folder / "checkpoints" / f"step-{step:09d}" for step in (4, 2))
    flip(newest)
    done = runs.run(runs.command(workspace, folder))
    assert done.returncode == 0, done.stderr
    assert f"resuming from {before}" in done.stdout
    assert "is damaged" in done.stdout
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        flip(checkpoint)
    fails(runs.run(runs.command(workspace, folder)), 1, "no checkpoint", "is intact")


def flip(checkpoint):
    victim = next(checkpoint.glob("rank-*"))
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)


def test_bad_samples_beyond_the_ratio_end_the_run_with_the_shard(workspace, tmp_path):
    """Shards with pictures that no decoder reads, from a tool that does not look."""
    import io
    import tarfile

    path = tmp_path / "foreign.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(runs.IMAGES):
            image = b"not a picture" if number % 8 == 7 else (workspace / "images" / f"{number}.jpg").read_bytes()
            for name, data in (
                (f"{number:04d}.jpg", image),
                (f"{number:04d}.json", json.dumps({"captions": ["a dog"]}).encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    folder = tmp_path / "run"
    words = runs.command(workspace, folder, f"data.train.0.urls={path}", "train.duration=20 epochs")
    fails(runs.run(words), 1, "bad samples", "foreign.tar", "data.max_bad_ratio")
    quarantined = [json.loads(line) for line in (folder / "quarantine-0.jsonl").read_text().splitlines()]
    assert {row["key"] for row in quarantined} <= {f"{n:04d}" for n in range(7, runs.IMAGES, 8)}
    done = runs.run(
        runs.command(workspace, tmp_path / "tolerant", f"data.train.0.urls={path}", "data.max_bad_ratio=0.5")
    )
    assert done.returncode == 0, done.stderr
