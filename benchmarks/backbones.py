"""One small member of every timm family, forward and backward, in both memory formats, float32 and bf16 autocast.

    python benchmarks/backbones.py --folder sweep              # everything; call again to go on
    python benchmarks/backbones.py --folder sweep --seconds 80
    python benchmarks/backbones.py --folder sweep --families byobnet resnet --repeat

Each network runs in a process of its own, since what is looked for are crashes: the network as timm builds it, and
hf_detr's `Backbone` around it with the unsafe convolutions replaced. Where the process dies, one process for each
combination finds out which it was. Features and gradients are compared with those of contiguous float32. glibc's
checking allocator is on where there is one, so that writing past the end of a block is found even if nothing crashes.

A family is a module of timm; its member is the smallest by parameters that supports `features_only=True`. The first
calls look for the members. Results are added to members.jsonl and results.jsonl in the folder; when all are there,
benchmarks/backbones.md is written from them.
"""

import argparse
import ctypes.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("backbone_child.py")
TABLE = Path(__file__).with_suffix(".md")
ALSO = {"byobnet": ["repvgg_a0"]}  # the network whose crash started this
KINDS = ("timm", "Backbone")
COMBINATIONS = ("contiguous float32", "contiguous bf16", "channels-last float32", "channels-last bf16")
TOLERANCE = {"float32": 1e-4, "bf16": 5e-2}
TIMEOUT = 60


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def call(*arguments: str, timeout: float = TIMEOUT) -> tuple[list[dict[str, Any]], str]:
    """The JSON lines a child printed, and how it ended: "" if well."""
    environment = os.environ | {"ONEDNN_VERBOSE": "0"}
    if checker := ctypes.util.find_library("c_malloc_debug"):
        environment |= {"LD_PRELOAD": checker, "GLIBC_TUNABLES": "glibc.malloc.check=3"}
    command = [sys.executable, str(CHILD), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, check=False)
        output, ending = done.stdout, ""
        if done.returncode < 0:
            said = next((line for line in done.stderr.splitlines() if line), "")
            ending = f"{signal.Signals(-done.returncode).name} {said[:60]}".strip()
        elif done.returncode:
            ending = "error: " + (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout.decode() if isinstance(expired.stdout, bytes) else ""
        ending = f"no end after {timeout:.0f} s"
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")], ending


def sweep(member: dict[str, Any]) -> dict[str, Any]:
    """Outcomes of one network: {"timm channels-last bf16": {"error": ..., "seconds": ...} or {"ending": ...}}."""
    started, name = time.perf_counter(), member["member"]
    outcomes: dict[str, Any] = {}
    lines, ending = call(name)
    for line in lines:
        outcomes[line.pop("combination")] = line
    wanted = [f"{kind} {combination}" for kind in KINDS for combination in COMBINATIONS]
    if ending:
        for combination in wanted:
            lines, alone = call(name, combination)
            outcomes[combination] = {"ending": alone} if alone else lines[-1]
    return member | {"outcomes": outcomes, "together": ending, "took": time.perf_counter() - started}


def verdict(outcome: dict[str, Any], combination: str, contiguous: dict[str, Any]) -> str:
    """ "ok" and the distance, or what went wrong. Rounding of a deep network without training can exceed the tolerance
    in any format; what counts then is whether channels-last is farther from float64 than contiguous is."""
    if "ending" in outcome:
        return f"**{outcome['ending']}**"
    if "error" not in outcome:
        return outcome.get("exception", "?")
    error, limit = outcome["error"], TOLERANCE[combination.rpartition(" ")[2]]
    allowed = max(limit, 3 * contiguous.get("error", 0))
    if "from_float64" in outcome:
        error, allowed = outcome["from_float64"], max(limit, 3 * outcome["contiguous_from_float64"])
    return f"ok {outcome['error']:.0e}" if error <= allowed else f"**differs {outcome['error']:.0e}**"


def cells(result: dict[str, Any]) -> list[str]:
    outcomes, found = result["outcomes"], []
    for kind in KINDS:
        for combination in COMBINATIONS:
            base = outcomes.get(f"{kind} contiguous {combination.rpartition(' ')[2]}", {})
            found.append(verdict(outcomes[f"{kind} {combination}"], combination, base))
    return found


def table(members: list[dict[str, Any]], results: dict[str, dict[str, Any]], versions: str) -> str:
    rows = []
    for member in members:
        if "member" not in member:
            rows.append(f"| {member['family']} | | {' | ' * 10}{member['unsupported']} |")
            continue
        result = results[member["member"]]
        strides = " ".join(map(str, member["strides"]))
        speeds = []
        for dtype in ("float32", "bf16"):
            pair = [result["outcomes"][f"Backbone {f} {dtype}"].get("seconds") for f in ("contiguous", "channels-last")]
            speeds.append(f"{pair[0] / pair[1]:.1f}x" if all(pair) else "")
        unsafe = ", ".join(member["unsafe"])
        rows.append(
            f"| {member['family']} | {member['member']} | {member['parameters'] / 1e6:.1f} M | {strides} | "
            f"{' | '.join(cells(result))} | {' | '.join(speeds)} | {member['prefers']} | {unsafe} |"
        )
    heads = ["family", "member", "parameters", "strides"]
    heads += [f"{kind}: {combination}" for kind in KINDS for combination in COMBINATIONS]
    heads += ["channels-last is faster, float32", "bf16", "`Backbone` takes", "unsafe convolutions"]
    return "\n".join([versions, "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *rows]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where results are kept between calls")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing new after that many")
    parser.add_argument("--families", nargs="*", help="only these modules of timm")
    parser.add_argument("--repeat", action="store_true", help="run again what has a result; the last one counts")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    end = time.perf_counter() + args.seconds
    members_file, results_file = args.folder / "members.jsonl", args.folder / "results.jsonl"
    known = {member["family"] for member in read(members_file)}
    remaining = max(1.0, end - time.perf_counter())
    _, ending = call("--members", str(members_file), str(min(remaining, 86400.0)), json.dumps(ALSO), timeout=3600)
    if ending:
        raise SystemExit(ending)
    members = [member for member in read(members_file) if "family" in member]
    for member in members:
        if member["family"] not in known:
            print(json.dumps(member), flush=True)
    done = {} if args.repeat else {result["member"]: result for result in read(results_file)}
    for member in members:
        wanted = "member" in member and (not args.families or member["family"] in args.families)
        if wanted and member["member"] not in done and time.perf_counter() < end:
            result = sweep(member)
            append(results_file, result)
            print(f"{member['family']} {member['member']} {result['took']:.0f} s:", *cells(result), flush=True)
    results = {result["member"]: result for result in read(results_file)}
    complete = any("versions" in line for line in read(members_file))
    missing = [m["member"] for m in members if "member" in m and m["member"] not in results]
    if complete and not missing:
        versions = next(line["versions"] for line in read(members_file) if "versions" in line)
        TABLE.write_text(table(members, results, versions))
        print(f"Wrote {TABLE}.")
    else:
        print(f"{len(results)} done, {len(missing)} to do{'' if complete else ', members still to be found'}.")


if __name__ == "__main__":
    main()
