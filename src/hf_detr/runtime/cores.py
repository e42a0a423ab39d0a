"""CPU threads, and what is kept for reuse: freed memory and oneDNN's kernels."""

import ctypes
import os
import sys

import torch

KEPT_KERNELS = 16_384  # oneDNN's default is 1,024; benchmarks/many_sizes.py compares them
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # constants of glibc's malloc.h


def available_cores() -> int:
    """The CPU cores that this process may use. Only Linux can restrict them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_all_cores(processes: int = 1) -> int:
    """Set PyTorch's number of threads to this process' fraction of the machine's cores, and return it.

    `accelerate launch` sets OMP_NUM_THREADS=1 by default, which leaves all other cores idle on a CPU. Any other value
    is kept, and without the variable PyTorch's own choice is kept. Freed memory is kept for reuse. oneDNN
    keeps up to `KEPT_KERNELS` kernels, unless ONEDNN_PRIMITIVE_CACHE_CAPACITY is set.

    Args:
        processes: processes on this machine; the launcher's LOCAL_WORLD_SIZE takes precedence.
    """
    if os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", processes))))
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_KERNELS))  # read at the first operation
    keep_freed_memory()
    return torch.get_num_threads()


def keep_freed_memory() -> None:
    """Make glibc reuse freed blocks instead of returning them to the kernel. A training step frees and allocates the
    same tensors again, and zeroing fresh pages can take as long as the computation."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 256 << 20)):
            mallopt(option, value)
