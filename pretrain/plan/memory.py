"""How much memory a run will take, by what it holds: a formula, and one forward for the activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from pretrain.config.batch import local_batch
from pretrain.config.tree import Config, PlainOptimConfig, TrainConfig
from pretrain.engine.groups import parameter_groups
from pretrain.engine.optimizers import STATES, states_of
from pretrain.objectives.objective import Weighted, compares, wanted
from pretrain.process.precision import is_bf16
from pretrain.process.runtime import Runtime
from pretrain.tasks import TaskConfig
from pretrain.tasks.recipe import Trained
from pretrain.towers.cut import uncut
from pretrain.towers.fit import free_bytes
from pretrain.towers.model import Inputs, to_device

GIB = 2**30
_MOST_LIVE = 10**9  # parameters that ZeRO-3 keeps gathered, by DeepSpeed's stage3_max_live_parameters


def too_much(total: int, runtime: Runtime) -> str:
    """A line where `total` bytes a rank are more than this machine, or the rank's GPU, has free; else empty."""
    on_gpu = runtime.device.type == "cuda"
    needed = total if on_gpu else total * len(runtime.node_ranks)
    free = torch.cuda.mem_get_info(runtime.device)[0] if on_gpu else free_bytes()
    if free is None or needed <= free:
        return ""
    remedy = "a smaller train.micro_batch, train.grad_checkpointing=[image,text], or train.zero_stage with more ranks"
    return (
        f"warning:  {needed / GIB:.1f} GiB are more than the {free / GIB:.1f} GiB that are free here; remedy: {remedy}"
    )


def memory(
    config: TaskConfig,
    model: Trained,
    rows: Callable[[int], Inputs],
    objectives: Mapping[str, Weighted],
    runtime: Runtime,
) -> dict[str, int]:
    """Bytes per rank by what they hold; activations are counted on a forward of a few samples in the run's precision.
    `rows`: n -> inputs of n samples, as the run's fields have them."""
    share = local_batch(config, runtime.world_size)
    parts = kept_bytes(config, model, runtime)
    activations = activation_bytes(model, rows, objectives, is_bf16(config.train.precision))
    parts["activations of a micro-batch"] = activations * (config.train.micro_batch or share)
    if config.optim.ema is not None and config.evaluators:
        parts["a second model, while the moving average is evaluated"] = 4 * sizes(model)[0]
    if any(compares(one.objective) for one in objectives.values()):
        width = model.spec.model_cfg["embed_dim"]
        parts["features and their gradients"] = 4 * width * (3 * share + 2 * config.train.global_batch)
    return {**parts, "total": sum(parts.values())}


def kept_bytes(config: Config, model: nn.Module, runtime: Runtime) -> dict[str, int]:
    """Bytes per rank of what a step keeps beside activations: weights, gradients, the optimizer's states."""
    share = local_batch(config, runtime.world_size)
    states = _states(model, config.optim)
    parts = state_bytes(*sizes(model), states, config.train, config.optim, runtime.world_size)
    if (config.train.micro_batch or share) < share:
        largest = max(p.numel() for p in model.parameters() if p.requires_grad)
        parts["the largest gradient once more, while it is added to that of earlier micro-batches"] = 4 * largest
    return parts


def sizes(model: nn.Module) -> tuple[int, int]:
    """(parameters of `model`, those of them that learn)."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns)


def _states(model: nn.Module, optim: PlainOptimConfig) -> int:
    """Elements of all the tensors that the optimizer keeps; Muon has fewer of some parameters than of others."""
    groups = parameter_groups(model, optim)
    return sum(len(states_of(optim.name, group)) * p.numel() for group in groups for p in group["params"])


def state_bytes(
    parameters: int, learning: int, states: int, train: TrainConfig, optim: PlainOptimConfig, world_size: int
) -> dict[str, int]:
    """Bytes of fp32 weights, of gradients of those that are `learning`, and of so many `states`, elements that the
    optimizer keeps of them; but for buffers that a reduction or an update needs for a moment. ZeRO shares what its
    stage shares; stages 1 to 3 keep a master beside the weights (ZeRO, arXiv 1910.02054); stage 3 keeps those gathered
    that it used last. What is offloaded takes the host's memory.
    """
    stage, whole = train.zero_stage, 4 * learning
    shared = whole // world_size
    parts = {
        "weights": 4 * (parameters // world_size + min(parameters, _MOST_LIVE) if stage == 3 else parameters),
        "gradients": shared if stage >= 2 and train.micro_batch is None else whole,
    }
    if not train.offload_optimizer:
        if optim.ema is not None:
            parts["moving average"] = shared
        parts["optimizer states and master"] = 4 * states if stage == 0 else 4 * states // world_size + shared
    return parts


def host_bytes(learning: int, train: TrainConfig, optim: PlainOptimConfig, world_size: int) -> int:
    """Bytes of host memory that a rank's offloaded optimizer takes: master, gradients, its states, moving average."""
    tensors = 2 + len(STATES[optim.name]) + (optim.ema is not None)
    return tensors * 4 * learning // world_size if train.offload_optimizer else 0


def activation_bytes(
    model: nn.Module, rows: Callable[[int], Inputs], objectives: Mapping[str, Weighted], bf16: bool
) -> int:
    """Bytes that the backward keeps for one sample, its texts at full length: what two more add, halved. Arguments as
    of `memory`."""
    return (_saved_bytes(model, rows(4), objectives, bf16) - _saved_bytes(model, rows(2), objectives, bf16)) // 2


def _saved_bytes(model: nn.Module, inputs: Inputs, objectives: Mapping[str, Weighted], bf16: bool) -> int:
    device, seen = next(model.parameters()).device, dict[int, int]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs = to_device(inputs, device)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(device.type, enabled=bf16),
    ):
        outputs = model(inputs, wanted(objectives), lambda rows: _mined(rows, inputs, objectives))
    total = sum(seen.values())
    del outputs  # held until here, so that no address was used twice
    return total


def _mined(rows: Mapping[str, torch.Tensor], inputs: Inputs, objectives: Mapping[str, Weighted]) -> Inputs:
    """What objectives would mine among these samples."""
    own = {field: value.detach().float() for field, value in rows.items()}
    facts = {field: {"identity": torch.arange(len(value), device=value.device)} for field, value in rows.items()}
    found: Inputs = {}

    def draw(count: int) -> torch.Tensor:
        return torch.rand(len(next(iter(own.values()))), count, dtype=torch.float64)

    for name, one in objectives.items():
        if hasattr(one.objective, "mine"):
            for field, numbers in one.objective.mine(own, facts, draw).items():
                found[f"{field}#{name}"] = {key: row[numbers] for key, row in uncut(inputs[field]).items()}
    return found
