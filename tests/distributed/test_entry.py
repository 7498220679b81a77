"""How ranks end that meet the same fault, one of them later: it is said once, and the rank with the store ends last."""

import os
import subprocess
import sys

import pytest

from packing import ROOT

RANK = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from data_tools.errors import UserError
from pretrain.process.entry import run_entry

rank, late, port = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
if rank == 0:
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    port.with_suffix(".new").write_text(str(store.port))
    port.with_suffix(".new").rename(port)
else:
    while not port.exists():
        time.sleep(0.01)
    store = dist.TCPStore("127.0.0.1", int(port.read_text()), 2, is_master=False)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)

def main(arguments):
    dist.barrier()
    if rank == 1:
        time.sleep(float(late))
    raise UserError("the batch does not fit")

run_entry(main, [])
"""


def end(tmp_path, late):
    """(exit code, stderr) of both ranks, of which rank 1 meets the fault `late` seconds after rank 0."""
    words = [str(late), str(tmp_path / "port")]
    env = {**os.environ, "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), *words], env=env, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    return [(rank.returncode, errors) for rank, (_, errors) in [(rank, rank.communicate(timeout=60)) for rank in ranks]]


@pytest.mark.parametrize("late", [0, 1.5])
def test_a_fault_of_all_ranks_is_said_once(tmp_path, late):
    codes, errors = zip(*end(tmp_path, late), strict=True)
    assert codes == (1, 1)
    assert "".join(errors).count("error: the batch does not fit") == 1, errors


def test_a_rank_that_does_not_come_is_not_waited_for_long(tmp_path):
    codes, errors = zip(*end(tmp_path, 12), strict=True)
    assert codes == (1, 1)
    assert all("error: the batch does not fit" in text for text in errors)  # the store was gone: it could not know
