"""The one way from a batch to gradients, for every objective, with or without a gradient cache.

What objectives over the whole batch ask of a row is known only once all rows are, so a batch of several micro-batches
runs twice (GradCache, arXiv 2101.06983): the rows that are compared, without a graph; the losses, which give the
gradient of each; then every micro-batch again, whole and with a graph, which hands these on. Losses of single samples
need no such pass: they are taken where their micro-batch has its graph. Gradients are those of one forward of the whole
batch: they are summed, what the losses over the batch ask of shared scalars counts once, and the second pass replays
the first one's random numbers.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from zlib import crc32

import torch

from pretrain.engine.engine import Engine
from pretrain.engine.exchange import exchange
from pretrain.objectives.objective import Draw, Facts, Mining, OverBatch, PerSample, Weighted, wanted
from pretrain.objectives.tiles import world
from pretrain.process.collectives import all_reduce_sum
from pretrain.report.profiling import profiled
from pretrain.towers.cut import uncut
from pretrain.towers.model import Inputs, Rows, to_device

Tensors = dict[str, torch.Tensor]
_FACTS = ("identity", "present")  # rows of a field that losses over the batch may ask for


def backward(
    engine: Engine, parts: Sequence[Inputs], objectives: Mapping[str, Weighted], samples_seen: int
) -> dict[str, torch.Tensor]:
    """Gradients of the weighted sum of `objectives`, by name, over the global batch.

    All ranks must call it, each with as many `parts` of as many samples, its micro-batches; these may lie on the host:
    the device then holds one at a time. `samples_seen`, before this batch, seeds what is drawn to mine.

    Returns:
        This rank's share of what was minimised, `loss`, and of each objective under its name, before its weight; 0-dim,
        detached. Their means over ranks are the global batch's.
    """
    step = _Step(engine, parts, objectives, samples_seen)
    if len(parts) == 1:
        step.at_once()
    elif step.over or step.mining:
        step.cached()
    else:
        engine.accumulate([functools.partial(step.alone, inputs) for inputs in parts])
    return step.values()


class _Step:
    """One step's objectives and what they have given so far."""

    def __init__(self, engine: Engine, parts: Sequence[Inputs], objectives: Mapping[str, Weighted], samples_seen: int):
        self.engine, self.parts, self.objectives, self.samples_seen = engine, parts, objectives, samples_seen
        self.over: dict[str, OverBatch] = {}
        self.per: dict[str, PerSample] = {}
        for name, weighted in objectives.items():
            if isinstance(weighted.objective, PerSample):
                self.per[name] = weighted.objective
            else:
                self.over[name] = weighted.objective
        self.mining = {name: objective for name, objective in self.per.items() if isinstance(objective, Mining)}
        compared = [objective.reads for objective in self.over.values()]
        self.reads = frozenset[str]().union(*compared, *(objective.reads for objective in self.mining.values()))
        # Heads that give rows to losses over the batch are asked with the rows; the others where there is a graph.
        self.first = frozenset[str]().union(*(getattr(objective, "wants", ()) for objective in self.over.values()))
        self.want = wanted(objectives)
        self._shares = self._count()
        self._seen: dict[str, torch.Tensor] = {}

    def values(self) -> dict[str, torch.Tensor]:
        """What `backward` returns."""
        by_name = {name: self._seen[name] for name in self.objectives}
        weighted = [_times(value, self.objectives[name].weight) for name, value in by_name.items()]
        return {"loss": functools.reduce(operator.add, weighted), **by_name}

    def at_once(self) -> None:
        """One forward, and mining within it. What the model gave is let go before the backward, which frees it as it
        goes: so the loss comes from a function of its own, here and below."""
        self.engine.backward(self._loss_at_once())

    def alone(self, inputs: Inputs) -> None:
        """A micro-batch of losses of single samples alone."""
        self.engine.backward(self._loss_of(inputs))

    def _loss_at_once(self) -> torch.Tensor:
        inputs = to_device(self.parts[0], self.engine.device)
        facts = _facts([inputs])
        mined: Inputs = {}

        def between(rows: Tensors) -> Inputs:
            mined.update(self._mine(rows, facts, [inputs]))
            return mined

        outputs = self.engine(inputs, self.want, between if self.mining else None)
        with profiled("loss"):
            terms = self._over_batch(outputs["rows"], outputs["shared"], facts)
            terms += self._per_sample(outputs, inputs | mined)
        return functools.reduce(operator.add, terms)

    def _loss_of(self, inputs: Inputs) -> torch.Tensor:
        inputs = to_device(inputs, self.engine.device)
        outputs = self.engine(inputs, self.want)
        with profiled("loss"):
            terms = self._per_sample(outputs, inputs)
        return functools.reduce(operator.add, terms)

    def cached(self) -> None:
        """The rows that are compared, the losses over them, and every micro-batch again."""
        rows, shared, sizes, states = self._first_pass()
        facts = to_device(_facts(self.parts), self.engine.device)
        with profiled("loss"):
            if terms := self._over_batch(rows, shared, facts):
                functools.reduce(operator.add, terms).backward()
            mined = self._mine(rows, facts, self.parts)
        grads = {field: _grad(leaf).split(sizes) for field, leaf in rows.items()}
        once = {name: _grad(leaf) for name, leaf in shared.items()}
        more = {f: {name: value.split(sizes) for name, value in values.items()} for f, values in mined.items()}
        replays = []
        for index, inputs in enumerate(self.parts):
            own = {field: {name: pieces[index] for name, pieces in values.items()} for field, values in more.items()}
            row_grads = {field: pieces[index] for field, pieces in grads.items()}
            shared_grads = once if index == 0 else {name: torch.zeros_like(grad) for name, grad in once.items()}
            replays.append(functools.partial(self._replay, inputs | own, row_grads, shared_grads, states[index]))
        self.engine.accumulate(replays)

    @torch.no_grad()
    def _first_pass(self) -> tuple[Tensors, Tensors, list[int], list[tuple]]:
        """Rows of all parts and the shared scalars, as leaves; rows of each part, if any; the random states before
        each."""
        outputs, states = [], []
        for inputs in self.parts:
            states.append(_rng_state(self.engine.device))
            read = {field: own for field, own in inputs.items() if field in self.reads}
            outputs.append(self.engine(to_device(read, self.engine.device), self.first))
        rows = {field: torch.cat([output["rows"][field] for output in outputs]) for field in outputs[0]["rows"]}
        shared = {name: value.clone() for name, value in outputs[-1]["shared"].items()}
        sizes = [len(next(iter(output["rows"].values()), ())) for output in outputs]
        return _leaves(rows), _leaves(shared), sizes, states

    def _replay(self, inputs: Inputs, row_grads: Tensors, shared_grads: Tensors, state: tuple) -> None:
        _set_rng_state(self.engine.device, state)
        in_order = sorted(inputs, key=lambda field: field not in self.reads)  # of the first pass and its random numbers
        inputs = to_device({field: inputs[field] for field in in_order}, self.engine.device)
        outputs = self.engine(inputs, self.want)
        pairs = [(outputs["rows"][field], grad) for field, grad in row_grads.items()]
        # The zero-weighted scalars keep the graph alike on every micro-batch, which ZeRO-3 needs.
        pairs += [(outputs["shared"][name], grad) for name, grad in shared_grads.items()]
        surrogate = sum((output * grad).sum() for output, grad in pairs)
        with profiled("loss"):
            terms = self._per_sample(outputs, inputs)
        self.engine.backward(functools.reduce(operator.add, [surrogate, *terms]))

    def _over_batch(self, rows: Tensors, shared: Tensors, facts: Facts) -> list[torch.Tensor]:
        return [self._term(name, objective.loss(rows, shared, facts)) for name, objective in self.over.items()]

    def _per_sample(self, outputs: Mapping, inputs: Inputs) -> list[torch.Tensor]:
        return [
            self._term(name, objective.loss(outputs, inputs) / self._shares[name])
            for name, objective in self.per.items()
        ]

    def _term(self, name: str, value: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self._seen[name] = self._seen[name] + value if name in self._seen else value.detach()
        return _times(value, self.objectives[name].weight)

    def _count(self) -> dict[str, float]:
        """By what each objective of single samples divides its sums: a rank's equal share of the global count, because
        gradients are averaged over ranks. One all-reduce, and none where all ranks know the count."""
        counts = {name: [o.count(inputs) for inputs in self.parts] for name, o in self.per.items()}
        shares = {name: sum(map(float, found)) for name, found in counts.items()}
        varying = [name for name, found in counts.items() if any(torch.is_tensor(count) for count in found)]
        if varying:
            totals = all_reduce_sum([shares[name] for name in varying])
            shares |= {name: max(total, 1.0) / world()[1] for name, total in zip(varying, totals, strict=True)}
        return shares

    @torch.no_grad()
    def _mine(self, rows: Tensors, facts: Facts, parts: Sequence[Inputs]) -> Inputs:
        """The inputs that objectives have mined by this rank's `rows`, fetched from wherever they lie."""
        found: dict[str, Rows] = {}
        with torch.autocast(self.engine.device.type, enabled=False):
            own = {field: value.detach().float() for field, value in rows.items()} if self.mining else {}
            for name, objective in self.mining.items():
                for field, numbers in objective.mine(own, facts, self._draw(name, own)).items():
                    held = _joined([{field: inputs[field]} for inputs in parts])[field]
                    found[f"{field}#{name}"] = exchange(held, numbers, self.engine.device)
        return found

    def _draw(self, name: str, rows: Tensors) -> Draw:
        """Uniform numbers for each of this rank's rows, which follow from the objective's name and the row's place in
        the run alone."""
        like = next(iter(rows.values()))
        rank, size = world()
        seed = (crc32(name.encode()) << 31) ^ self.samples_seen

        def draw(count: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(seed)
            whole = torch.rand(size * len(like), count, generator=generator, dtype=torch.float64)
            return whole[rank * len(like) : (rank + 1) * len(like)].to(like.device)

        return draw


def _times(value: torch.Tensor, weight: float) -> torch.Tensor:
    return value if weight == 1 else weight * value


def _leaves(values: Tensors) -> Tensors:
    return {name: value.detach().requires_grad_() for name, value in values.items()}


def _grad(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _facts(parts: Sequence[Inputs]) -> Inputs:
    """The rows that say something of a sample, of all parts."""
    named = [{field: {n: rows[n] for n in _FACTS if n in rows} for field, rows in inputs.items()} for inputs in parts]
    return _joined(named)


def _joined(parts: Sequence[Inputs]) -> Inputs:
    """All parts as one, without what the cut made of each one's texts."""
    if len(parts) == 1:
        return parts[0]
    return {
        field: {name: torch.cat([inputs[field][name] for inputs in parts]) for name in uncut(rows)}
        for field, rows in parts[0].items()
    }


def _rng_state(device: torch.device) -> tuple:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_rng_state(device: torch.device, state: tuple) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
