"""Packing a plan."""

from pathlib import Path

from data_tools.build.run import Build, Report, run_build
from data_tools.pack.plan import Plan
from data_tools.pack.shard import ShardTask, pack_shard


def run_plan(plan: Plan, folder: Path, workers: int) -> Report:
    """Bring `folder` to hold exactly the plan's shards: see `run_build`."""
    names = [plan.shard_name(number) for number in range(len(plan.shards))]
    rows = [sum(len(item.rows) for item in items) for items in plan.shards]
    labels = plan.source.labels
    classes = None if labels is None else {label: place for place, label in enumerate(labels)}

    def task(number: int) -> ShardTask:
        items, limits = plan.shards[number], plan.settings.limits
        return ShardTask(folder, names[number], plan.source.root, items, limits, plan.extension, classes, plan.digest)

    build = Build("packing", plan.config, plan.digest, names, rows, task, pack_shard, labels or ())
    return run_build(build, folder, workers)
