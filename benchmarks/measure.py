"""Timing two implementations against each other, fairly on a noisy machine."""

import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers


def compare(ours: Callable[[], object], theirs: Callable[[], object], repeats: int = 15) -> dict[str, float]:
    """Both in turn in one process, after two warm-up rounds: medians and quartile spreads in ms, and their ratio."""
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for round_number in range(repeats + 2):
        for name, function in (("ours", ours), ("theirs", theirs)):
            started = time.perf_counter()
            function()
            if round_number >= 2:
                times[name].append((time.perf_counter() - started) * 1e3)
    row = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        row |= {name: median, f"{name}_spread": (high - low) / 2}
    return row | {"ratio": row["theirs"] / row["ours"]}


def median(run: Callable[[], object], repeats: int) -> float:
    """In ms, after two warm-up rounds."""
    times = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[2:])


def machine() -> str:
    return (
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def print_table(title: str, rows: dict[str, dict[str, float]], peer: str = "transformers") -> None:
    print(f"\n{title} ({machine()})\n\n| case | ours, ms | {peer}, ms | ratio |\n|---|---|---|---|")
    for case, row in rows.items():
        ours, theirs = (f"{row[n]:.1f} ± {row[n + '_spread']:.1f}" for n in ("ours", "theirs"))
        print(f"| {case} | {ours} | {theirs} | {row['ratio']:.1f}x |")
