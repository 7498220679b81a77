"""`--dry-run`: everything that can be known of a run before it starts."""

from __future__ import annotations

from pretrain.config.durations import ENDLESS
from pretrain.config.reading import dump_config
from pretrain.job import prepare
from pretrain.loop.timetable import make_schedule, run_steps
from pretrain.objectives.objective import build
from pretrain.plan.memory import GIB, host_bytes, memory, sizes, too_much
from pretrain.process.runtime import start
from pretrain.tasks import TaskConfig
from pretrain.towers.parts import towers_of


def dry_run(config: TaskConfig) -> int:
    """Resolve the settings, open the shards, build the model, look at the weights it would start from, and print what
    would run and how much memory it takes; returns the exit code.

    Raises:
        UserError: whatever would end the run at its start.
    """
    runtime = start(distributed=False)
    ready = prepare(config, runtime)
    config, stream, model = ready.recipe.config, ready.stream, ready.model
    steps, schedule = run_steps(config, stream), make_schedule(config, stream)
    if not runtime.is_main:
        return 0
    print(dump_config(config))
    print(f"ranks:    {runtime}")
    print("\n".join(stream.describe()))
    length = "forever" if steps == ENDLESS else f"{steps} steps, {steps * config.train.global_batch} samples"
    print(f"run:      {length}, warmup {schedule.warmup} samples")
    size, learning = sizes(model)
    print(f"model:    {model.spec.name}, {size:,} parameters, {learning:,} of them learn")
    for line in ready.lines:
        print(line)
    towers_of(model).compiled = None  # activations are counted on plain towers: compiling takes minutes
    parts = memory(config, model, stream.rows, build(ready.recipe.objectives), runtime)
    for what, size in parts.items():
        print(f"memory:   {size / GIB:8.3f} GiB per rank, {what}")
    if warning := too_much(parts["total"], runtime):
        print(warning)
    host = host_bytes(learning, config.train, config.optim, runtime.world_size)
    if host:
        print(f"memory:   {host / GIB:8.3f} GiB of the host per rank, optimizer")
    return 0
