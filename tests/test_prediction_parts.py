"""The parts of `hf_detr.prediction` that work on folders: jobs, shards, locks, ids and batches."""

import errno
import json
import os
import random
import threading

import pytest
import torch
from conftest import tiny_model
from test_image_processing import photo

from hf_detr import DetrImageProcessor
from hf_detr.data import draw_shapes_dataset
from hf_detr.prediction import ShardWriter, merge_shards, model_settings, open_job
from hf_detr.prediction import job as job_module
from hf_detr.prediction.image_folder import annotation_ids, category_records, find_images
from hf_detr.prediction.predict import Prediction
from hf_detr.prediction.shards import done_ids, read_shards
from hf_detr.prediction.size_batches import group_by_size, run_ahead
from hf_detr.runtime import acquire_lock, files


def prediction(image_id, error=None):
    size = None if error else (4, 3)
    found = torch.tensor([0.5]), torch.tensor([1]), torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    return Prediction(image_id, f"{image_id}.jpg", size, None, error, *found)


def small_job(folder, images=4, **settings):
    (folder / "images").mkdir(exist_ok=True)
    for index in range(images):
        if not (path := folder / "images" / f"{index}.jpg").exists():
            path.touch()
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


def test_what_has_changed_in_the_folder_since_the_job_started_is_told(tmp_path):
    assert small_job(tmp_path, images=3).notes == ()  # its lock is released with the job
    again = small_job(tmp_path, images=5)
    assert again.pending()["path"].to_pylist() == [b"0.jpg", b"1.jpg", b"2.jpg", b"3.jpg", b"4.jpg"]
    assert again.image_ids().tolist() == [0, 1, 2, 3, 4]
    [note] = again.notes
    assert "2 images were added since the job started, such as 3.jpg" in note
    del again
    (tmp_path / "images" / "a.jpg").touch()
    (tmp_path / "images" / "1.jpg").write_bytes(b"other")
    (tmp_path / "images" / "0.jpg").unlink()
    job = open_job(tmp_path / "out", tmp_path / "images", {"threshold": 0.5}, {0: "cat", 1: "dog"})
    assert job.pending()["path"].to_pylist()[-1] == b"a.jpg", "after those that have ids already"
    assert job.source_ids()[5] == 5
    assert [note.split(", such")[0] for note in job.notes] == [
        "1 images were added since the job started",
        "1 images of the job are not there any more",
        "1 images were written again since the job started",
    ]


def test_added_images_have_the_ids_of_the_annotations_or_are_refused(tmp_path):
    folder = draw_shapes_dataset(tmp_path / "drawn", num_train=2, num_val=3, progress=False)
    last = sorted((folder / "val").iterdir())[-1]
    last.rename(tmp_path / "later.jpg")
    names = {0: "ellipse", 1: "triangle"}
    job = open_job(tmp_path / "out", folder / "val", {}, names)
    given = json.loads((folder / "annotations" / "instances_val.json").read_text())["images"]
    assert job.source_ids() == {image["id"]: image["id"] for image in given[:2]}
    del job  # and its lock
    (tmp_path / "later.jpg").rename(last)
    job = open_job(tmp_path / "out", folder / "val", {}, names)
    assert sorted(job.source_ids().values()) == [image["id"] for image in given]
    del job
    file = folder / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"images": [i | {"id": i["id"] + 1} for i in content["images"]]}))
    with pytest.raises(ValueError, match=r"The ids in .*instances_val.json have changed .*000000.jpg had 1 and has 2"):
        open_job(tmp_path / "out", folder / "val", {}, names)
    file.write_text(json.dumps(content))
    photo().save(folder / "val" / "unknown.jpg")
    with pytest.raises(ValueError, match=r"1 images were added .* unknown.jpg, and have no id in .*instances_val.json"):
        open_job(tmp_path / "out", folder / "val", {}, names)


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


def test_other_weights_or_another_resolution_make_another_job():
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


def test_results_have_the_ids_of_the_annotations_whatever_they_are(tmp_path):
    folder = draw_shapes_dataset(tmp_path / "drawn", num_train=2, num_val=3, progress=False)
    file = folder / "annotations" / "instances_val.json"
    annotations = json.loads(file.read_text())
    names = [image["file_name"] for image in annotations["images"]]
    given = ["cam1_1", 2**70, 20210312103000121]
    for image, image_id in zip(annotations["images"], given, strict=True):
        image["id"] = image_id
    file.write_text(json.dumps(annotations | {"annotations": []}))
    job = open_job(tmp_path / "out", folder / "val", {}, {0: "ellipse", 1: "triangle"})
    assert len(set(job.image_ids())) == 3
    found = torch.tensor([0.5]), torch.tensor([1]), torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    with ShardWriter(job.shards, 0, {0: "ellipse", 1: "triangle"}) as writer:
        for row in job.pending().to_pylist():
            writer.add(Prediction(row["image_id"], row["path"].decode(), (4, 3), None, None, *found))
    merge_shards(job)
    images = json.loads(job.images_file.read_text())["images"]
    assert {image["file_name"]: image["id"] for image in images} == dict(zip(names, given, strict=True))
    detections = json.loads(job.detections_file.read_text())
    assert {detection["image_id"] for detection in detections} == set(given)


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
