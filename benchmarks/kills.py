"""Kill a training run with SIGKILL at random moments, start it again with the same command, and compare its results,
bit by bit, with those of a run that was not interrupted.

    python benchmarks/kills.py --kills 20
    python benchmarks/kills.py --kills 9 --vary CHECKPOINT

The run is short but complete: epochs, evaluations, and a checkpoint after every optimizer step, so that about as many
kills hit a write as a computation. Dropout and denoising draw random numbers, and the average of the weights has state.

With `--vary`, a run that starts from a checkpoint of the drawn shapes continues after each kill with another number of
processes, batch size or accumulation, wherever that is possible: where its newest checkpoint is of the end of an epoch.
Its learning rate and AP are compared, epoch by epoch, with those of two undisturbed runs with different seeds.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from safetensors.torch import load_file

from hf_detr.data import draw_shapes_dataset
from hf_detr.training.checkpoints import newest_checkpoint

FINETUNE = Path(__file__).parents[1] / "examples" / "finetune.py"
OPTIONS = [
    "--quick", "--batch_size", "4", "--set", "dropout=0.1", "--ema", "0.99", "--save_minutes", "0",
    "--gradient_accumulation_steps", "2",
]  # fmt: skip


IMAGES, EPOCHS, WARMUP, DECAY = 192, 12, 0.2, 0.35  # of the runs with --vary
RATES = {"learning_rate": 4e-4, "backbone_learning_rate": 2.4e-3}


def start(folder: Path, extra: list[str], processes: int) -> subprocess.Popen[str]:
    return launch([*OPTIONS, *extra, "--output_dir", str(folder)], processes, subprocess.PIPE)


def launch(arguments: list[str], processes: int, output: Any) -> subprocess.Popen[str]:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(FINETUNE), *arguments]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def kill(process: subprocess.Popen[str], number: int) -> str:
    """Kill all processes of a run; returns its output. A launcher passes SIGTERM on, but cannot pass SIGKILL on to the
    processes that it has started, each of which has its own process group."""
    children = psutil.Process(process.pid).children(recursive=True) if number == signal.SIGKILL else []
    os.killpg(process.pid, number)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    return process.communicate()[0]


def phase(folder: Path, output: str, started: float) -> str:
    """What a killed run was doing, according to its folder and its progress bars. The last evaluation, of the best
    model as it is saved, is part of the conclusion: there is nothing more to stop."""
    if any(path.stat().st_mtime > started for path in folder.glob("checkpoint-*.partial")):
        return "saving a checkpoint"
    if (folder / ".weights.partial").exists():
        return "saving the best weights"
    bars = re.findall(r"Epoch \d+|Evaluating", output)
    if not bars:
        return "starting"
    log = folder / "log.jsonl"
    if log.exists() and len(log.read_text().splitlines()) == json.loads((folder / "args.json").read_text())["epochs"]:
        return "concluding"
    return "evaluating" if bars[-1] == "Evaluating" else f"in {bars[-1].lower()}"


def state_of(folder: Path, processes: int) -> dict[str, str]:
    """Hashes of the results of a run: weights, average, optimizer, schedule, random states, log and metrics."""

    def digest(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()[:16]

    def of_tensors(value: object) -> bytes:
        if isinstance(value, torch.Tensor):
            return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        if isinstance(value, dict):
            return b"".join(repr(key).encode() + of_tensors(value[key]) for key in sorted(value, key=repr))
        if isinstance(value, (list, tuple)):
            return b"".join(of_tensors(entry) for entry in value)
        return repr(value).encode()

    [checkpoint] = [p for p in folder.glob("checkpoint-*") if not p.name.endswith(".partial")]
    names = {folder: "best", folder / "last": "last"}
    metrics = json.loads((folder / "metrics.json").read_text())
    found = {path.name for path in checkpoint.glob("random_states_*.pkl")}
    if len(found) != processes:
        raise SystemExit(f"{checkpoint} has the random states {sorted(found)}, not those of {processes} processes.")
    state = {"epochs in the log": digest(_log(folder)), "metrics": digest(json.dumps(metrics).encode())}
    for path in (folder / "model.safetensors", folder / "last" / "model.safetensors", checkpoint / "model.safetensors"):
        state[f"{names.get(path.parent, 'trained')} weights"] = digest(of_tensors(load_file(path)))
    for path in sorted([*checkpoint.glob("*.bin"), *checkpoint.glob("*.pkl")]):
        content = torch.load(path, weights_only=False)
        if isinstance(content, dict):  # durations differ
            content = {k: v for k, v in content.items() if k not in ("seconds", "evaluations")}
        state[f"{path.name}"] = digest(of_tensors(content))
    return state


def _log(folder: Path) -> bytes:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return json.dumps([{k: v for k, v in li.items() if "second" not in k} for li in lines]).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--terminate", type=int, default=2, help="how many of them are SIGTERM")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="working directory; default: a temporary one")
    parser.add_argument("--vary", type=Path, metavar="CHECKPOINT", help="continue with other processes and batches")
    parser.add_argument("extra", nargs="*", help="more arguments of finetune.py, after --")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    checkpoint = args.vary and args.vary.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(args.work or temporary)
        if checkpoint:
            vary(checkpoint, args.kills, args.terminate, rng)
            return
        alone = start(Path("alone"), args.extra, args.processes)
        wait_until_it_trains(alone, Path("alone"))
        began = time.monotonic()
        output = alone.communicate()[0]
        if alone.returncode:
            raise SystemExit(output)
        seconds = time.monotonic() - began
        print(f"Uninterrupted it trains for {seconds:.1f} s.\n")
        print("| kill | after | while | newest checkpoint | partial files |")
        print("|---" * 5 + "|")
        kinds = [signal.SIGKILL] * (args.kills - args.terminate) + [signal.SIGTERM] * args.terminate
        rng.shuffle(kinds)
        chain, killed = 1, 0
        while killed < len(kinds):
            folder, kind = Path(f"killed-{chain}"), kinds[killed]
            started = time.time()
            process = start(folder, args.extra, args.processes)
            wait_until_it_trains(process, folder)
            after = rng.uniform(0, (0.6 if kind == signal.SIGKILL else 0.3) * seconds)
            time.sleep(after)
            if process.poll() is not None:  # it has ended; the next kills hit a new run
                output = process.communicate()[0]
                if process.returncode and "it has ended" not in output:  # an error, not the end before the last kill
                    raise SystemExit(output)
                check(folder, args.processes)
                chain += 1
                continue
            output = kill(process, kind)
            killed += 1
            newest = max((int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*[0-9]")), default="none")
            left = ", ".join(sorted(p.name for p in folder.glob("*.partial"))) or "nothing"
            name = kind.name if kind != signal.SIGTERM else f"SIGTERM, exit code {process.returncode}"
            print(
                f"| {killed}: {name} | {after:.1f} s | {phase(folder, output, started)} | {newest} | {left} |",
                flush=True,
            )
        last = start(folder, args.extra, args.processes)
        output = last.communicate()[0]
        if last.returncode and "it has ended" not in output:
            raise SystemExit(output)
        check(folder, args.processes)


def wait_until_it_trains(process: subprocess.Popen[str], folder: Path) -> None:
    """Wait for the end of the imports, which take longest and where a kill has no effect."""
    now = time.time()
    arguments = folder / "args.json"
    while process.poll() is None and not (arguments.exists() and arguments.stat().st_mtime > now):
        time.sleep(0.02)


def check(folder: Path, processes: int) -> None:
    expected, found = (state_of(path, processes) for path in (Path("alone"), folder))
    different = [name for name in expected if expected[name] != found.get(name)]
    if different or set(expected) != set(found):
        raise SystemExit(f"{folder} differs from the uninterrupted run in {different or set(expected) ^ set(found)}")
    print(f"\n{folder}: {len(expected)} of {len(expected)} equal, bit by bit: {', '.join(expected)}")


# -- with --vary ------------------------------------------------------------------------------------------------------


class Spread(NamedTuple):
    """How the images of an epoch are spread over processes, batches and optimizer steps."""

    processes: int
    batch_size: int
    accumulation: int

    def __str__(self) -> str:
        return " x ".join(map(str, self))


FIRST = Spread(1, 8, 1)
SPREADS = [Spread(*numbers) for numbers in itertools.product((1, 2), (4, 8), (1, 2))]


def vary(checkpoint: Path, kills: int, terminate: int, rng: random.Random) -> None:
    draw_shapes_dataset("shapes", num_train=IMAGES, num_val=100, seed=1, progress=False)  # not those of the checkpoint
    began = time.monotonic()
    alone = [Path(f"alone-{seed}") for seed in (0, 1)]
    runs = [start_spread(folder, checkpoint, FIRST, seed=seed) for seed, folder in enumerate(alone)]  # at once
    for run, folder in zip(runs, alone, strict=True):
        run.wait()
        finish(run, folder)
    seconds = sum(line["seconds"] for line in log_of(alone[0])) / EPOCHS
    print(f"An epoch of an undisturbed run takes {seconds:.1f} s.\n")
    folder, spread, resume = Path("disturbed"), FIRST, False
    trained_by: dict[int, Spread] = {}
    killed_in = dict.fromkeys(range(1, EPOCHS + 1), 0)
    kinds = [signal.SIGKILL] * (kills - terminate) + [signal.SIGTERM] * terminate
    rng.shuffle(kinds)
    changes = 0
    print("| kill | with | training for | in epoch | newest checkpoint | continues with |")
    print("|---" * 6 + "|")
    for number, kind in enumerate(kinds, 1):
        done = progress_of(folder)[0]
        run = start_spread(folder, checkpoint, spread, resume=resume)
        wait_until_it_trains(run, folder)
        after = rng.uniform(0, 1.8 * seconds)
        time.sleep(after)
        if run.poll() is not None:
            finish(run, folder)
            raise SystemExit(f"The run has ended before kill {number}: use fewer --kills.")
        kill(run, kind)
        epochs, batches, name = progress_of(folder)
        trained_by |= dict.fromkeys(range(done + 1, epochs + 1 + bool(batches)), spread)
        killed_in[min(epochs + 1, EPOCHS)] += 1
        resume = bool(epochs) and not batches
        if resume:
            spread = rng.choice([other for other in SPREADS if other != spread])
            changes += 1
        print(f"| {number} | {kind.name} | {after:.1f} s | {epochs + 1} | {name} | {spread} |", flush=True)
    done = progress_of(folder)[0]
    run = start_spread(folder, checkpoint, spread, resume=resume)
    run.wait()
    finish(run, folder)
    trained_by |= dict.fromkeys(range(done + 1, EPOCHS + 1), spread)
    print(f"\n{kills} kills, {changes} changes, {(time.monotonic() - began) / 60:.1f} minutes.\n")
    compare([log_of(path) for path in alone], log_of(folder), trained_by, killed_in)


def start_spread(
    folder: Path, checkpoint: Path, spread: Spread, *, seed: int = 0, resume: bool = False
) -> subprocess.Popen[str]:
    """Start or continue a run. Each process has one core, and one thread."""
    arguments = [
        "--dataset", "shapes", "--model", str(checkpoint), "--num_workers", "0", "--seed", str(seed),
        "--augmentation", "flip", "--eval_every", "1", "--save_minutes", "1000", "--output_dir", str(folder),
        "--epochs", str(EPOCHS), "--warmup", str(WARMUP), "--decay", str(DECAY),
        "--batch_size", str(spread.batch_size), "--gradient_accumulation_steps", str(spread.accumulation),
    ]  # fmt: skip
    for name, rate in RATES.items():
        arguments += [f"--{name}", str(rate)]
    with folder.with_suffix(".txt").open("w") as output:
        run = launch([*arguments, *(["--resume"] if resume else [])], spread.processes, output)
    if spread.processes == 1:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(run.pid, {cores[seed % len(cores)]})  # before it counts them
    return run


def finish(run: subprocess.Popen[str], folder: Path) -> None:
    """Check that a run has ended as it should."""
    if run.returncode or [line["epoch"] for line in log_of(folder)] != list(range(1, EPOCHS + 1)):
        raise SystemExit(folder.with_suffix(".txt").read_text())


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def progress_of(folder: Path) -> tuple[int, int, str]:
    """Of the newest checkpoint: completed epochs, batches of the next one, and its name."""
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        return 0, 0, "none"
    progress = torch.load(checkpoint / "custom_checkpoint_0.pkl", weights_only=False)
    return progress["epoch"], progress["batches"], checkpoint.name


def wsd(fraction: float) -> float:
    """The rate at a fraction of the run, as a fraction of its maximum: warm-up, stable, decay."""
    return min(1.0, fraction / WARMUP, (1 - fraction) / DECAY)


def compare(
    alone: list[list[dict[str, float]]],
    disturbed: list[dict[str, float]],
    trained_by: dict[int, Spread],
    killed_in: dict[int, int],
) -> None:
    columns = "epoch | images seen | rate, undisturbed | rate, killed | AP, undisturbed | AP, other seed | AP, killed"
    print(f"| {columns} | trained by | kills |")
    print("|---" * 9 + "|")
    for first, other, line in zip(*alone, disturbed, strict=True):
        epoch = int(line["epoch"])
        rates = " | ".join(f"{run['learning_rate']:.3e}" for run in (first, line))
        values = " | ".join(f"{run['AP']:.3f}" for run in (first, other, line))
        print(f"| {epoch} | {epoch * IMAGES} | {rates} | {values} | {trained_by[epoch]} | {killed_in[epoch] or ''} |")
    undisturbed = [rates_of(line) for line in alone[0]]
    formula = [[rate * wsd(epoch / EPOCHS) for rate in RATES.values()] for epoch in range(1, EPOCHS + 1)]
    for label, expected in (("the undisturbed run's", undisturbed), ("the formula's", formula)):
        worst = max(
            abs(found - value) / (max(found, value) or 1)
            for line, values in zip(disturbed, expected, strict=True)
            for found, value in zip(rates_of(line), values, strict=True)
        )
        print(f"\nLargest relative difference of a rate from {label}: {worst:.1e}")


def rates_of(line: dict[str, float]) -> list[float]:
    """Those of `RATES`; the log has one where they are equal."""
    return [line.get(name, line["learning_rate"]) for name in RATES]


if __name__ == "__main__":
    main()
