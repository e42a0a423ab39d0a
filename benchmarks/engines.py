"""The same predictor as a plain loop, under Ray and under Spark: results, overhead, memory, and jobs that are killed.

    python benchmarks/engines.py overhead --model runs/shapes-1 --images 100 --side 800
    python benchmarks/engines.py kills --model runs/shapes-1 --images 2000 --kills 20

`overhead` gives each engine one worker with one core. Start-up time is reported separately: a run with 10 images is
subtracted from one with all. `kills` kills an actor or the process group of `predict.py --engine ray` at random
moments, starts it again, and compares the labels with those of a job without Ray.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from hf_detr import DetrForDetection, DetrImageProcessor
from hf_detr.data import draw_shapes_dataset
from hf_detr.prediction import Predictor, spark_udf

PREDICT = Path(__file__).parents[1] / "examples" / "predict.py"
SHARD = 10


def checkpoint_of_side(model: Path, side: int, folder: Path) -> Path:
    """The checkpoint with a processor that enlarges images."""
    DetrForDetection.from_pretrained(model).save_pretrained(folder)
    DetrImageProcessor(size={"shortest_edge": side, "longest_edge": 2 * side}).save_pretrained(folder)
    return folder


def peak_memory(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and the largest sum of the resident memory of this process and its children, in GB."""
    ended, peak = threading.Event(), 0.0

    def watch() -> None:
        nonlocal peak
        while True:
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            peak = max(peak, total / 1e9)
            if ended.wait(0.5):
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        return work(), peak
    finally:
        ended.set()
        thread.join()


def plain(predictor: Predictor, paths: list[str]) -> list[dict[str, Any]]:
    rows = []
    for start in range(0, len(paths), SHARD):
        found = predictor({"path": paths[start : start + SHARD]})
        rows += [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
    return rows


def under_ray(predictor: Predictor, paths: list[str]) -> list[dict[str, Any]]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = []
    try:
        data = ray.data.from_items([{"path": path} for path in paths], override_num_blocks=len(paths) // SHARD)
        found = data.map_batches(predictor.__class__, fn_constructor_kwargs={
            "source": predictor.source, "threshold": predictor.threshold, "device": "cpu"
        }, batch_size=SHARD, batch_format="pyarrow", concurrency=1)  # fmt: skip
        for batch in found.iter_batches(batch_size=SHARD, batch_format="pyarrow"):
            rows += batch.to_pylist()
    finally:
        ray.shutdown()
    return rows


def under_spark(predictor: Predictor, paths: list[str]) -> list[dict[str, Any]]:
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
    spark = builder.config("spark.sql.execution.arrow.maxRecordsPerBatch", str(SHARD)).getOrCreate()
    rows = []
    try:
        frame = spark.createDataFrame([(path,) for path in paths], "path STRING").repartition(1)
        for row in frame.mapInArrow(*spark_udf(predictor, frame.schema)).toLocalIterator():
            rows.append(row.asDict())
    finally:
        spark.stop()
    return rows


ENGINES = {"plain": plain, "Ray": under_ray, "Spark": under_spark}


def overhead(args: argparse.Namespace, folder: Path) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "PYSPARK_PYTHON": sys.executable}
    import torch

    torch.set_num_threads(1)
    data = draw_shapes_dataset(folder / "images", num_train=args.images, num_val=1, progress=False)
    paths = sorted(str(path) for path in (data / "train").iterdir())
    model = checkpoint_of_side(args.model, args.side, folder / "model")
    expected: list[dict[str, Any]] = []
    print("| engine | start and 10 images, s | images/s after that | memory with 10 and with all, GB | rows equal |")
    print("|---|---|---|---|---|")
    for name, engine in ((name, ENGINES[name]) for name in args.engines):
        seconds, memory = [], []
        for some in (paths[:SHARD], paths):
            predictor = Predictor(model, threshold=0.3, device="cpu")
            began = time.monotonic()
            rows, peak = peak_memory(partial(engine, predictor, some))
            memory.append(f"{peak:.1f}")
            seconds.append(time.monotonic() - began)
        rows.sort(key=lambda row: row["path"])
        expected = expected or rows
        rate = (len(paths) - SHARD) / (seconds[1] - seconds[0])
        equal = sum(a == b for a, b in zip(rows, expected, strict=True))
        cells = (name, f"{seconds[0]:.1f}", f"{rate:.2f}", ", ".join(memory), f"{equal} of {len(paths)}")
        print(f"| {' | '.join(cells)} |", flush=True)


def kills(args: argparse.Namespace, folder: Path) -> None:
    data = draw_shapes_dataset(folder / "images", num_train=args.images, num_val=1, progress=False)
    planted = {
        "empty.png": b"",
        "text.jpg": b"not an image",
        "cut.png": (data / "train" / "000001.jpg").read_bytes()[:500],
    }
    for name, content in planted.items():
        (data / "train" / name).write_bytes(content)
    generator, killed = random.Random(0), 0

    def start(output: str, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(PREDICT), str(data / "train"), "--model", str(args.model), "--no-pictures"]
        return subprocess.Popen(
            [*command, "--output_dir", str(folder / output), "--shard_size", "16", "--device", "cpu", *more],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    alone = start("plain")
    said = alone.communicate()[0]
    if alone.returncode:
        raise SystemExit(said)
    shards = folder / "ray" / "shards"
    while killed < args.kills:
        process = start("ray", "--engine", "ray", "--ray_workers", "2")
        before, until = len(list(shards.glob("*.parquet"))), time.monotonic() + 120
        while process.poll() is None and len(list(shards.glob("*.parquet"))) == before and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(generator.uniform(0, 1))
        if process.poll() is not None:
            break
        victims = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        victim = generator.choice(["driver", "actor"])
        actors = [p for p in victims if "ShardPredictor" in " ".join(psutil.Process(p).cmdline())]
        if victim == "actor" and actors:
            os.kill(generator.choice(actors), signal.SIGKILL)  # Ray starts another one
            time.sleep(2)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        killed += 1
        print(f"{killed}: {victim}, {len(list(shards.glob('*.parquet')))} shards", flush=True)
    process = start("ray", "--engine", "ray", "--ray_workers", "2")
    said = process.communicate()[0]
    if process.returncode:
        raise SystemExit(said)
    tables = [
        {
            row["file"]: row
            for path in (folder / name / "shards").glob("*.parquet")
            for row in pq.read_table(path).to_pylist()
        }
        for name in ("plain", "ray")
    ]
    count = sum(pq.read_metadata(path).num_rows for path in shards.glob("*.parquet"))
    same = sum(tables[0][name]["labels"] == row["labels"] for name, row in tables[1].items())
    errors = sorted(name for name, row in tables[1].items() if row["error"])
    print(f"{killed} kills; {count} rows of {len(tables[0])} images, {same} with the same labels; errors: {errors}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "kills"))
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint of the drawn shapes")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--side", type=int, default=800, help="shortest side that images are enlarged to")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="rows equal the first's")
    parser.add_argument("--kills", type=int, default=20)
    args = parser.parse_args()
    args.model = args.model.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        {"overhead": overhead, "kills": kills}[args.what](args, Path(temporary))


if __name__ == "__main__":
    main()
