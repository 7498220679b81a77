"""What a run goes on from: its newest checkpoint, found before anything is built and judged by the settings."""

from __future__ import annotations

from data_tools.errors import UserError, shown
from pretrain.config.recorded import changes
from pretrain.config.tree import RunConfig
from pretrain.engine.checkpoint import Checkpoints
from pretrain.engine.committed import SETTINGS
from pretrain.engine.reader import CheckpointReader
from pretrain.engine.state import TrainState
from pretrain.process.runtime import Runtime
from pretrain.stream.loader import TrainStream
from pretrain.stream.position import Position
from pretrain.towers.dropout import without_dropout


def find_checkpoint(run: RunConfig, runtime: Runtime) -> CheckpointReader | None:
    """The checkpoint that the run goes on from; None: it starts afresh. To be asked first, for what only a start reads
    may be gone when a run goes on. All ranks must call it.

    Raises:
        UserError: run.resume=never in a folder that holds one; checkpoints of which none is intact.
    """
    found = Checkpoints(run.dir, runtime).find()
    if found is not None and run.resume == "never":
        raise UserError(
            f"run.dir {run.dir} already holds {found.name}",
            expected="an empty folder, because run.resume=never",
            remedy="choose another run.dir, or run.resume=auto to go on from it",
        )
    return None if found is None else CheckpointReader(found)


def start_state(
    reader: CheckpointReader | None, description: dict, settings: str, stream: TrainStream, runtime: Runtime
) -> TrainState:
    """The state that the run starts from, that of `find_checkpoint`'s; `stream` is set to go on from there.

    Args:
        description: of the model, as the settings have it now.
        settings: all of them, as YAML.

    Raises:
        UserError: another model, corpus, seed or window; a global batch that C does not divide.
    """
    if reader is None:
        return TrainState(position=stream.position(0).to_dict())
    found, state = reader.folder, reader.state()
    saved, now = without_dropout(reader.model()), without_dropout(description)
    if saved != now:
        raise UserError(
            f"{found} was written by another model",
            got=_first_difference(saved, now),
            remedy="choose another run.dir, or set the model and the loss it was trained with",
        )
    stream.go_on_from(Position.from_dict(state.position))
    if runtime.is_main:
        print(f"resuming from {found} (step {state.step}, {state.samples_seen} samples)", flush=True)
        if lines := changes((found / SETTINGS).read_text(errors="replace"), settings):
            print("settings changed since that checkpoint:\n  " + "\n  ".join(lines), flush=True)
    return state


def _first_difference(saved: object, now: object, path: str = "model") -> str:
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in sorted(set(saved) | set(now)):
            if saved.get(key) != now.get(key):
                return _first_difference(saved.get(key), now.get(key), f"{path}.{key}")
    if isinstance(saved, list) and isinstance(now, list):
        if len(saved) != len(now):
            return f"{path}: {len(now)} of them where the checkpoint has {len(saved)}"
        place = next(place for place, pair in enumerate(zip(saved, now, strict=True)) if pair[0] != pair[1])
        return _first_difference(saved[place], now[place], f"{path}.{place}")
    return f"{path}: {shown(repr(now))} where the checkpoint has {shown(repr(saved))}"
