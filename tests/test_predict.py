"""`examples/predict.py`, also when it is killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import save_tiny_checkpoint
from datasets import Dataset
from PIL import Image
from predict_example import PREDICT, PredictExample
from pycocotools.coco import COCO
from test_image_processing import photo
from transformers import pipeline

from hf_detr import DetrImageProcessor
from hf_detr.prediction import load_batches, open_job, predict_batch
from hf_detr.prediction.pipeline import DetrDetectionPipeline
from hf_detr.prediction.size_batches import read_size
from hf_detr.runtime import PARTIAL, stop

pytestmark = pytest.mark.xdist_group("predict")  # its fixtures are expensive: one worker runs them once

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
ONE = [sys.executable]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    names = {0: "rectangle", 1: "ellipse", 2: "triangle", 3: "none of them"}
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), names)


@pytest.fixture(scope="module")
def predict(checkpoint):
    return PredictExample(checkpoint)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """300 images of different sizes in three folders."""
    folder = tmp_path_factory.mktemp("many")
    for index in range(300):
        part = folder / f"part-{index % 3}"
        part.mkdir(exist_ok=True)
        photo(60 + index % 7 * 8, 90 - index % 5 * 6, index).save(part / f"{index:03d}.jpg")
    return folder


def command(launcher, images, checkpoint, output, *options):
    arguments = [*launcher, PREDICT, images, "--model", checkpoint, "--output_dir", output, "--threshold", "0.25"]
    return [str(argument) for argument in (*arguments, *options)]


def run(*arguments, code=0):
    done = subprocess.run(
        command(*arguments), env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def expected(checkpoint, path):
    """The pipeline's detections in a single image."""
    return pipeline("object-detection", model=str(checkpoint), device="cpu")(path, threshold=0.25, round_boxes=False)


def assert_equal(row, objects):
    assert row["labels"] == [found["label"] for found in objects]
    assert row["scores"] == pytest.approx([found["score"] for found in objects], abs=1e-4)
    corners = [[found["box"][key] for key in ("xmin", "ymin", "xmax", "ymax")] for found in objects]
    np.testing.assert_allclose(np.reshape(row["boxes"], (-1, 4)), np.reshape(corners, (-1, 4)), rtol=0, atol=1e-3)


