"""Kill a training run with SIGKILL at random moments, start it again with the same command, and compare its results,
bit by bit, with those of a run that was not interrupted.

    python benchmarks/kills.py --kills 20

The run is short but complete: epochs, evaluations, and a checkpoint after every optimizer step, so that about as many
kills hit a write as a computation. Dropout and denoising draw random numbers, and the average of the weights has state.
"""

import argparse
import hashlib
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

import torch
from safetensors.torch import load_file

FINETUNE = Path(__file__).parents[1] / "examples" / "finetune.py"
OPTIONS = [
    "--quick", "--batch_size", "4", "--set", "dropout=0.1", "--ema", "0.99", "--save_minutes", "0",
    "--gradient_accumulation_steps", "2",
]  # fmt: skip


def start(folder: Path, extra: list[str], processes: int) -> subprocess.Popen[str]:
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launch, str(FINETUNE), *OPTIONS, *extra, "--output_dir", str(folder)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def kill(process: subprocess.Popen[str], number: int) -> str:
    """Kill all processes of a run; returns its output."""
    os.killpg(process.pid, number)
    return process.communicate()[0]


def phase(folder: Path, output: str, started: float) -> str:
    """What a killed run was doing, according to its folder and its progress bars."""
    if any(path.stat().st_mtime > started for path in folder.glob("checkpoint-*.partial")):
        return "saving a checkpoint"
    if (folder / ".weights.partial").exists():
        return "saving the best weights"
    bars = re.findall(r"(Epoch \d+|Evaluating|Best checkpoint)", output)
    if not bars:
        return "starting"
    return {"E": f"in {bars[-1].lower()}", "B": "concluding"}[bars[-1][0]] if bars[-1] != "Evaluating" else "evaluating"


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
    parser.add_argument("extra", nargs="*", help="more arguments of finetune.py, after --")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(args.work or temporary)
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


if __name__ == "__main__":
    main()
