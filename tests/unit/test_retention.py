"""Which checkpoints stay, and how the folder looks after each commit."""

import json

import pytest

from data_tools.errors import UserError
from pretrain.engine import committed
from pretrain.engine.committed import Retention, commit, prepare, step_folder, step_of, temporary_folder


def save(folder, step, retention, values=None):
    """Commit a checkpoint with one small file per rank, as `Checkpoints` does."""
    final = step_folder(folder, step)
    temporary = temporary_folder(final)
    prepare(temporary)
    (temporary / "rank-0").write_text("tensors")
    small = {"state.json": "{}"} | ({committed.METRICS: json.dumps(values)} if values else {})
    commit(temporary, final, [committed.file_entry(temporary / "rank-0")], small, retention)


def steps(folder):
    return [step_of(path) for path in committed.committed(folder)]


def pointer(folder, name):
    return (folder / name).read_text().strip()


def test_the_newest_and_every_multiple_stay(tmp_path):
    for step in range(1, 13):
        save(tmp_path, step, Retention(keep=2, keep_every=5))
    assert steps(tmp_path) == [5, 10, 11, 12]
    assert pointer(tmp_path, "latest") == "step-000000012"
    assert not (tmp_path / "best").exists()
    assert {path.name for path in tmp_path.glob(".*")} == set()


@pytest.mark.parametrize(("metric", "best"), [("recall", 3), ("-loss", 2)])
def test_the_best_evaluated_one_stays(metric, best, tmp_path):
    retention = Retention(keep=2, keep_best=metric)
    recall, loss = {2: 0.5, 3: 0.75, 4: 0.75, 6: 0.25}, {2: 1.0, 3: 2.0, 4: 3.0, 6: 1.5}
    for step in range(1, 8):
        save(tmp_path, step, retention, {"recall": recall[step], "loss": loss[step]} if step in recall else None)
        evaluated = [past for past in recall if past <= step]
        assert (tmp_path / "best").exists() == bool(evaluated)
    assert steps(tmp_path) == [best, 6, 7]
    assert pointer(tmp_path, "best") == f"step-{best:09d}"
    save(tmp_path, 8, Retention(keep=2))  # the rule is dropped: so is the pointer
    assert steps(tmp_path) == [7, 8]
    assert not (tmp_path / "best").exists()


def test_a_damaged_one_that_the_run_passed_over_is_no_spare(tmp_path):
    for step in (100, 200):
        save(tmp_path, step, Retention(keep=2), {"recall": step / 1000})
    (step_folder(tmp_path, 200) / "rank-0").write_text("torn")
    save(tmp_path, 150, Retention(keep=2, keep_best="recall"), {"recall": 0.05})  # the run went on from step 100
    assert steps(tmp_path) == [100, 150]
    assert pointer(tmp_path, "best") == "step-000000100"


def test_a_file_that_is_not_as_it_was_written_is_not_committed(tmp_path):
    save(tmp_path, 1, Retention())
    final = step_folder(tmp_path, 2)
    prepare(temporary_folder(final))
    (temporary_folder(final) / "rank-0").write_text("short")
    with pytest.raises(UserError, match="got 5 bytes; expected 7"):
        commit(temporary_folder(final), final, [{"name": "rank-0", "bytes": 7}], {}, Retention())
    assert steps(tmp_path) == [1]
