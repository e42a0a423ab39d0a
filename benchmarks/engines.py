"""The same predictor as a plain loop, under Ray and under Spark: results, overhead, memory, and jobs that are killed.

    python benchmarks/engines.py overhead --model runs/shapes-1 --images 100 --side 800
    python benchmarks/engines.py overhead --model runs/shapes-1 --images 20000 --side 64 --engines plain Ray-4 Spark-2
    python benchmarks/engines.py kills --model runs/shapes-1 --images 1000 --kills 50

`overhead` gives each engine one worker with one core; "Ray-4" is a local cluster of four nodes with a worker each, and
"Spark-2" has two workers: on few cores they show that the rows are the same, not how fast a cluster is. Start-up time
is reported separately: a run with 10 images is subtracted from one with all.

`kills` runs prediction jobs on a local Ray cluster of two nodes, and plain ones, and kills in turn at random moments an
actor, a node, the driver and the plain process. What was killed is started again. Each job that ends is compared with
one that was left alone.
"""

import argparse
import itertools
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def ray_cluster(nodes: int) -> Iterator[Any]:
    """A local cluster; Ray is connected to it in this process. Each node has a CPU."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(nodes - 1):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def under_ray(predictor: Predictor, paths: list[str], *, nodes: int = 1) -> list[dict[str, Any]]:
    rows = []
    with ray_cluster(nodes):
        import ray

        data = ray.data.from_items([{"path": path} for path in paths], override_num_blocks=len(paths) // SHARD)
        found = data.map_batches(predictor.__class__, fn_constructor_kwargs={
            "source": predictor.source, "threshold": predictor.threshold, "device": "cpu"
        }, batch_size=SHARD, batch_format="pyarrow", concurrency=nodes, num_cpus=0.9)  # fmt: skip
        for batch in found.iter_batches(batch_size=SHARD, batch_format="pyarrow"):
            rows += batch.to_pylist()
    return rows


def under_spark(predictor: Predictor, paths: list[str], *, workers: int = 1) -> list[dict[str, Any]]:
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master(f"local[{workers}]").config("spark.ui.enabled", "false")
    spark = builder.config("spark.sql.execution.arrow.maxRecordsPerBatch", str(SHARD)).getOrCreate()
    rows = []
    try:
        frame = spark.createDataFrame([(path,) for path in paths], "path STRING").repartition(workers)
        found = frame.mapInArrow(*spark_udf(predictor, frame.schema))
        for row in found.toLocalIterator(prefetchPartitions=workers > 1):
            rows.append(row.asDict())
    finally:
        spark.stop()
    return rows


ENGINES = {
    "plain": plain,
    "Ray": under_ray,
    "Ray-2": partial(under_ray, nodes=2),
    "Ray-4": partial(under_ray, nodes=4),
    "Spark": under_spark,
    "Spark-2": partial(under_spark, workers=2),
}


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


PLANTED = ("cut.png", "empty.png", "huge.png", "text.jpg")


class Job:
    """A prediction job that is started again until it has ended."""

    def __init__(self, images: Path, model: Path, output: Path, *more: str, **environment: str) -> None:
        command = [sys.executable, str(PREDICT), str(images), "--model", str(model), "--no-pictures"]
        self.command = [*command, "--output_dir", str(output), "--shard_size", "16", "--device", "cpu", *more]
        self.output, self.environment = output, os.environ | environment
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    @property
    def shards(self) -> int:
        return len(list((self.output / "shards").glob("*.parquet")))

    def wait_for_shards(self, count: int) -> bool:
        """Whether so many more are written before the job ends."""
        wanted = self.shards + count
        while self.process.poll() is None and self.shards < wanted:
            time.sleep(0.01)
        return self.process.poll() is None

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def rows(self) -> list[dict[str, Any]]:
        """Of an ended job."""
        said = self.process.communicate()[0]
        if self.process.returncode:
            raise SystemExit(said)
        tables = [pq.read_table(path) for path in (self.output / "shards").glob("*.parquet")]
        return sorted((row for table in tables for row in table.to_pylist()), key=lambda row: str(row["file"]))


def kills(args: argparse.Namespace, folder: Path) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    images = draw_shapes_dataset(folder / "images", num_train=args.images, num_val=1, progress=False) / "train"
    huge = b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    contents = ((images / "000001.jpg").read_bytes()[:500], b"", huge, b"not an image")
    for name, content in zip(PLANTED, contents, strict=True):
        (images / name).write_bytes(content)
    expected = Job(images, args.model, folder / "alone").rows()
    errors = sorted(row["file"] for row in expected if row["error"])
    print(f"{len(expected)} images; unreadable: {errors}", flush=True)
    generator, killed, jobs = random.Random(0), Counter[str](), 0
    with ray_cluster(2) as cluster:
        nodes = list(cluster.worker_nodes)
        while killed.total() < args.kills:
            jobs += 1
            on_ray = ("--engine", "ray", "--ray_workers", "2", "--ray_cpus", "0.9")
            kinds = ("plain",) if jobs % 3 == 0 else ("actor", "node", "driver")
            more = () if kinds == ("plain",) else on_ray
            job = Job(images, args.model, folder / f"job-{jobs}", *more, RAY_ADDRESS=cluster.address)
            for kind in itertools.cycle(kinds):
                if killed.total() == args.kills or not job.wait_for_shards(generator.randint(1, 6)):
                    break
                time.sleep(generator.uniform(0, 0.2))
                if kind in ("plain", "driver"):
                    job.kill()
                    job.start()
                elif kind == "node":
                    cluster.remove_node(nodes.pop(), allow_graceful=False)
                    nodes.append(cluster.add_node(num_cpus=1))
                else:
                    actors = [p for p in psutil.process_iter(["cmdline"]) if "ShardPred" in str(p.info["cmdline"])]
                    if not actors:
                        continue
                    generator.choice(actors).kill()
                killed[kind] += 1
            rows = job.rows()
            names = {row["file"] for row in rows}
            twice, lost = len(rows) - len(names), len(expected) - len(names)
            same = sum(one["labels"] == other["labels"] for one, other in zip(rows, expected, strict=not twice))
            listed = sorted(row["file"] for row in rows if row["error"]) == errors
            print(
                f"job {jobs}: killed so far {dict(killed)}; {twice} images twice, {lost} lost, {same} with the labels "
                f"of the undisturbed job, unreadable ones listed: {listed}",
                flush=True,
            )


def _png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overhead", "kills"))
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint of the drawn shapes")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--side", type=int, default=800, help="shortest side that images are enlarged to")
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=["plain", "Ray", "Spark"], help="rows equal the first's"
    )
    parser.add_argument("--kills", type=int, default=20)
    args = parser.parse_args()
    args.model = args.model.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        {"overhead": overhead, "kills": kills}[args.what](args, Path(temporary))


if __name__ == "__main__":
    main()
