"""run.dir: shared by all ranks or refused on all of them, and what a failure on one rank tells the others."""

from data_tools.errors import UserError
from pretrain import assemble
from pretrain.config import PretrainConfig, RunConfig
from pretrain.runtime import start, together
from ranks import run_ranks


def claim(rank, world_size, folders):
    config = PretrainConfig(run=RunConfig(dir=str(folders[rank])))
    try:
        assemble.claim_run_dir(config, start(distributed=True))
    except UserError as error:
        return str(error)


def test_a_shared_folder_is_claimed_and_left_clean(tmp_path):
    assert run_ranks(2, claim, [tmp_path / "run"] * 2) == [None, None]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_folders_that_are_not_shared_are_refused_on_every_rank(tmp_path):
    """As on two hosts, where one path means two folders."""
    (tmp_path / "b").mkdir()
    first, second = run_ranks(2, claim, [tmp_path / "a", tmp_path / "b"])
    assert first == second
    assert "is not shared by all hosts" in first
    assert "remedy: set run.dir to a shared file system" in first


def fail_alone(rank, world_size):
    def action():
        if rank == 1:
            raise PermissionError(13, "Permission denied", "x")

    start(distributed=True)
    try:
        together(action, "writing")
    except UserError as error:
        return str(error)


def test_a_fault_of_one_rank_is_raised_on_all():
    messages = run_ranks(4, fail_alone)
    assert len(set(messages)) == 1
    assert "writing failed on rank 1" in messages[0]
    assert "Permission denied" in messages[0]
