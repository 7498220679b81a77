"""What a run does about faults of its steps: leave out, list, explain."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from pretrain.config.tree import GuardConfig
from pretrain.engine.engine import NonFiniteError
from pretrain.engine.state import TrainState
from pretrain.process.collectives import gather
from pretrain.process.runtime import Runtime
from pretrain.report.journal import Journal
from pretrain.report.writes import Writes
from pretrain.stream.batches import Batch

WINDOW, ENOUGH = 32, 16  # losses a new one is compared with, at most and at least; a long window lags behind the fall


class Faults:
    """The steps that were left out (skipped.jsonl) and the spikes of the loss (spikes.jsonl), with the samples of all
    ranks. Its methods are collective. `note` prints a line.

    Raises:
        OSError: the files cannot be read.
    """

    def __init__(
        self, folder: Path, runtime: Runtime, state: TrainState, guard: GuardConfig, writes: Writes,
        note: Callable[[str], None],
    ):  # fmt: skip
        self._state, self._guard, self._note = state, guard, note
        self._skips = Journal(folder / "skipped.jsonl", runtime, state.step, writes)
        self._spikes = Journal(folder / "spikes.jsonl", runtime, state.step, writes)

    @property
    def may_skip(self) -> bool:
        """Whether `guard.max_skipped` allows for one more step to be left out."""
        return self._state.skipped < self._guard.max_skipped

    def skip(self, error: NonFiniteError, batch: Batch, own_loss: float) -> None:
        """Count and list the step of `batch`, which made no update because of `error`."""
        state = self._state
        state.skipped += 1
        self._skips.write({"step": state.step + 1, "epoch": batch.epoch}, own_loss, batch.keys)
        so_far = f"{state.skipped} of {self._guard.max_skipped}"
        self._note(f"step {state.step + 1} left out on all ranks ({so_far}): {error}; see skipped.jsonl")

    def watch(self, batch: Batch, own_loss: float, loss: float) -> None:
        """List the step of `batch` where the mean `loss` over the ranks is a spike."""
        state = self._state
        found = None if self._guard.spike is None else spike(loss, state.recent_losses, self._guard.spike)
        if found is not None:
            expected, threshold = found
            row = {"step": state.step, "epoch": batch.epoch, "loss": loss, "expected": expected, "threshold": threshold}
            self._spikes.write(row, own_loss, batch.keys)
            text = f"loss {loss:.4g} where {expected:.4g} was expected, at most {threshold:.4g}"
            self._note(f"loss spike at step {state.step}: {text}; its samples are in spikes.jsonl")


def explain(
    error: NonFiniteError, step: int, own_loss: float, own_keys: Sequence[str], checkpoint: object
) -> NonFiniteError:
    """What ended the run at `step`: the ranks whose loss is not finite and the samples whose features are not, of which
    `own_keys` are this rank's. `checkpoint`: the last one. All ranks must call it."""
    losses, keys = gather(own_loss), gather(list(own_keys))
    ranks = [rank for rank, value in enumerate(losses) if not math.isfinite(value)]
    samples = [f"{key} (rank {rank})" for rank, own in enumerate(keys) for key in own][:5]
    return NonFiniteError(
        f"step {step} was stopped before its update: {error}",
        got=f"loss not finite on ranks {ranks or 'none'}"
        + (f", features not finite of samples {', '.join(samples)}" if samples else ", all features finite"),
        remedy=f"last good checkpoint: {checkpoint or 'none yet'}; look at the samples, lower optim.lr "
        "or set optim.grad_clip",
    )


def spike(loss: float, recent: list[float], sensitivity: float) -> tuple[float, float] | None:
    """Add a finite `loss` to the `recent` ones; (expected, threshold) where it is a spike, else None.

    The Hampel identifier (Hampel 1974, JASA 69:383; Leys et al. 2013, J. Exp. Soc. Psychol. 49:764): the threshold is
    the median plus `sensitivity` times 1.4826 * MAD, the standard deviation of normal noise. Half of the window may be
    outliers and move neither, so spikes need no weeding out and a new level is accepted after half a window. Only a
    rise counts. A deviation under 1 % of the median is taken as 1 %: flat losses would make any rise a spike.
    """
    verdict = None
    if len(recent) >= ENOUGH:
        median = statistics.median(recent)
        deviation = 1.4826 * statistics.median(abs(value - median) for value in recent)
        threshold = median + sensitivity * max(deviation, 0.01 * abs(median))
        verdict = (median, threshold) if loss > threshold else None
    recent.append(loss)
    del recent[:-WINDOW]
    return verdict
