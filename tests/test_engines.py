"""One predictor under Ray and Spark: the rows of the plain loop, and a job on Ray that survives what is killed."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import save_tiny_checkpoint
from PIL import Image
from shards import contents, write_webdataset

from hf_detr.data import draw_shapes_dataset, load_detection_dataset
from hf_detr.dataset_check import check_dataset
from hf_detr.prediction import Predictor, spark_udf
from hf_detr.prediction.ray_engine import ATTEMPTS, MAX_ATTEMPTS, ShardPredictor, shard_name

ROOT = Path(__file__).parents[1]
NAMES = dict(enumerate(["cat", "dog", "cow"]))
PLANTED = {"empty.png": b"", "text.jpg": b"not an image", "half.jpg": None}
pytestmark = pytest.mark.xdist_group("engines")
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), NAMES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 images and 3 that cannot be read."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(40):
        width, height = (int(side) for side in generator.integers(40, 90, 2))
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    for name, content in PLANTED.items():
        (folder / name).write_bytes(file.getvalue()[:300] if content is None else content)
    return folder


@pytest.fixture(scope="module")
def expected(checkpoint, folder):
    """Of the plain loop, by path."""
    paths = sorted(str(path) for path in folder.iterdir())
    found = Predictor(checkpoint, threshold=0.2, device="cpu")({"path": paths})
    return {path: row for path, *row in zip(*found.values(), strict=True)}


def predict(folder, checkpoint, output, *arguments, **options):
    command = [sys.executable, str(ROOT / "examples" / "predict.py"), str(folder), "--model", str(checkpoint)]
    command += ["--threshold", "0.2", "--output_dir", str(output), *arguments]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def rows_of(output):
    tables = [pq.read_table(path) for path in sorted((output / "shards").glob("*.parquet"))]
    rows = [row for table in tables for row in table.to_pylist()]
    return sorted(rows, key=lambda row: row["image_id"])


@pytest.mark.slow
def test_ray_writes_what_the_plain_job_writes_and_goes_on_after_kills(checkpoint, folder, tmp_path):
    pytest.importorskip("ray")
    one_core = {min(os.sched_getaffinity(0))}  # as an actor has: threads change the last digits
    plain = predict(folder, checkpoint, tmp_path / "plain", preexec_fn=lambda: os.sched_setaffinity(0, one_core))
    said, _ = plain.communicate()
    assert plain.returncode == 0, said
    ray = ["--engine", "ray", "--shard_size", "4", "--ray_workers", "2", "--device", "cpu"]
    generator = random.Random(0)
    kills = 0
    while kills < 2:
        process = predict(folder, checkpoint, tmp_path / "ray", *ray, start_new_session=True)
        shards, until = tmp_path / "ray" / "shards", time.monotonic() + 90
        before = len(list(shards.glob("*.parquet")))
        while process.poll() is None and time.monotonic() < until:
            if len(list(shards.glob("*.parquet"))) > before:
                break
            time.sleep(0.02)
        time.sleep(generator.uniform(0, 0.3))
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
    process = predict(folder, checkpoint, tmp_path / "ray", *ray)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert kills >= 1
    assert rows_of(tmp_path / "ray") == rows_of(tmp_path / "plain"), "no image lost, none twice, and equal to the bit"
    for name in ("detections.json", "images.json"):
        mine, other = (json.loads((tmp_path / which / name).read_text()) for which in ("ray", "plain"))
        if name == "images.json":
            assert [entry["file_name"] for entry in mine["unreadable"]] == sorted(PLANTED)
            mine, other = (sorted(map(str, content["images"])) for content in (mine, other))
        assert sorted(map(str, mine)) == sorted(map(str, other))
    again = predict(folder, checkpoint, tmp_path / "ray", *ray)
    assert "Already done" in again.communicate()[0]


def test_images_that_end_their_process_again_and_again_end_the_job_with_their_names(checkpoint, folder, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / ATTEMPTS).mkdir()
    predictor = Predictor(checkpoint, threshold=0.2, device="cpu")
    actor = ShardPredictor(predictor, str(folder), str(tmp_path / "shards"))
    row = {"image_id": [7, 8], "path": [b"000.png", b"001.png"]}
    name = shard_name(row["image_id"])
    (tmp_path / ATTEMPTS / name).write_bytes(b"." * (MAX_ATTEMPTS - 1))  # lost so many times
    assert actor(row) == {"images": 2}
    assert actor(row) == {"images": 2}, "what is done is not an attempt"
    (tmp_path / "shards" / f"ray-{name}.parquet").unlink()
    with pytest.raises(ValueError, match=r"was lost 10 times: 000\.png, 001\.png\. One of them may end it"):
        actor(row)


@pytest.mark.slow
def test_the_doctor_on_ray_finds_what_it_finds_here(tmp_path):
    ray = pytest.importorskip("ray")
    data = draw_shapes_dataset(tmp_path / "data", num_train=20, num_val=5, progress=False)
    rows = contents(load_detection_dataset(data, cache_dir=tmp_path / "cache", validation_fraction=0, progress=False))
    rows[7]["image"]["bytes"] = (data / "train" / "000000.jpg").read_bytes()[:-200]
    (data / "train" / "000007.jpg").write_bytes(rows[7]["image"]["bytes"])
    for split in ("train", "validation"):
        write_webdataset(tmp_path / "shards", split, rows if split == "train" else rows[:1], (8, 12))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        for folder, streaming in ((data, False), (tmp_path / "shards", True)):
            here, there = (
                check_dataset(folder, streaming=streaming, engine=engine, progress=False) for engine in (None, "ray")
            )
            assert [str(finding) for finding in there.findings] == [str(finding) for finding in here.findings]
            assert "image-truncated" in there.counts()
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_ray_data_maps_batches_of_the_predictor(checkpoint, folder, expected):
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        found = ray.data.read_binary_files(str(folder), include_paths=True).map_batches(
            Predictor,
            fn_constructor_kwargs={"source": str(checkpoint), "threshold": 0.2, "device": "cpu", "column": "bytes"},
            batch_format="pyarrow",
            batch_size=8,
            concurrency=2,
        )
        rows = {row["path"]: [row[name] for name in row if name != "path"] for row in found.take_all()}
    finally:
        ray.shutdown()
    assert rows.keys() == expected.keys()
    for path, row in rows.items():
        assert_equal_rows([as_lists(value) for value in row], expected[path])


@pytest.mark.slow
def test_spark_maps_batches_of_the_predictor(checkpoint, folder, expected):
    sql = pytest.importorskip("pyspark.sql")
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java")
    builder = sql.SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
    spark = builder.config("spark.sql.execution.arrow.maxRecordsPerBatch", "8").getOrCreate()
    try:
        files = spark.read.format("binaryFile").load(str(folder)).selectExpr("path", "content AS bytes")
        predictor = Predictor(checkpoint, threshold=0.2, device="cpu", column="bytes")
        found = files.mapInArrow(*spark_udf(predictor, files.schema)).collect()
        with pytest.raises(ValueError, match="which the predictor adds"):
            spark_udf(predictor, files.selectExpr("bytes", "path AS error").schema)
    finally:
        spark.stop()
    rows = {row["path"].removeprefix("file:"): [row[name] for name in row.asDict() if name != "path"] for row in found}
    assert expected.keys() - rows.keys() == {str(folder / "empty.png")}, "Spark's own reader leaves out empty files"
    for path, row in rows.items():
        assert_equal_rows([as_lists(value) for value in row], expected[path])


def assert_equal_rows(found, expected):
    """Up to the last digits, which depend on the number of threads."""
    width, height, scores, labels, label_ids, boxes, error = expected
    assert (found[-1] is None) == (error is None)
    assert found[:2] == [width, height]
    assert found[3:5] == [labels, label_ids]
    if error is None:
        assert np.allclose(found[2], scores, atol=1e-5)
        assert np.allclose(found[5], boxes, atol=1e-2)


def as_lists(value):
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return [as_lists(entry) for entry in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--engine", "ray", "--tile", "100"], "no --tile"),
        (["--engine", "ray", "--pictures"], "no --tile, --pictures"),
        (["--ray_workers", "2"], "are for --engine ray"),
        (["--engine", "ray", "--ray_cpus", "-1"], "must not be negative"),
    ],
)
def test_options_that_do_not_fit_the_engine_are_refused(arguments, reason, checkpoint, folder, tmp_path):
    process = predict(folder, checkpoint, tmp_path / "out", *[a for a in arguments if a])
    said, _ = process.communicate()
    assert process.returncode == 2
    assert reason in said


@pytest.mark.slow
def test_the_code_of_the_page_runs(checkpoint, folder, tmp_path):
    """docs/scale.md, block by block, in a folder that has what it names."""
    for package in ("ray", "pyspark"):
        pytest.importorskip(package)
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java")
    shutil.copytree(checkpoint, tmp_path / "CHECKPOINT")
    (tmp_path / "images").mkdir()
    for number, name in enumerate(("a", "b", "c")):
        Image.open(folder / f"{number:03}.png").convert("RGB").save(tmp_path / "images" / f"{name}.jpg")
    text = (ROOT / "docs" / "scale.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    ends = ["assert found['error'] == [None, None]", "assert len(found) == 3", "assert found.count() == 3"]
    code = "\n".join(block + end for block, end in zip(blocks, [*ends, ends[-1]], strict=True))
    script = tmp_path / "page.py"
    script.write_text(code)
    environment = ENVIRONMENT | {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    result = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert sum(pq.read_metadata(path).num_rows for path in (tmp_path / "found").glob("*.parquet")) == 3
    assert sum(pq.read_metadata(path).num_rows for path in (tmp_path / "found-by-spark").glob("*.parquet")) == 3
