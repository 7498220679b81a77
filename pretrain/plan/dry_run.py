"""`--dry-run`: everything that can be known of a run before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from pretrain import assemble
from pretrain.config.durations import ENDLESS
from pretrain.config.reading import dump_config
from pretrain.config.tree import Config
from pretrain.engine.weights import describe
from pretrain.loop.timetable import make_schedule, run_steps
from pretrain.plan.memory import GIB, host_bytes, memory, sizes, too_much
from pretrain.pretraining import Evaluations, make_model, start_lines
from pretrain.process.runtime import Runtime, start
from pretrain.stream.loader import TrainStream
from pretrain.tasks import ContrastiveConfig
from pretrain.towers.adapt import described
from pretrain.towers.logits import warn_of_bias


def dry_run(config: ContrastiveConfig) -> int:
    """Resolve the settings, open the shards, build the model, look at the weights it would start from, and print what
    would run and how much memory it takes.

    Raises:
        UserError: whatever would end the run at its start.
    """
    runtime = start(distributed=False)
    config = assemble.settle_precision(config, runtime)
    reader = assemble.find_checkpoint(config, runtime)
    model = make_model(config, fresh=reader is None)
    fields = assemble.pair_fields(config, model.spec, model.rule, model.patch_shares)
    stream = assemble.train_stream(config, assemble.train_sources(config.data), fields, runtime)
    remarks = Evaluations(config, model, runtime).remarks(stream.corpus)
    description = describe(model.spec, **described(config.added()), **assemble.equipment_of(config.needs).described())
    assemble.start_state(reader, config, description, stream, runtime)
    lines = start_lines(model, config) if reader is None else []
    model.compiled = None  # activations are counted on plain towers: compiling takes minutes
    if runtime.is_main:
        doubt = warn_of_bias(config.objectives, config.train.global_batch)
        notes = [*lines, *filter(None, [doubt]), *model.remarks(), *remarks]
        print_plan(config, runtime, stream, model.spec.name, model, notes, memory(config, model, runtime))
    return 0


def print_plan(
    config: Config,
    runtime: Runtime,
    stream: TrainStream,
    name: str,
    model: nn.Module,
    notes: Sequence[str],
    parts: Mapping[str, int],
) -> None:
    """Print what a run would be: its settings, ranks, data, length, model and memory (`parts`: bytes by what they
    hold)."""
    steps = run_steps(config, stream)
    schedule = make_schedule(config, stream)
    print(dump_config(config))
    print(f"ranks:    {runtime}")
    print("\n".join(stream.describe()))
    length = "forever" if steps == ENDLESS else f"{steps} steps, {steps * config.train.global_batch} samples"
    print(f"run:      {length}, warmup {schedule.warmup} samples")
    size, learning = sizes(model)
    print(f"model:    {name}, {size:,} parameters, {learning:,} of them learn")
    for note in notes:
        print(note)
    for what, size in parts.items():
        print(f"memory:   {size / GIB:8.3f} GiB per rank, {what}")
    if warning := too_much(parts["total"], runtime):
        print(warning)
    host = host_bytes(learning, config.train, config.optim, runtime.world_size)
    if host:
        print(f"memory:   {host / GIB:8.3f} GiB of the host per rank, optimizer")
