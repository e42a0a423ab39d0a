"""`examples/predict.py`, also when it is killed, and the parts in `hf_detr.prediction`."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import save_tiny_checkpoint, tiny_model
from datasets import Dataset
from PIL import Image
from predict_example import PREDICT, PredictExample
from pycocotools.coco import COCO
from test_image_processing import photo
from transformers import pipeline

from hf_detr import DetrImageProcessor
from hf_detr.data import draw_shapes_dataset
from hf_detr.prediction import ShardWriter, load_batches, merge_shards, model_settings, open_job, predict_batch
from hf_detr.prediction import job as job_module
from hf_detr.prediction.image_folder import annotation_ids, category_records, find_images
from hf_detr.prediction.pipeline import DetrDetectionPipeline
from hf_detr.prediction.predict import Prediction
from hf_detr.prediction.shards import done_ids, read_shards
from hf_detr.prediction.size_batches import group_by_size, read_size, run_ahead
from hf_detr.runtime import PARTIAL, acquire_lock, files, stop

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
    Image.new("L", (100_000, 1)).save(folder / "thread.png")  # its height is 0 after the resize
    photo(70, 70, 6).save(os.fsencode(folder) + b"/latin-\xe9.png")
    output = tmp_path_factory.mktemp("out") / "predictions"
    return folder, output, predict(folder, "--output_dir", output, "--batch_size", "3", "--shard_size", "4")


GOOD = {"rgb.jpg", "deeper/grey.png", "cmyk.jpg", "alpha.png", "deep.png", "turned.jpg", "latin-\\xe9.png"}
BAD = {"text.jpg", "empty.png", "truncated.jpg", "gone.jpg", "thread.png"}


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
    with pytest.raises(SystemExit, match=r"threshold was 0\.25 and is 0\.3") as end:
        predict(folder, "--output_dir", output, "--threshold", "0.3")
    assert isinstance(end.value.code, str)  # which Python prints, and exits with code 1
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


# -- the parts ---------------------------------------------------------------------------------------------------------


def prediction(image_id, error=None):
    size = None if error else (4, 3)
    found = torch.tensor([0.5]), torch.tensor([1]), torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    return Prediction(image_id, f"{image_id}.jpg", size, None, error, *found)


def small_job(folder, images=4, **settings):
    (folder / "images").mkdir(exist_ok=True)
    for index in range(images):
        (folder / "images" / f"{index}.jpg").touch()
    return open_job(folder / "out", folder / "images", {"threshold": 0.5} | settings, {0: "cat", 1: "dog"})


def test_images_are_sorted_as_paths_and_links_followed_once(tmp_path):
    for name in ("b/2.PNG", "b/10.jpg", "b-c/1.jpg", "a.jpeg", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "circle").symlink_to(tmp_path)
    folder, files = find_images(tmp_path)
    assert folder == tmp_path
    assert files == [b"a.jpeg", b"b/10.jpg", b"b/2.PNG", b"b-c/1.jpg"]
    assert [tmp_path / os.fsdecode(file) for file in files] == sorted(tmp_path / os.fsdecode(file) for file in files)
    assert find_images(tmp_path / "a.jpeg") == (tmp_path, [b"a.jpeg"])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="contains no images"):
        find_images(tmp_path / "empty")


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions")
def test_a_subfolder_that_cannot_be_listed_is_reported(tmp_path, monkeypatch):
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "1.jpg").touch()
    (tmp_path / "shut").mkdir()
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert find_images(tmp_path)[1] == [b"open/1.jpg", b"shut"]


def test_parts_of_processes_are_disjoint_and_cover_all_pending_images(tmp_path):
    job = small_job(tmp_path, images=11)
    with ShardWriter(job.shards, 0, {1: "dog"}, size=2) as writer:
        for image_id in (3, 4, 9):
            writer.add(prediction(image_id))
    assert sorted(done_ids(job.shards)) == [3, 4, 9]
    for processes in (1, 2, 3, 12):
        parts = [job.pending(processes, index)["image_id"].to_pylist() for index in range(processes)]
        assert sorted(image_id for part in parts for image_id in part) == [0, 1, 2, 5, 6, 7, 8, 10]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_rows_are_written_once_when_an_error_occurs(tmp_path):
    writer = ShardWriter(tmp_path, 0, {1: "dog"})
    writer.add(prediction(1))
    with pytest.raises(KeyboardInterrupt), writer:
        raise KeyboardInterrupt
    writer.flush()
    [row] = read_shards(tmp_path, ["image_id", "labels", "boxes"])
    assert row == {"image_id": 1, "labels": ["dog"], "boxes": [[0.0, 1.0, 2.0, 3.0]]}


def test_a_damaged_or_duplicate_shard_is_named(tmp_path):
    with ShardWriter(tmp_path, 0, {1: "dog"}) as writer:
        writer.add(prediction(1))
    [path] = tmp_path.iterdir()
    (tmp_path / "copy.parquet").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=rf"Image 1 is in {path.name} and copy.parquet"):
        done_ids(tmp_path)
    (tmp_path / "copy.parquet").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"copy.parquet cannot be read: .* Delete it"):
        done_ids(tmp_path)


def test_shards_are_merged_once_all_images_are_done(tmp_path):
    job = small_job(tmp_path, images=3)
    with ShardWriter(job.shards, 0, {1: "dog"}) as writer:
        writer.add(prediction(0))
        writer.add(prediction(1, "broken"))
    with pytest.raises(ValueError, match=r"1 images of .* are not done"):
        merge_shards(job)
    assert not job.detections_file.exists()
    with ShardWriter(job.shards, 1, {1: "dog"}) as writer:
        writer.add(prediction(2))
    summary = merge_shards(job)
    assert (summary.objects, summary.images, summary.unreadable) == (2, 2, 1)
    assert summary.errors == [(str(tmp_path / "images" / "1.jpg"), "broken")]
    before = job.detections_file.read_text()
    job.detections_file.unlink()  # as after a kill before the end
    assert not job.finished
    assert merge_shards(job) == summary
    assert job.detections_file.read_text() == before


def test_images_added_later_do_not_belong_to_the_job(tmp_path):
    assert small_job(tmp_path, images=3).num_images == 3  # its lock is released with the job
    again = small_job(tmp_path, images=5)
    assert again.pending()["path"].to_pylist() == [b"0.jpg", b"1.jpg", b"2.jpg"]


def test_another_job_or_something_else_in_the_folder_is_refused(tmp_path):
    job = small_job(tmp_path)
    with pytest.raises(ValueError, match=r"threshold was 0.5 and is 0.7. Use another --output_dir"):
        small_job(tmp_path, threshold=0.7)
    with pytest.raises(ValueError, match="weights was None and is 'abc'"):
        small_job(tmp_path, weights="abc")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "detections.json").touch()
    with pytest.raises(ValueError, match="already exists but does not belong to a prediction job"):
        open_job(tmp_path / "other", job.image_folder, {}, {0: "cat"})


def test_a_job_is_locked_while_any_of_its_processes_runs(tmp_path, monkeypatch):
    main = small_job(tmp_path)
    workers = [open_job(main.folder, tmp_path / "images", {}, {}, process_index=index) for index in (1, 2)]
    monkeypatch.setattr(job_module, "acquire_lock", lambda path: acquire_lock(path, seconds=0))
    with pytest.raises(TimeoutError, match="still work on"):
        small_job(tmp_path)
    del main  # as if the main process was killed
    with pytest.raises(TimeoutError, match="still work on"):
        small_job(tmp_path)
    workers.clear()
    small_job(tmp_path)


def test_a_lock_is_held_until_it_is_released(tmp_path):
    held = acquire_lock(tmp_path / "lock")
    with pytest.raises(TimeoutError, match="locked by another process"):
        acquire_lock(tmp_path / "lock", seconds=0)
    held.release()
    acquire_lock(tmp_path / "lock", seconds=0).release()


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch):
    def no_locks(self):
        raise OSError(errno.ENOLCK, "No locks available")

    warnings = []
    monkeypatch.setattr(files.FileLock, "_acquire", no_locks)
    monkeypatch.setattr(files.logger, "warning", warnings.append)
    acquire_lock(tmp_path / "lock", seconds=0).release()
    assert "cannot be locked" in warnings[0]
    with pytest.raises(FileNotFoundError):
        acquire_lock(tmp_path / "nowhere" / "lock")


def test_other_weights_or_another_resolution_make_another_job(checkpoint):
    model, processor = tiny_model(), DetrImageProcessor()
    before = model_settings(model, processor)
    assert json.loads(json.dumps(before, default=str)) == json.loads(
        json.dumps(model_settings(model, DetrImageProcessor()), default=str)
    )
    with torch.no_grad():
        model.class_labels_classifier.bias[0] += 1e-3
    after = model_settings(model, DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 120}))
    assert {name for name in before if str(before[name]) != str(after[name])} == {"weights", "processor.size"}


def test_ids_come_from_annotations_that_cover_all_images(tmp_path):
    folder = draw_shapes_dataset(tmp_path / "drawn", num_train=2, num_val=4, progress=False)
    file = folder / "annotations" / "instances_val.json"
    annotations = json.loads(file.read_text())
    for image in annotations["images"]:
        image["id"] += 700
    annotations["annotations"] = []
    for category in annotations["categories"]:
        category["id"] *= 10
    file.write_text(json.dumps(annotations))
    ids, source = annotation_ids(*find_images(folder / "val"))
    assert ids == [701, 702, 703, 704]
    assert source.file == file
    names = {0: "triangle", 1: "other", 2: "rectangle", 3: "ellipse"}
    assert category_records(names, source) == [
        {"id": 30, "name": "triangle"},
        {"id": 0, "name": "other"},
        {"id": 10, "name": "rectangle"},
        {"id": 20, "name": "ellipse"},
    ]
    assert category_records({0: "cat"}, source) == [{"id": 0, "name": "cat"}]
    assert category_records({0: "cat"}, None) == [{"id": 0, "name": "cat"}]
    photo().save(folder / "val" / "new.jpg")
    assert annotation_ids(*find_images(folder / "val")) is None
    job = open_job(tmp_path / "out", folder / "val", {}, names)
    assert (job.ids_from, list(job.image_ids())) == (None, [0, 1, 2, 3, 4])


def test_damaged_annotations_do_not_prevent_prediction(tmp_path):
    (tmp_path / "val").mkdir()
    photo().save(tmp_path / "val" / "1.jpg")
    (tmp_path / "val.json").write_text("{")
    assert annotation_ids(*find_images(tmp_path / "val")) is None
    (tmp_path / "val.json").write_text('{"images": 1, "annotations": 2, "categories": 3}')
    assert annotation_ids(*find_images(tmp_path / "val")) is None


def test_equal_sizes_are_batched_together_and_none_is_lost():
    a, b, c, far = (80, 100), (80, 101), (80, 102), (100, 80)
    batches = group_by_size([a, far, b, a, a, b, a, b, a], 2)
    assert sorted(map(sorted, batches)) == [[0, 3], [1], [2, 5], [4, 6], [7, 8]]
    assert group_by_size([], 4) == []
    assert sorted(map(len, group_by_size([a] * 9 + [b] + [c], 4))) == [3, 4, 4]  # remainders share a batch
    assert sorted(map(len, group_by_size([(0, 0)] * 5 + [a], 4))) == [
        1,
        1,
        4,
    ]  # unreadable images stay apart
    generator = random.Random(0)
    sizes = [(generator.randint(40, 200), generator.randint(40, 200)) for _ in range(500)]
    batches = group_by_size(sizes, 8)
    assert sorted(index for batch in batches for index in batch) == list(range(500))
    for batch in batches:
        padded = len(batch) * max(sizes[i][0] for i in batch) * max(sizes[i][1] for i in batch)
        assert padded <= 1.05 * sum(sizes[i][0] * sizes[i][1] for i in batch)


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


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_reading_ahead_keeps_the_order_and_a_bound(num_workers):
    made, lock = [], threading.Lock()

    def make(item):
        with lock:
            made.append(item)
        return item * item

    for number, result in enumerate(run_ahead(make, range(50), num_workers)):
        assert result == number * number
        assert len(made) <= number + 1 + num_workers
    assert len(made) == 50
