"""`profile.steps`: the trace and the page of a run on two ranks."""

import gzip
import json
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

import runs
from pretrain.config.reading import load_config
from pretrain.job import Job
from pretrain.process.runtime import start
from pretrain.report.profiling import breakdown
from pretrain.tasks import ContrastiveConfig
from ranks import run_ranks
from training import train

PLAIN = ["data.workers=0", "evaluators={}"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return runs.make_workspace(tmp_path_factory.mktemp("workspace"))


def trained(rank, world_size, path, words):
    assert train(Job(load_config(ContrastiveConfig, path, [*PLAIN, *words]), start(distributed=True))) == 0


@pytest.mark.parametrize(("steps", "micro_batch", "duration"), [("2-3", "null", 5), ("4", "4", 4)])
def test_the_page_says_where_the_time_went(workspace, tmp_path, steps, micro_batch, duration):
    words = [f"run.dir={tmp_path}", f"profile.steps={steps}", f"train.micro_batch={micro_batch}"]
    run_ranks(2, trained, workspace / "config.yaml", [*words, f"train.duration={duration} steps"])
    first, _, last = steps.partition("-")
    name = f"profile-{first}-{last or first}"
    lines = (tmp_path / f"{name}.txt").read_text().splitlines()
    count = int(last or first) - int(first) + 1
    assert lines[0].startswith(f"{count} steps of rank 0 of 2 ")
    seconds = {line[2:42].strip(): float(line.split(" s ")[0].split()[-1]) for line in lines if line.endswith("%")}
    parts = [seconds[part] for part in ("data", "forward", "loss", "backward", "optimizer", "the rest")]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(float(lines[0].split(": ")[1].split()[0]), abs=1e-3)
    assert seconds["all"] > 0
    assert any("gloo:all_reduce" in line for line in lines)
    with gzip.open(tmp_path / f"{name}.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("dualstream.optimizer") == count
    passes = 1 if micro_batch == "null" else 4  # two micro-batches, twice
    assert names.count("dualstream.forward") == passes * count


def test_a_gpu_is_spoken_of_by_its_kernels():
    """What the host queues and what annotations span is left out, so that nothing counts twice."""

    def event(key, device, count, seconds, annotation=False):
        times = {f"{kind}{side}_time_total": 0.0 for kind in ("", "self_") for side in ("cpu", "device")}
        side = "device" if device == DeviceType.CUDA else "cpu"
        times |= {f"{side}_time_total": 1e6 * seconds, f"self_{side}_time_total": 1e6 * seconds}
        return SimpleNamespace(key=key, device_type=device, is_user_annotation=annotation, count=count, **times)

    events = [
        event("aten::mm", DeviceType.CPU, 4, 0.5),
        event("gemm_kernel", DeviceType.CUDA, 4, 1.0),
        event("nccl:all_reduce", DeviceType.CUDA, 2, 0.4, annotation=True),
        event("ncclDevKernel_AllReduce", DeviceType.CUDA, 2, 0.4),
        event("dualstream.forward", DeviceType.CUDA, 2, 1.5, annotation=True),
    ]
    lines = breakdown(events, {"data": 0.2, "forward": 1.6}, 2.0, 2, "1 rank").splitlines()
    shares = {line[2:42].strip(): line[54:].split()[0] for line in lines if line.startswith("  ")}
    assert shares == {
        "data": "10.0%", "forward": "80.0%", "the rest": "10.0%", "all": "20.0%",
        "ncclDevKernel_AllReduce": "20.0%", "gemm_kernel": "50.0%",
    }  # fmt: skip


def test_a_run_that_stops_before_the_steps_leaves_no_profile(workspace, tmp_path):
    words = [f"run.dir={tmp_path}", "profile.steps=5-6", "train.duration=2 steps"]
    run_ranks(1, trained, workspace / "config.yaml", words)
    assert not list(tmp_path.glob("profile-*"))
