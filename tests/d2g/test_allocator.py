import platform
import resource
import subprocess
import sys

import pytest

PAGE_FAULTS = """
import resource, sys
import torch
from d2g.core.distributed import process_group
torch.set_num_threads(1)
device = process_group.init() if sys.argv[1] == "init" else torch.device("cpu")
def step():
    hidden = torch.ones(2**21, device=device) * 2
    return (hidden.relu() + 1).sum()
for _ in range(5):  # the heap grows to the size of a step
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(200):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 2**21 * 4 // resource.getpagesize()
"""Pages of one tensor of the step, 8 MiB."""


def page_faults(*words: str, **environment: str) -> int:
    """Count the page faults of 200 small steps in a subprocess, after `process_group.init()` if asked to."""
    output = subprocess.run(
        [sys.executable, "-c", PAGE_FAULTS, *words],
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": "", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(output.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the thresholds are glibc's")
def test_freed_cpu_tensors_keep_their_pages():
    # A step allocates three tensors. On average, fewer pages than a twentieth of one tensor may be new in it.
    # The average is over 200 steps, because the heap may still grow by one tensor, at a step that varies.
    assert page_faults("init") < 200 * PAGES / 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the thresholds are glibc's")
def test_malloc_thresholds_of_the_user_are_kept():
    assert page_faults("init", MALLOC_MMAP_THRESHOLD_="131072") > 200 * PAGES
