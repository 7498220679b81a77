"""A wrong path is told before torch is imported, by every command line, and nothing is left behind for it."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from data_tools.errors import UserError
from packing import ROOT
from pretrain.engine import places

CONFIG = """
run: {{dir: {w}/run}}
data: {{train: {w}/here}}
model: {{name: ViT-B-32}}
"""
# With `{w}/none` in it each is wrong; the places `{w}/here` and `{w}/here/c.yaml` exist.
WRONG = [
    "pretrain --config {w}/none.yaml",
    "pretrain --config {w}/here/c.yaml data.train={w}/none",
    "pretrain --config {w}/here/c.yaml data.train={w}/here,{w}/none-{{0..3}}.tar",
    "pretrain --config {w}/here/c.yaml evaluators.retrieval.data={w}/none",
    "pretrain --config {w}/here/c.yaml evaluators.classification.data={w}/none/*.tar",
    "pretrain --config {w}/here/c.yaml model.init={w}/none.safetensors",
    "pretrain --config {w}/here/c.yaml model.init=local-dir:{w}/none",
    "pretrain --config {w}/here/c.yaml model.name={w}/none.json",
    "pretrain --config {w}/here/c.yaml evaluators={{classification:{{data:{w}/here,templates:{w}/none.txt}}}}",
    "pretrain --dry-run --config {w}/here/c.yaml data.train={w}/none",
    "finetune --config {w}/here/c.yaml model=null init={w}/none",
    "finetune --config {w}/here/f.yaml init={w}/none",
    "finetune --config {w}/here/f.yaml init={w}/here classes={w}/none.txt",
    "finetune --config {w}/here/f.yaml init={w}/none.json random=true",
    "evaluate --model {w}/none --task retrieval --data {w}/here",
    "evaluate --model {w}/here --task retrieval --data {w}/none",
    "evaluate --model {w}/here --task classification --data {w}/here --classes {w}/none",
    "evaluate --model {w}/here --task classification --data {w}/here --templates {w}/none",
    "evaluate --model {w}/here --task retrieval --data {w}/here --output {w}/here",
    "evaluate --model {w}/here --task retrieval --data {w}/here --picture {w}/here/c.yaml/none.png",
    "export {w}/none {w}/out",
    "export {w}/here {w}/here/c.yaml/none",
    "predict --model {w}/none --input {w}/here --output {w}/p.csv",
    "predict --model {w}/here --input {w}/none --output {w}/p.csv",
    "inspect_batch --config {w}/none.yaml --step 1",
    "inspect_batch --config {w}/here/c.yaml --step 1 data.train={w}/none",
    "inspect_batch --config {w}/here/c.yaml --step 1 --checkpoint {w}/none",
    "inspect_batch --config {w}/here/c.yaml --step 1 --html {w}/here/c.yaml/none.html",
    "benchmark train --shards {w}/none --model ViT-B-32",
    "benchmark train --recall --shards {w}/here --val {w}/none --model ViT-B-32",
    "benchmark train --shards {w}/here --model {w}/none.json",
    "benchmark loader --shards {w}/none",
    "benchmark chaos --config {w}/none.yaml",
    "benchmark chaos --config {w}/here/c.yaml --set data.train={w}/none",
    "benchmark step --model {w}/none.json",
    "benchmark memory --model {w}/none.json",
    "benchmark loss --work-dir {w}/here/c.yaml",
    "-m data_tools plan-stream --config {w}/none.yaml",
    "-m data_tools plan-stream --config {w}/here/c.yaml data.train={w}/none",
]  # fmt: skip
# Refuses to import what takes seconds: the fastest of machines would not tell otherwise.
GUARD = """
import runpy, sys
class Heavy:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("torch", "open_clip", "deepspeed", "transformers", "tensorboard"):
            print("IMPORTED", name, file=sys.stderr)
            raise SystemExit(99)
sys.meta_path.insert(0, Heavy())
for line in sys.stdin.read().splitlines():
    words = line.split("\\t")
    module, _, verb = words[0].partition(":")
    try:
        code = getattr(__import__(module, fromlist=["main"]), verb or "main")(words[1:])
    except SystemExit as error:
        code = error.code
    print("CODE", code, file=sys.stderr, flush=True)
"""
MODULES = {
    "pretrain": "pretrain.cli", "finetune": "pretrain.cli:finetune", "evaluate": "pretrain.evaluate.cli",
    "export": "pretrain.export.cli", "predict": "pretrain.predict.cli", "inspect_batch": "pretrain.plan.cli",
    "benchmark": "launch.benchmark.cli",
}  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    (folder / "here").mkdir()
    (folder / "here" / "open_clip_config.json").touch()  # a model, as far as paths tell
    (folder / "here" / "c.yaml").write_text(CONFIG.format(w=folder))
    (folder / "here" / "f.yaml").write_text(CONFIG.format(w=folder).replace("model: {name: ViT-B-32}\n", ""))
    return folder


def test_every_command_line_tells_a_wrong_path_before_torch(here):
    lines = []
    for command in WRONG:
        first, *words = command.format(w=here).split()
        lines.append("\t".join(["data_tools.__main__", *words[1:]] if first == "-m" else [MODULES[first], *words]))
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", GUARD], input="\n".join(lines), cwd=ROOT, capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    seconds = time.monotonic() - started
    said = done.stderr.split("CODE ")
    assert len(said) == len(WRONG) + 1, done.stderr
    for command, text, code in zip(WRONG, said, said[1:], strict=False):
        error = text.partition("\n")[2] if not text.startswith("error") else text
        assert code.startswith(("1\n", "2\n")), (command, code)
        assert "error: " in error, (command, error)
        assert "none" in error or "here" in error, (command, error)
        assert error.count("\n") == 1, (command, error)
    assert seconds < len(WRONG)  # all of them together: under a second each


def test_what_is_there_is_left_to_who_opens_it(here):
    (here / "s-0.tar").touch()
    for urls in (
        str(here),
        f"{here}/s-*.tar",
        f"{here}/s-{{0..0}}.tar",
        "https://h/none.tar",
        "s3://b/none-{0..9}.tar",
    ):
        places.check_corpus(urls)
    for name in (f"{here}/here", f"local-dir:{here}/here"):
        places.check_model(name)
    for name in (str(here), "hf-hub:a/b", "https://h/x"):
        with pytest.raises(UserError, match=r"holds no model|not on this machine"):
            places.check_model(name)
    places.check_output("--output", here / "new" / "deep" / "r.jsonl")
    places.check_output("--output", None)
    with pytest.raises(UserError, match=r"missing shard .*s-1\.tar"):
        places.check_corpus(f"{here}/s-{{0..1}}.tar")


def test_ranks_of_several_hosts_leave_paths_to_the_build(here, monkeypatch):
    """One host's fault, told by that host's ranks alone, would leave the others waiting for them."""
    from pretrain.config.reading import load_config
    from pretrain.tasks import ContrastiveConfig
    from pretrain.tasks.paths import check_settings

    config = load_config(ContrastiveConfig, here / "here" / "c.yaml", [f"data.train={here}/none"])
    with pytest.raises(UserError, match="no corpus"):
        check_settings(config)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="no corpus"):
        check_settings(config)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_settings(config)
