"""The contrastive step with or without a gradient cache (GradCache, arXiv 2101.06983).

All features are computed without a graph; the loss over the whole batch gives the gradient of every feature; then each
micro-batch runs again with a graph and hands its features' gradients on. Gradients are those of the uncached step: they
are summed, those of logit scale and bias are counted once, and the second pass replays the random numbers of the first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from pretrain.engine.engine import Engine
from pretrain.report.profiling import profiled
from pretrain.towers.model import Inputs, to_device

Tensors = dict[str, torch.Tensor]
Loss = Callable[[Tensors, Tensors], torch.Tensor]  # of rows by field, and of shared scalars by name


def contrastive_backward(engine: Engine, parts: Sequence[Inputs], loss_fn: Loss) -> torch.Tensor:
    """Gradients of the global batch's loss; returns this rank's share of it, detached. All ranks must call it, each
    with as many `parts`, its micro-batches. These may lie on the host: the device then holds one at a time."""
    if len(parts) == 1:
        outputs = engine(to_device(parts[0], engine.device))
        with profiled("loss"):
            loss = loss_fn(outputs["rows"], outputs["shared"])
        engine.backward(loss)
        return loss.detach()
    rows, shared, sizes, states = _first_pass(engine, parts)
    with profiled("loss"):
        loss = loss_fn(rows, shared)
        loss.backward()
    pieces = {field: _grad(leaf).split(sizes) for field, leaf in rows.items()}
    once = {name: _grad(leaf) for name, leaf in shared.items()}
    replays = []
    for index, inputs in enumerate(parts):
        row_grads = {field: grads[index] for field, grads in pieces.items()}
        shared_grads = once if index == 0 else {name: torch.zeros_like(grad) for name, grad in once.items()}
        replays.append(functools.partial(_replay, engine, inputs, row_grads, shared_grads, states[index]))
    engine.accumulate(replays)
    return loss.detach()


@torch.no_grad()
def _first_pass(engine: Engine, parts: Sequence[Inputs]) -> tuple[Tensors, Tensors, list[int], list[tuple]]:
    """Rows of all parts and the shared scalars, as leaves; rows of each part; the random states before each."""
    outputs, states = [], []
    for inputs in parts:
        states.append(_rng_state(engine.device))
        outputs.append(engine(to_device(inputs, engine.device)))
    fields = outputs[0]["rows"]
    rows = {field: torch.cat([output["rows"][field] for output in outputs]) for field in fields}
    shared = {name: value.clone() for name, value in outputs[-1]["shared"].items()}
    sizes = [len(next(iter(output["rows"].values()))) for output in outputs]
    leaves = ({name: value.detach().requires_grad_() for name, value in found.items()} for found in (rows, shared))
    return *leaves, sizes, states


def _grad(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _replay(engine: Engine, inputs: Inputs, row_grads: Tensors, shared_grads: Tensors, state: tuple) -> None:
    _set_rng_state(engine.device, state)
    outputs = engine(to_device(inputs, engine.device))
    pairs = [(outputs["rows"][field], grad) for field, grad in row_grads.items()]
    # The zero-weighted scalars keep the graph alike on every micro-batch, which ZeRO-3 needs.
    pairs += [(outputs["shared"][name], grad) for name, grad in shared_grads.items()]
    engine.backward(sum((output * grad).sum() for output, grad in pairs))


def _rng_state(device: torch.device) -> tuple:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_rng_state(device: torch.device, state: tuple) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
