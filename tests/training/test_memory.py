"""Freed memory stays with the process: a second round of allocations faults no new pages in."""

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
from fastalign.training.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(50_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    assert keep_freed_memory()
faults()
print(faults())
"""


def faults(argument: str) -> int:
    """Pages of 4 kB that five allocations of 200 MB fault in, in a process of its own."""
    command = [sys.executable, "-c", CODE, argument]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
def test_memory_is_not_faulted_in_again():
    assert faults("keep") < 1000 < faults("default")
