"""Ranks that do not answer are known to all others, also to those that have no connection to them."""

import os
import signal
import subprocess
import time

import torch.distributed as dist

from pretrain.process import peers
from pretrain.process.peers import Peers
from pretrain.process.runtime import start
from ranks import run_ranks

BEAT, SILENCE = 0.25, 1.5


def stop_for(seconds):
    """As SIGSTOP from outside, and SIGCONT later."""
    subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def rank_of(rank, world_size):
    peers._BEAT, peers._SILENCE = BEAT, SILENCE
    ours = Peers(start(distributed=True), lambda: None, lambda reason: None)
    said = [ours.blame("here")]
    for stopped in (2, 0):
        dist.barrier()
        if rank == stopped:
            stop_for(3 * SILENCE)
        else:
            time.sleep(2 * SILENCE)
            said.append(ours.blame("here"))
        dist.barrier()
        time.sleep(1.5 * SILENCE)  # it beats again
        said.append(ours.blame("here"))
    dist.barrier()
    stop_for(2 * SILENCE)  # all at once, as in a job that is suspended
    time.sleep(1.5 * SILENCE)
    said.append(ours.blame("here"))
    dist.barrier()
    ours.leave()
    return said


def test_stopped_ranks_are_named_by_all_others():
    said = run_ranks(3, rank_of)
    for rank, words in enumerate(said):
        named = [word.partition(" (process")[0] for word in words]
        stopped = [f"no answer from rank {other}" for other in (2, 0)]
        assert named == [
            "here",
            *([stopped[0]] if rank != 2 else []),
            "here",
            *([stopped[1]] if rank != 0 else []),
            "here",
            "here",
        ], (rank, words)
        assert all("stopped, or stuck in foreign code; here" in word for word in words if word != "here")