def rows_of(output):
    """Rows of all shards by file; no file or id occurs twice."""
    rows = [row for path in sorted((output / "shards").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert len({row["file"] for row in rows}) == len(rows)
    assert len({row["image_id"] for row in rows}) == len(rows)
    return {row["file"]: row for row in rows}


def assert_complete(output, folder):
    """Every image occurs once in the shards and in the merged files, and there are no partial files."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))
    rows = rows_of(output)
    assert sorted(rows) == files
    merged = json.loads((output / "images.json").read_text())
    assert {image["file_name"]: image["id"] for image in merged["images"]} == dict(zip(files, range(300), strict=True))
    detections = json.loads((output / "detections.json").read_text())
    assert len(detections) == sum(len(row["scores"]) for row in rows.values())
    assert not list(output.rglob(f"*{PARTIAL}"))


# -- results of one run ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, predict):
    """Readable and unreadable images of all kinds, the output of one process with a batch size of 3, and its text."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "deeper").mkdir()
    photo(120, 90, 1).save(folder / "rgb.jpg")
    photo(60, 140, 2).convert("L").save(folder / "deeper" / "grey.png")
    photo(80, 64, 3).convert("CMYK").save(folder / "cmyk.jpg")
    photo(80, 64, 4).convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(np.arange(64 * 80, dtype=np.uint16).reshape(64, 80) * 12).save(folder / "deep.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    photo(100, 60, 5).save(folder / "turned.jpg", exif=turned)
    (folder / "text.jpg").write_bytes(b"no image")
    (folder / "empty.png").touch()
    content = (folder / "rgb.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    Image.new("L", (100_000, 1)).save(folder / "thread.png")  # 1 pixel is the least that a resize leaves
    photo(70, 70, 6).save(os.fsencode(folder) + b"/latin-\xe9.png")
    output = tmp_path_factory.mktemp("out") / "predictions"
    return folder, output, predict(folder, "--output_dir", output, "--batch_size", "3", "--shard_size", "4")


GOOD = {
    "thread.png",
    "rgb.jpg",
    "deeper/grey.png",
    "cmyk.jpg",
    "alpha.png",
    "deep.png",
    "turned.jpg",
    "latin-\\xe9.png",
}
BAD = {"text.jpg", "empty.png", "truncated.jpg", "gone.jpg"}


def test_results_are_those_of_the_pipeline_image_by_image(mixed, checkpoint):
    folder, output, _ = mixed
    rows = rows_of(output)
    assert {file for file, row in rows.items() if row["error"] is None} == GOOD
    for file in sorted(GOOD - {"latin-\\xe9.png"}):
        assert_equal(rows[file], expected(checkpoint, folder / file))
    assert sum(len(row["scores"] or ()) for row in rows.values()) > 10
    assert (rows["turned.jpg"]["width"], rows["turned.jpg"]["height"]) == (60, 100)


def test_shards_are_ordinary_parquet(mixed):
    _, output, _ = mixed
    paths = sorted(str(path) for path in (output / "shards").iterdir())
    assert len(paths) == 3  # 12 images, 4 per shard
    data = Dataset.from_parquet(paths)
    assert set(data.column_names) == {
        "image_id", "file", "width", "height", "scores", "labels", "label_ids", "boxes", "error",
    }  # fmt: skip
    assert len(data) == len(GOOD) + len(BAD)


def test_detections_are_coco_results_of_images_json(mixed):
    _, output, text = mixed
    ground_truth = COCO(str(output / "images.json"))
    found = ground_truth.loadRes(str(output / "detections.json"))
    rows = {row["image_id"]: row for row in rows_of(output).values()}
    assert ground_truth.loadCats(ground_truth.getCatIds())[1] == {"id": 1, "name": "ellipse"}
    for image_id in ground_truth.getImgIds():
        row, results = rows[image_id], found.imgToAnns[image_id]
        assert [result["category_id"] for result in results] == row["label_ids"]
        for result, (left, top, right, bottom), score in zip(results, row["boxes"], row["scores"], strict=True):
            assert result["bbox"] == pytest.approx([left, top, right - left, bottom - top], abs=1e-4)
            assert result["score"] == pytest.approx(score, abs=1e-5)
    assert f"{len(found.anns)} objects in {len(GOOD)} images" in text


def test_files_that_cannot_be_read_are_listed(mixed):
    folder, output, text = mixed
    merged = json.loads((output / "images.json").read_text())
    assert {record["file_name"] for record in merged["unreadable"]} == BAD
    assert {record["file_name"] for record in merged["images"]} == GOOD
    for name in BAD:
        assert f"not read: {folder / name}: " in text
    assert all(record["error"] for record in merged["unreadable"])


def test_pictures_have_the_size_of_the_displayed_image(mixed):
    _, output, _ = mixed
    assert {str(p.relative_to(output))[:-4] for p in output.rglob("*.png")} == GOOD
    assert Image.open(output / "rgb.jpg.png").size == (120, 90)
    assert Image.open(output / "turned.jpg.png").size == (60, 100)
    assert Image.open(output / "deeper" / "grey.png.png").size == (60, 140)


def test_a_finished_job_is_not_changed_and_another_job_is_refused(mixed, predict):
    folder, output, _ = mixed
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert "Already done" in predict(folder, "--output_dir", output, "--batch_size", "2")
    with pytest.raises(ValueError, match=r"threshold was 0\.25 and is 0\.3"):
        predict(folder, "--output_dir", output, "--threshold", "0.3")
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_tiles_find_more_objects(checkpoint, predict, tmp_path):
    folder, output = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    photo(200, 120, 1).save(folder / "large.jpg")
    photo(60, 40, 2).save(folder / "small.jpg")
    predict(folder, "--output_dir", output, "--tile", "80", "--overlap", "0.25", "--batch_size", "4")
    rows = rows_of(output)
    assert_equal(rows["small.jpg"], expected(checkpoint, folder / "small.jpg"))  # it is smaller than a tile
    assert len(rows["large.jpg"]["scores"]) > len(expected(checkpoint, folder / "large.jpg"))
    assert rows["large.jpg"]["scores"] == sorted(rows["large.jpg"]["scores"], reverse=True)
    boxes = np.array(rows["large.jpg"]["boxes"])
    assert boxes.min() >= 0
    assert (boxes <= [200, 120, 200, 120]).all()
    assert Image.open(output / "large.jpg.png").size == (200, 120)
    settings = json.loads((output / "job.json").read_text())["settings"]
    assert (settings["tile"], settings["overlap"], settings["dtype"]) == (80, 0.25, "float32")


# -- several processes, and early ends ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(many, predict, tmp_path_factory):
    output = tmp_path_factory.mktemp("reference") / "out"
    predict(many, "--output_dir", output, "--batch_size", "4", "--no-pictures", "--num_workers", "2")
    assert_complete(output, many)
    assert not list(output.rglob("*.png"))
    return rows_of(output)


def assert_as_reference(output, reference):
    for file, row in rows_of(output).items():
        assert row["labels"] == reference[file]["labels"]
        np.testing.assert_allclose(row["boxes"], reference[file]["boxes"], rtol=0, atol=1e-3)


class Job:
    """A launch that is ended from outside after it has written a shard."""

    def __init__(self, *arguments):
        self.shards = Path(arguments[3]) / "shards"
        before = self.count()
        self.process = subprocess.Popen(
            command(*arguments), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        end = time.monotonic() + 300
        while self.count() <= before:
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.01)

    def count(self):
        return len(list(self.shards.glob("*.parquet")))

    def processes(self):
        """The process and its descendants."""
        found = [self.process.pid]
        for pid in found:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                found += [int(child) for child in children.read_text().split()]
        return found

    def end(self, number, pids):
        for pid in pids:
            os.kill(pid, number)
        output = self.process.communicate(timeout=120)[0]
        return self.process.returncode, output


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_job_survives_kills_and_is_finished_by_two_processes(many, checkpoint, reference, tmp_path):
    """On 2 processes of which only the launcher is killed, 1 that is killed, 1 whose launcher is killed, and 1 that is
    asked to stop; no image is lost or predicted twice. Then 2 processes share the rest."""
    output = tmp_path / "out"
    options = (many, checkpoint, output, "--shard_size", "3", "--no-pictures")
    delays = random.Random(0)
    done = [0]
    for launcher, everyone in ((TWO, False), (ONE, True), (LAUNCH, False)):
        job = Job(launcher, *options)
        time.sleep(delays.uniform(0, 0.15))
        job.end(signal.SIGKILL, job.processes() if everyone else [job.process.pid])
        done.append(len(rows_of(output)))
    assert done == sorted(done)
    assert 0 < done[1] < done[2] < 300
    assert not (output / "detections.json").exists()
    (output / "shards" / f"left.parquet.1{PARTIAL}").write_bytes(b"half a shard")

    job = Job(ONE, *options, "--shard_size", "20")
    code, text = job.end(signal.SIGTERM, [job.process.pid])
    assert code == 143, text
    assert "The same command resumes the job" in text
    assert not list(output.rglob(f"*{PARTIAL}"))
    done.append(len(rows_of(output)))
    assert done[3] + 20 <= done[4] < 300

    before = set((output / "shards").iterdir())
    text = run(TWO, *options, "--shard_size", "64")
    assert_complete(output, many)
    assert_as_reference(output, reference)
    assert text.count("objects in 300 images") == 1
    sizes = {0: 0, 1: 0}
    for path in set((output / "shards").iterdir()) - before:
        sizes[int(path.name.split("-")[0])] += pq.read_metadata(path).num_rows
    assert sizes == {0: -(-(300 - done[4]) // 2), 1: (300 - done[4]) // 2}


@pytest.mark.skipif(sys.platform == "win32", reason="process ids of parents")
def test_a_blocked_process_ends_after_its_launcher(tmp_path):
    function = f"__import__('runpy').run_path({stop.__file__!r})['end_with_launcher']"  # without importing the package
    worker = f"{function}(0); open('ready', 'w'); input()"
    read, write = os.pipe()  # the worker waits for input that never comes
    launcher = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"],
        env=ENVIRONMENT | {"TORCHELASTIC_RUN_ID": "1"}, cwd=tmp_path, stdin=read, stdout=subprocess.PIPE,
    )  # fmt: skip
    while not (tmp_path / "ready").exists():
        assert launcher.poll() is None
        time.sleep(0.01)
    launcher.kill()
    launcher.communicate(timeout=60)  # returns when the worker, too, has closed the pipe
    os.close(read)
    os.close(write)


# -- batches -----------------------------------------------------------------------------------------------------------


def test_sizes_come_from_headers(mixed):
    folder, output, _ = mixed
    for file, row in rows_of(output).items():
        if row["error"] is None and "latin" not in file:
            assert read_size(folder / file) == (row["height"], row["width"])
    assert read_size(folder / "turned.jpg") == (100, 60)
    assert read_size(folder / "text.jpg") == read_size(folder / "gone.jpg") == (0, 0)


@pytest.mark.parametrize("size", [{"shortest_edge": 64, "longest_edge": 120}, {"max_height": 90, "max_width": 60}])
def test_batches_hold_one_size_and_results_do_not_depend_on_them(checkpoint, many, tmp_path, size, monkeypatch):
    detector = pipeline("object-detection", model=str(checkpoint), device="cpu")
    detector.image_processor = DetrImageProcessor(size=size)
    images = open_job(tmp_path, many, {}, {0: "cat"}).pending().slice(0, 70)
    shapes, found = [], {}
    forward = DetrDetectionPipeline._forward

    def record(self, inputs):
        shapes.append([image.shape[1:] for image in inputs["pixel_values"]])
        return forward(self, inputs)

    monkeypatch.setattr(DetrDetectionPipeline, "_forward", record)
    for batch_size in (1, 4):
        for batch in load_batches(detector, many, images, batch_size=batch_size, num_workers=batch_size // 4):
            for row in predict_batch(detector, batch, 0.25):
                found.setdefault(row.image_id, []).append(row)
    assert sorted(found) == images["image_id"].to_pylist()
    for sizes in shapes:
        padded = len(sizes) * max(height for height, _ in sizes) * max(width for _, width in sizes)
        assert padded <= 1.05 * sum(height * width for height, width in sizes)
    assert len(shapes) < 70 + 35  # one by one, and at least two at a time on average
    for alone, together in found.values():
        assert alone.label_ids.tolist() == together.label_ids.tolist()
        torch.testing.assert_close(alone.boxes, together.boxes, rtol=0, atol=1e-3)
