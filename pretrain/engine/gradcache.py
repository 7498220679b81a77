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
from pretrain.report.profiling import part

Loss = Callable[..., torch.Tensor]  # of what the towers' forward gives: images, texts, and a scalar or two
MicroBatch = tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor | None]  # what the towers' forward takes


def contrastive_backward(engine: Engine, micro_batches: Sequence[MicroBatch], loss_fn: Loss) -> torch.Tensor:
    """Gradients of the global batch's loss; returns this rank's share of it, detached. All ranks must call it,
    each with as many micro-batches. These may lie on the host: the device then holds one at a time."""
    if len(micro_batches) == 1:
        outputs = engine(*on_device(micro_batches[0], engine.device))
        with part("loss"):
            loss = loss_fn(*outputs)
        engine.backward(loss)
        return loss.detach()
    leaves, states = _features(engine, micro_batches)
    with part("loss"):
        loss = loss_fn(*leaves)
        loss.backward()
    image_grad, text_grad, *once = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    size = len(micro_batches[0][0])
    replays = []
    for index, micro_batch in enumerate(micro_batches):
        rows = slice(index * size, (index + 1) * size)
        scalar_grads = once if index == 0 else [torch.zeros_like(grad) for grad in once]
        grads = (image_grad[rows], text_grad[rows], *scalar_grads)
        replays.append(functools.partial(_replay, engine, micro_batch, grads, states[index]))
    engine.accumulate(replays)
    return loss.detach()


@torch.no_grad()
def _features(engine: Engine, micro_batches: Sequence[MicroBatch]) -> tuple[list[torch.Tensor], list]:
    images, texts, states, scalars = [], [], [], []
    for micro_batch in micro_batches:
        states.append(_rng_state(engine.device))
        image, text, *scalars = engine(*on_device(micro_batch, engine.device))
        images.append(image)
        texts.append(text)
    leaves = [torch.cat(images), torch.cat(texts), *(scalar.clone() for scalar in scalars)]
    return [leaf.detach().requires_grad_() for leaf in leaves], states


def _replay(engine: Engine, micro_batch: MicroBatch, grads: Sequence[torch.Tensor], state: tuple) -> None:
    _set_rng_state(engine.device, state)
    outputs = engine(*on_device(micro_batch, engine.device))
    # The zero-weighted scalars keep the graph alike on every micro-batch, which ZeRO-3 needs.
    surrogate = sum((output * grad).sum() for output, grad in zip(outputs, grads, strict=True))
    engine.backward(surrogate)


def on_device(micro_batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The same on `device`; copies overlap with computation where the host memory is pinned."""
    images, texts, bits = micro_batch
    bits = None if bits is None else bits.to(device, non_blocking=True)
    texts = {name: row.to(device, non_blocking=True) for name, row in texts.items()}
    return images.to(device, non_blocking=True), texts, bits


def _rng_state(device: torch.device) -> tuple:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_rng_state(device: torch.device, state: tuple) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
