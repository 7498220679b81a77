"""Which precision is taken where: hardware, ranks, resumes, warnings, Muon's products."""

import dataclasses

import pytest
import torch
from timm.optim.muon import _COEFFICIENTS

from pretrain.config.reading import dump_config
from pretrain.config.tree import OptimConfig, RunConfig, TrainConfig
from pretrain.engine.engine import deepspeed_config
from pretrain.engine.optimizers import make_optimizer
from pretrain.evaluate.bench import in_precision
from pretrain.job import resolve_precision
from pretrain.process import precision
from pretrain.process.precision import Ability, resolve
from pretrain.process.runtime import Runtime
from pretrain.report.provenance import resolved
from pretrain.tasks import ClassifyConfig, ContrastiveConfig

CPU = torch.device("cpu")
HASWELL = "fpu vme sse4_2 avx fma avx2 bmi1 bmi2"
FAST, SLOW = Ability(True, 0.5, "new"), Ability(False, 90.0, "old")


@pytest.fixture
def cpuinfo(tmp_path, monkeypatch):
    """Lets the processor be another one."""

    def pretend(text):
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(precision, "_CPUINFO", tmp_path / "cpuinfo")

    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    precision._cpuinfo.cache_clear()
    yield pretend
    precision._cpuinfo.cache_clear()


@pytest.fixture
def ranks(monkeypatch):
    """Lets this process be rank 0 of several, with these devices."""

    def pretend(*abilities):
        monkeypatch.setattr(precision, "ability", lambda device: abilities[0])
        monkeypatch.setattr(precision, "gather", lambda own: [own, *(_other(own, one) for one in abilities[1:])])

    return pretend


def _other(own, ability):
    return (ability, None) if isinstance(own, tuple) else ability


@pytest.mark.parametrize(
    ("text", "has"),
    [
        (f"model name\t: Xeon E5\nflags\t\t: {HASWELL}\n", False),
        (f"flags\t\t: {HASWELL} avx512f avx512bw avx512vl avx512dq avx512_vnni\n", False),  # oneDNN emulates it there
        (f"flags\t\t: {HASWELL} avx512f avx512_bf16 avx512_fp16\n", True),
        (f"flags\t\t: {HASWELL} amx_tile amx_bf16 amx_int8\n", True),
        ("Features\t: fp asimd sve i8mm bf16 dgh\n", True),
        ("Features\t: fp asimd evtstrm aes\n", False),
        ("", False),
    ],
)
def test_the_processors_flags_decide(cpuinfo, text, has):
    cpuinfo(text)
    assert precision.cpu_has_bf16() is has


@pytest.mark.parametrize(("limit", "has"), [("AVX2", False), ("avx512_core", False), ("AVX512_CORE_BF16", True)])
def test_units_that_the_kernels_may_not_use_do_not_count(cpuinfo, monkeypatch, limit, has):
    cpuinfo("flags : avx512_bf16\n")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert precision.cpu_has_bf16() is has


@pytest.mark.parametrize(("capability", "units"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_that_emulates_does_not_count(monkeypatch, capability, units):
    """torch.cuda.is_bf16_supported() by itself says yes to a Volta or a Turing."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or units)
    assert precision._gpu_has_bf16(torch.device("cuda", 0)) is units


@pytest.mark.parametrize(
    ("asked", "recorded", "devices", "taken", "said", "warned"),
    [
        ("auto", None, [FAST, FAST], "bf16", "in hardware", None),
        ("auto", None, [FAST, FAST, SLOW], "fp32", "rank 2, old, has no units for bf16", None),
        ("auto", None, [Ability(True, 40.0, "hampered")], "fp32", "takes 40 times as long", None),
        ("auto", "bf16", [FAST, SLOW], "bf16", "its checkpoint", "rank 1, old, has no units"),
        ("auto", "fp32", [FAST], "fp32", "bf16 is faster here", None),
        ("bf16", None, [SLOW], "bf16", "as set", "takes 90 times as long for it as for fp32; remedy: train.precision"),
        ("bf16", "fp32", [FAST], "bf16", "as set", None),
        ("bf16", None, [Ability(False, 0.8, "unknown")], "bf16", "as set", None),
        ("fp32", None, [SLOW], "fp32", "as set", None),
    ],
)
def test_all_ranks_take_what_the_poorest_has(ranks, asked, recorded, devices, taken, said, warned):
    ranks(*devices)
    resolved = resolve(asked, CPU, recorded)
    assert resolved.precision == taken
    assert resolved.lines[0].startswith(f"precision: {taken} on {devices[0].name} (")
    assert said in resolved.lines[0]
    warning = "\n".join(resolved.lines[1:])
    assert (warned in warning) if warned else not warning


def test_the_measurement_takes_some_tens_of_milliseconds_and_leaves_the_threads():
    threads = torch.get_num_threads()
    assert 0.01 < precision.slowness(CPU) < 1000
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("kind", [ContrastiveConfig, ClassifyConfig])
def test_a_resume_keeps_the_precision_of_the_newest_checkpoint(ranks, tmp_path, capsys, kind):
    config = kind(run=RunConfig(str(tmp_path)))
    runtime = Runtime(0, 1, 0, CPU, 1)
    ranks(FAST)
    started = resolve_precision(config, runtime)
    assert started.train.precision == "bf16"
    for step, text in ((2, dump_config(dataclasses.replace(config, train=TrainConfig(precision="fp32")))),
                       (4, resolved(started)), (6, "train: [1")):  # fmt: skip
        folder = tmp_path / "checkpoints" / f"step-{step:09d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        (folder / "config.yaml").write_text(text)
    ranks(SLOW)
    capsys.readouterr()
    assert resolve_precision(config, runtime) == started
    said = capsys.readouterr().out
    assert "precision: bf16" in said
    assert "90 times" in said
    own = dataclasses.replace(config, train=TrainConfig(precision="fp32"))
    assert resolve_precision(own, runtime).train.precision == "fp32"


def test_what_nobody_resolved_is_no_precision():
    with pytest.raises(ValueError, match="'auto' is not resolved"):
        deepspeed_config(OptimConfig(), TrainConfig(), 1, 10)
    with pytest.raises(ValueError, match="not resolved"):
        in_precision(lambda *_: None, CPU, "auto")({}, frozenset())


# ---- Muon -----------------------------------------------------------------------------------------------------------


def _moved(device_is, monkeypatch):
    """How far one update of Muon at rate 1 moves a matrix, and its gradient."""
    monkeypatch.setattr(precision, "ability", lambda device: device_is)
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(24, 64))
    weight.grad = torch.randn(24, 64)
    groups = [{"params": [weight], "weight_decay": 0.0, "use_muon": True}]
    make_optimizer(groups, OptimConfig(name="muon", lr=1.0), CPU).step()
    return weight.detach().double(), weight.grad.double()


def _newton_schulz(matrix):
    """The quintic iteration on a matrix of Frobenius norm 1, in fp64."""
    x = matrix / matrix.norm()
    for a, b, c in _COEFFICIENTS["quintic"]:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize(("device_is", "least", "most"), [(SLOW, 0, 1e-5), (FAST, 1e-4, 5e-2)])
def test_muon_multiplies_in_what_is_fast(monkeypatch, device_is, least, most):
    moved, grad = _moved(device_is, monkeypatch)
    want = -0.2 * 64**0.5 * _newton_schulz(grad)  # arXiv 2502.16982: 0.2 sqrt(max(rows, columns))
    error = float((moved - want).norm() / want.norm())
    assert least <= error <= most
