"""One small member of every timm family, forward and backward, in both memory formats, float32 and bf16 autocast.

    python benchmarks/backbones.py --folder sweep              # everything; call again to go on
    python benchmarks/backbones.py --folder sweep --seconds 80
    python benchmarks/backbones.py --folder sweep --families byobnet resnet --repeat

Each network runs in a process of its own, forked from one that only imported, since what is looked for are crashes: the
network as timm builds it, and hf_detr's `Backbone` around it with the unsafe convolutions replaced. Where the process
dies, one process for each combination finds out which it was. Features and gradients are compared with those of
contiguous float32. glibc's checking allocator is on where there is one: it notices more writes past the end of a block.

A family is a module of timm; its member is the smallest by parameters that supports `features_only=True`. The first
calls look for the members. Results are added to members.jsonl and results.jsonl in the folder, and the table in
benchmarks/backbones.md is written from them.
"""

import argparse
import ctypes.util
import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backbone_child

CONTEXT = multiprocessing.get_context("forkserver")
TABLE = Path(__file__).with_suffix(".md")
ALSO = {"byobnet": ["repvgg_a0"]}  # the network whose crash started this
KINDS = ("timm", "Backbone")
COMBINATIONS = ("contiguous float32", "contiguous bf16", "channels-last float32", "channels-last bf16")
TIMEOUT = 600
TEXT = """# Every timm family in both memory formats

`python benchmarks/backbones.py --folder sweep` on {versions}.
Networks run: {done}.

The smallest member of every timm family, in a process of its own: forward and backward on 2 images of 224 x 224 (of
its own size where it takes no other; 1 image if it has more than 40 million parameters or is slow), as timm builds it
(all levels, eval mode) and in `hf_detr.model.backbone.Backbone` (deepest level, forward in eval mode, forward and
backward in training). A cell says whether features and all gradients equal those of contiguous float32, with the
largest difference in the largest value of its tensor: `ok` within 1e-4 (float32) or 5e-2 (bf16 autocast). Beyond it
float64 is the referee, on up to {draws} draws of images: `ok` if channels-last is within that of float64, or at most
twice as far from it as contiguous, on one of them. (Rounding takes values over the zero of a ReLU, or over another
pixel under a max pooling, and gradients jump, in either format; a wrong kernel is wrong on all images.) The networks
have random weights. Networks whose contiguous float32 fails: {failed}.

What kills the process is one operator: the weight gradient of a strided 1x1 convolution without padding on fewer than
16 channels, in channels-last float32 (uxlfoundation/oneDNN#6035). `replace_unsafe_convolutions` computes it as every
stride-th pixel and a convolution of stride 1. Of {networks} networks of timm, {count} have one: {affected}.

The columns of ratios are the time of forward (eval) plus forward and backward (training) in contiguous over that in
channels-last: above 1, channels-last is faster. One run each after one to warm up: a hint, not a measurement.

{table}
"""


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def call(function: Callable[..., None], *arguments: object, timeout: float = TIMEOUT) -> tuple[list[Any], str]:
    """The JSON lines that a function of `backbone_child` printed in its own process, and how it ended: "" if well."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "output", Path(folder) / "errors"
        process = CONTEXT.Process(target=backbone_child.isolated, args=(output, errors, function, *arguments))
        process.start()
        process.join(timeout)
        ending, code = "", process.exitcode
        if code is None:
            process.kill()
            process.join()
            ending = f"no end after {timeout:.0f} s"
        elif code:
            said = [line for line in errors.read_text(errors="replace").splitlines() if line.strip()]
            ending = f"{signal.Signals(-code).name} {(said or [''])[0]}" if code < 0 else f"error: {said[-1]}"
        return read(output), ending[:100].strip()


def sweep(member: dict[str, Any]) -> dict[str, Any]:
    """Outcomes of one network: {"timm channels-last bf16": {"error": ..., "seconds": ...} or {"ending": ...}}."""
    started, name = time.perf_counter(), member["member"]
    outcomes: dict[str, Any] = {}
    lines, ending = call(backbone_child.check, name, [])
    for line in lines:
        outcomes[line.pop("combination")] = line
    if ending and not ending.startswith("error"):
        for combination in (f"{kind} {combination}" for kind in KINDS for combination in COMBINATIONS):
            lines, alone = call(backbone_child.check, name, [combination])
            outcomes[combination] = {"ending": alone} if alone else lines[-1]
    return member | {"outcomes": outcomes, "together": ending, "took": time.perf_counter() - started}


def verdict(result: dict[str, Any], combination: str) -> str:
    """ "ok" and the distance from contiguous float32, or what went wrong.

    Rounding of a deep network can exceed the tolerance in any format. What counts then is whether channels-last is more
    than twice as far off as contiguous, where it matters from float64 and on several draws of images.
    """
    outcome = result["outcomes"].get(combination, {"ending": result["together"]})
    if "ending" in outcome or "exception" in outcome:
        return f"**{outcome.get('ending') or outcome.get('exception')}**"
    dtype, error = combination.rpartition(" ")[2], outcome["error"]
    contiguous = result["outcomes"].get(combination.replace("channels-last", "contiguous"), {}).get("error", 0)
    allowed = max(backbone_child.TOLERANCE[dtype], 2 * contiguous)
    if "from_float64" in outcome:
        error = outcome["from_float64"]
        allowed = max(backbone_child.TOLERANCE[dtype], 2 * outcome["contiguous_from_float64"])
    return f"ok {outcome['error']:.0e}" if error <= allowed else f"**differs {outcome['error']:.0e}**"


def verdicts(result: dict[str, Any]) -> dict[str, str]:
    return {f"{kind} {name}": verdict(result, f"{kind} {name}") for kind in KINDS for name in COMBINATIONS}


def ratio(result: dict[str, Any], dtype: str) -> str:
    """Time of contiguous over that of channels-last, or nothing if a network was too large to be timed."""
    seconds = [
        result["outcomes"].get(f"Backbone {f} {dtype}", {}).get("seconds") for f in ("contiguous", "channels-last")
    ]
    return f"{seconds[0] / seconds[1]:.1f}x" if all(seconds) else ""


def table(members: list[dict[str, Any]], results: dict[str, dict[str, Any]], versions: str) -> str:
    shown = [f"{kind} {name}" for kind in KINDS for name in COMBINATIONS[1:]]
    rows, failed, missing = [], [], []
    for member in members:
        if "member" not in member:
            rows.append(f"| {member['family']} | | | {member['unsupported']} |{' |' * (len(shown) + 3)}")
            continue
        if member["member"] not in results:
            missing.append(member["member"])
            continue
        result = results[member["member"]]
        found = verdicts(result)
        failed += [member["member"]] if any(found[f"{kind} {COMBINATIONS[0]}"] != "ok 0e+00" for kind in KINDS) else []
        strides = " ".join(map(str, dict.fromkeys(member["strides"])))
        unsafe = f" ({', '.join(member['unsafe'])} replaced)" if member["unsafe"] else ""
        rows.append(
            f"| {member['family']} | {member['member']} | {member['parameters'] / 1e6:.1f} M | {strides} | "
            + " | ".join(found[name] for name in shown)
            + f" | {ratio(result, 'float32')} | {ratio(result, 'bf16')} | {member['prefers']}{unsafe} |"
        )
    heads = ["family", "member", "parameters", "strides", *(f"{name.replace(' ', ': ', 1)}" for name in shown)]
    heads += ["contiguous / channels-last, float32", "the same, bf16", "`Backbone` takes"]
    affected = [name for member in members for name in member["affected"]]
    done = f"{len(rows)} of {len(rows) + len(missing)}"
    return TEXT.format(
        versions=versions,
        draws=backbone_child.DRAWS,
        networks=sum(member["networks"] for member in members),
        count=len(affected),
        affected=", ".join(affected),
        failed=", ".join(failed) or "none",
        done=f"{done}; still to run: {', '.join(missing)}" if missing else done,
        table="\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *rows]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where results are kept between calls")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing new after that many")
    parser.add_argument("--families", nargs="*", help="only these modules of timm")
    parser.add_argument("--repeat", action="store_true", help="run again what has a result; the last one counts")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if checker := ctypes.util.find_library("c_malloc_debug"):
        os.environ |= {"LD_PRELOAD": checker, "GLIBC_TUNABLES": "glibc.malloc.check=3"}
    # Python 3.11's forkserver forgets sys.path and then silently preloads nothing.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    CONTEXT.set_forkserver_preload(["backbone_child"])
    end = time.perf_counter() + args.seconds
    members_file, results_file = args.folder / "members.jsonl", args.folder / "results.jsonl"
    known = {member.get("family") for member in read(members_file)}
    remaining = max(1.0, end - time.perf_counter())
    _, ending = call(backbone_child.find_members, members_file, remaining, ALSO, timeout=3600)
    if ending:
        raise SystemExit(ending)
    members = [member for member in read(members_file) if "family" in member]
    for member in members:
        if member["family"] not in known:
            print(json.dumps(member), flush=True)
    done = {} if args.repeat else {result["member"]: result for result in read(results_file)}
    for member in sorted(members, key=lambda member: not member.get("unsafe")):  # what may crash comes first
        wanted = "member" in member and (not args.families or member["family"] in args.families)
        if wanted and member["member"] not in done and time.perf_counter() < end:
            result = sweep(member)
            append(results_file, result)
            print(
                f"{member['family']} {member['member']} {result['took']:.0f} s:", *verdicts(result).values(), flush=True
            )
    results = {result["member"]: result for result in read(results_file)}
    missing = [m["member"] for m in members if "member" in m and m["member"] not in results]
    if versions := [line["versions"] for line in read(members_file) if "versions" in line]:
        TABLE.write_text(table(members, results, versions[0]))
        print(f"Wrote {TABLE}.")
    print(f"{len(results)} done, {len(missing)} to do{'' if versions else ', members still to be found'}.")


if __name__ == "__main__":
    main()
