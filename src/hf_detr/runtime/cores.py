"""The machine's cores and memory, for the process that computes and for those that load."""

import ctypes
import os
import sys

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # numbers of glibc's malloc.h


def use_all_cores(processes: int = 1) -> int:
    """Give this process its share of the machine's cores, and return how many that is.

    `accelerate launch` sets OMP_NUM_THREADS=1 unless told otherwise, which leaves all cores but one idle on a CPU. Any
    other value was chosen by someone and stays; without one, PyTorch has chosen well.

    Args:
        processes: processes that share this machine, unless the launcher says so itself (LOCAL_WORLD_SIZE).
    """
    if os.environ.get("OMP_NUM_THREADS") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", processes))))
    keep_freed_memory()
    return torch.get_num_threads()


def keep_freed_memory() -> None:
    """Ask the C library (glibc) to reuse freed blocks instead of giving them back to the kernel at once. A training
    step frees and allocates the same tensors again; clearing fresh pages can take as long as computing on them."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 256 << 20)):
            mallopt(option, value)
