"""The account of the samples of all ranks: expected, read and replaced in every epoch, and too many bad ones."""

from __future__ import annotations

from collections import Counter

from data_tools.errors import UserError
from pretrain.engine.state import TrainState
from pretrain.process.collectives import gather
from pretrain.report.metrics import Metrics
from pretrain.stream.bad import WORST_SHARDS, bad_ratio_error
from pretrain.stream.loader import TrainStream


class Ledger:
    """Kept by the loop on every rank; its methods are collective."""

    def __init__(self, stream: TrainStream, state: TrainState, metrics: Metrics):
        self._stream, self._state, self._metrics = stream, state, metrics
        self._counted = state.step

    def check(self) -> None:
        """Raises UserError on all ranks together, with the worst shards of all, where too many samples are bad."""
        bad, read = self._state.bad_samples, self._state.samples_seen
        if self._stream.too_many_bad(bad, read):
            worst = sum((Counter(shards) for shards in gather(dict(self._stream.account.by_shard))), Counter())
            raise bad_ratio_error(bad, read, self._stream.settings.max_bad_ratio, worst)

    def close_epoch(self, last: bool) -> None:
        """At the end of an epoch, and of the run if `last`: report what was expected, read and replaced since the
        account before. Raises UserError where ranks were given more or fewer samples than the order holds."""
        step, mixture = self._state.step, self._stream.mixture
        epoch = int(mixture.epochs_at(step - 1))
        if step == self._counted or not (last or int(mixture.epochs_at(step)) > epoch):
            return
        expected = mixture.samples_seen(step) - mixture.samples_seen(self._counted)
        parts = gather(self._stream.account.pop_counts(step))
        given = sum(part.given for part in parts)
        if given != expected:
            what = f"samples were lost or repeated in epoch {epoch}"
            raise UserError(what, got=f"{given} samples", expected=f"{expected} samples")
        kinds: Counter[str] = sum((part.by_kind for part in parts), Counter())
        shards: Counter[str] = sum((part.by_shard for part in parts), Counter())
        self._counted = step
        self._report(epoch, expected, kinds, shards)

    def _report(self, epoch: int, expected: int, kinds: Counter[str], shards: Counter[str]) -> None:
        replaced = kinds.total()
        values = {"expected": expected, "read": expected - replaced, "replaced": replaced}
        values |= {f"replaced_{kind}": count for kind, count in sorted(kinds.items())}
        # With nothing to tell of it is written down only: a small corpus has an epoch every few steps.
        step, seen = self._state.step, self._state.samples_seen
        self._metrics.write("data", step, seen, {"epoch": epoch, **values}, shows=replaced > 0)
        for shard, count in shards.most_common(WORST_SHARDS):
            self._metrics.note(f"  {count} replaced in {shard}")
