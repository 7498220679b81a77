"""The process as training sets it up."""

import os
import subprocess
import sys

import pytest

from packing import ROOT

ALLOCATING = """
import resource
import numpy as np
from pretrain.process.runtime import start

start(distributed=False)
faults = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 20)  # 8 MiB, 2,048 pages
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(max(faults[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's malloc")
@pytest.mark.parametrize(("environment", "kept"), [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "65536"}, False)])
def test_freed_memory_is_used_again_unless_the_environment_says_otherwise(environment, kept):
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    plain |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATING], env=plain | environment, capture_output=True, text=True, check=True
    )
    faults = int(done.stdout.splitlines()[-1])
    assert faults < 100 if kept else faults > 500
