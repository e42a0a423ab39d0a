"""What the page of `examples/app.py` shows and saves, without a browser."""

import json
import multiprocessing
import runpy
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_tiny_checkpoint, tiny_segmentation
from PIL import Image
from transformers import pipeline

import hf_detr
from hf_detr import DetrImageProcessor
from hf_detr.app import Viewer, example_images, serve_page
from hf_detr.app.corrections import CorrectedBox, Corrections
from hf_detr.app.viewed_video import MAX_FRAMES, detect_in_video, draw_video
from hf_detr.app.viewer import MIN_SIDE
from hf_detr.data import load_detection_dataset

NAMES = {0: "cat", 1: "dog"}
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), NAMES)


@pytest.fixture(scope="module")
def viewer(checkpoint):
    return Viewer(str(checkpoint), "cpu")


@pytest.fixture
def image(tmp_path):
    file = tmp_path / "a picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8)).save(file)
    return file


# -- predictions -------------------------------------------------------------------------------------------------------


def test_detections_are_those_of_the_pipeline(viewer, checkpoint, image):
    viewed = viewer.view(image)
    expected = pipeline("object-detection", model=str(checkpoint), image_processor=viewer.processor)(
        str(image), threshold=0.2, round_boxes=False
    )
    found = viewed.above(0.2)
    assert len(found) == len(expected) > 1
    for ours, theirs in zip(found, sorted(expected, key=lambda d: -d["score"]), strict=True):
        assert ours["label"] == theirs["label"]
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)
        assert ours["box"] == pytest.approx(theirs["box"], abs=1e-2)


def test_another_threshold_needs_no_forward_pass(viewer, image, monkeypatch):
    viewed = viewer.view(image)
    monkeypatch.setattr(type(viewer.model), "forward", lambda *args, **kwargs: pytest.fail("a forward pass"))
    scores = [detection["score"] for detection in viewed.detections]
    middle = (scores[0] + scores[1]) / 2
    assert len(viewed.rows(middle)) == 1
    assert len(viewed.rows(0.05)) == len(scores)
    few, many = viewer.draw(viewed, middle), viewer.draw(viewed, 0.05)
    assert few.size == many.size
    assert max(few.size) == MIN_SIDE
    assert few.tobytes() != many.tobytes()


def test_a_click_finds_the_smallest_box_there(viewer, image):
    viewed = viewer.view(image)
    place = {"xmin": 10.0, "ymin": 10.0, "xmax": 60.0, "ymax": 50.0}
    viewed.detections = [
        {"score": 0.9, "label": "cat", "box": place, "query": 0},
        {"score": 0.8, "label": "dog", "box": place | {"xmax": 30.0}, "query": 1},
        {"score": 0.3, "label": "dog", "box": place | {"xmax": 20.0}, "query": 2},
    ]
    assert viewed.at(15, 20, 0.5) == 1
    assert viewed.at(15, 20, 0.2) == 2
    assert viewed.at(40, 20, 0.2) == 0
    assert viewed.at(90, 20, 0.2) is None
    assert viewed.rows(0.5) == [["cat", 0.9, 10.0, 10.0, 50.0, 40.0], ["dog", 0.8, 10.0, 10.0, 20.0, 40.0]]


def test_why_is_answered_for_the_detection_that_was_clicked(viewer, image):
    viewed = viewer.view(image)
    index = len(viewed.detections) - 1
    assert viewer.attention_of(viewed, index).tobytes() != viewer.attention_of(viewed, 0).tobytes()
    explanation = viewer.test(viewed, index)
    assert explanation.detection["query"] == viewed.detections[index]["query"]


def test_files_for_labelling_tools_hold_the_detections_above_the_threshold(viewer, image, tmp_path):
    viewed = viewer.view(image)
    threshold = (viewed.detections[1]["score"] + viewed.detections[2]["score"]) / 2
    coco = json.loads(viewer.save_coco(viewed, threshold, tmp_path / "coco.json").read_text())
    assert coco["images"] == [{"id": 1, "file_name": "a picture.png", "width": 120, "height": 80}]
    assert [category["name"] for category in coco["categories"]] == ["cat", "dog"]
    assert len(coco["annotations"]) == 2
    for annotation, detection in zip(coco["annotations"], viewed.detections, strict=False):
        box = detection["box"]
        sides = [box["xmin"], box["ymin"], box["xmax"] - box["xmin"], box["ymax"] - box["ymin"]]
        assert annotation["bbox"] == pytest.approx(sides, abs=0.01)
        assert NAMES[annotation["category_id"] - 1] == detection["label"]
        assert annotation["score"] == pytest.approx(detection["score"], abs=1e-4)
    [task] = json.loads(viewer.save_label_studio(viewed, threshold, tmp_path / "tasks.json").read_text())
    assert task["data"]["image"] == "a picture.png"
    [prediction] = task["predictions"]
    assert prediction["score"] == viewed.detections[0]["score"]
    value, box = prediction["result"][0]["value"], viewed.detections[0]["box"]
    assert value["rectanglelabels"] == [viewed.detections[0]["label"]]
    assert value["x"] == pytest.approx(100 * box["xmin"] / 120, abs=0.01)
    assert value["height"] == pytest.approx(100 * (box["ymax"] - box["ymin"]) / 80, abs=0.02)


def test_masks_are_drawn_where_the_model_has_them(image, tmp_path):
    model = tiny_segmentation(id2label=NAMES)
    model.save_pretrained(tmp_path / "masks")
    DetrImageProcessor(size={"height": 64, "width": 96}).save_pretrained(tmp_path / "masks")
    viewer = Viewer(str(tmp_path / "masks"), "cpu")
    assert "boxes and masks" in viewer.describe()
    viewed = viewer.view(image)
    viewed.masks.pred_masks.fill_(-5.0)
    without = viewer.draw(viewed, 0.05).tobytes()
    viewed.masks.pred_masks[0, viewed.detections[0]["query"], 2:6, 2:6] = 5.0
    assert viewer.draw(viewed, 0.05).tobytes() != without


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_a_bad_file_is_named_as_the_visitor_knows_it(viewer, tmp_path, content):
    file = tmp_path / "0a1b2c.png"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"^holiday\.png cannot be read as an image") as error:
        viewer.view(file, "holiday.png")
    assert str(tmp_path) not in str(error.value)


def test_examples_are_drawn_for_a_model_of_shapes_only(viewer, tmp_path, image):
    assert example_images(viewer, None, tmp_path) == []
    assert example_images(viewer, image.parent, tmp_path) == [image]
    with pytest.raises(ValueError, match="has no images"):
        example_images(viewer, Path(hf_detr.__file__).parent / "app", tmp_path)
    shapes = save_tiny_checkpoint(tmp_path / "shapes", {0: "rectangle", 1: "ellipse", 2: "triangle"})
    drawn = example_images(Viewer(str(shapes), "cpu"), None, tmp_path)
    assert len({file.read_bytes() for file in drawn}) == 4


# -- videos ------------------------------------------------------------------------------------------------------------


def write_video(file, frames):
    av = pytest.importorskip("av")
    with av.open(str(file), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(frames):
            pixels = np.full((48, 64, 3), index * 20 % 256, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    return file


def test_a_video_is_drawn_again_from_the_same_detections(viewer, tmp_path):
    source, seen = write_video(tmp_path / "clip.mp4", 6), []
    found = detect_in_video(viewer, source, "clip.mp4", seen.append)
    assert [len(found.objects), seen[-1][0]] == [6, 6]
    for threshold in (0.05, 0.99):
        assert draw_video(viewer, found, threshold, tmp_path / f"{threshold}.mp4") == []
    with hf_detr.prediction.VideoReader(tmp_path / "0.05.mp4") as reader:
        assert sum(hasattr(item, "pixels") for item in reader) == 6
    assert (tmp_path / "0.05.mp4").read_bytes() != (tmp_path / "0.99.mp4").read_bytes()


def test_a_video_that_is_too_long_or_none_is_refused(viewer, tmp_path, monkeypatch):
    source = write_video(tmp_path / "clip.mp4", 6)
    monkeypatch.setattr("hf_detr.app.viewed_video.MAX_FRAMES", 5)
    with pytest.raises(ValueError, match=r"clip has 6 frames, and the limit of this page is 5.*hf-detr predict"):
        detect_in_video(viewer, source, "clip")
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"^my\.mp4 cannot be read as a video"):
        detect_in_video(viewer, tmp_path / "bad.mp4", "my.mp4")
    assert MAX_FRAMES > 5


# -- corrections -------------------------------------------------------------------------------------------------------


def test_corrections_are_a_data_set_to_train_on(image, tmp_path):
    corrections = Corrections(tmp_path / "mine", NAMES)
    assert corrections.num_images == 0
    boxes = [CorrectedBox("dog", (10, 20, 50, 60)), CorrectedBox("cat", (-5, 70, 130, 90))]
    assert corrections.save(image, "C:\\photos\\a picture?.png", boxes) is False
    rows = load_detection_dataset(tmp_path / "mine", "train", cache_dir=tmp_path / "cache", validation_fraction=0)
    assert rows[0]["objects"]["bbox"] == [[10, 20, 40, 40], [0, 70, 120, 10]]
    assert [hf_detr.data.id2label(rows)[label] for label in rows[0]["objects"]["category"]] == ["dog", "cat"]
    [copy] = (tmp_path / "mine" / "train").iterdir()
    assert copy.read_bytes() == image.read_bytes()
    assert copy.name.endswith("-a_picture_.png")
    assert corrections.command("me/model") == f"hf-detr finetune --model me/model --dataset {tmp_path / 'mine'}"
    with zipfile.ZipFile(corrections.zip(tmp_path / "data.zip")) as archive:
        assert {"annotations/instances_train.json", f"train/{copy.name}"} <= set(archive.namelist())
        assert not any("lock" in name for name in archive.namelist())


def test_an_image_that_is_saved_again_replaces_its_boxes(image, tmp_path):
    corrections = Corrections(tmp_path / "mine", NAMES)
    other = tmp_path / "other.png"
    Image.new("RGB", (30, 20)).save(other)
    corrections.save(image, "a.png", [CorrectedBox("dog", (10, 20, 50, 60))])
    corrections.save(other, "other.png", [])
    assert corrections.save(image, "renamed.png", [CorrectedBox("cat", (0, 0, 9, 9))]) is True
    coco = json.loads(corrections.file.read_text())
    assert len(coco["images"]) == corrections.num_images == 2
    [annotation] = coco["annotations"]
    assert (annotation["bbox"], annotation["category_id"], annotation["image_id"]) == ([0, 0, 9, 9], 1, 1)


@pytest.mark.parametrize("name", ["turned.jpg", "turned.tif"])
def test_boxes_are_of_the_image_as_shown(tmp_path, name):
    turned = tmp_path / name
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(turned, exif=exif)
    corrections = Corrections(tmp_path / "mine", NAMES)
    corrections.save(turned, name, [CorrectedBox("cat", (0, 0, 20, 40))])
    assert json.loads(corrections.file.read_text())["images"][0] | {"id": 0, "file_name": ""} == {
        "id": 0, "file_name": "", "width": 20, "height": 40,
    }  # fmt: skip
    rows = load_detection_dataset(tmp_path / "mine", "train", cache_dir=tmp_path / "cache", validation_fraction=0)
    assert rows[0]["objects"]["bbox"] == [[0, 0, 20, 40]]


def test_a_saved_image_opens_with_its_saved_boxes(image, tmp_path):
    corrections = Corrections(tmp_path / "mine", NAMES)
    assert corrections.boxes_of(image) is None
    boxes = [CorrectedBox("dog", (10, 20, 50, 60)), CorrectedBox("cat", (1.5, 2.5, 30, 40))]
    corrections.save(image, "a.png", boxes)
    assert Corrections(tmp_path / "mine", NAMES).boxes_of(image) == boxes


def test_classes_that_no_data_set_can_have_are_not_offered(tmp_path, image):
    names = {0: "N/A", 1: "cat", 2: "N/A", 3: "sky"}
    model = tiny_segmentation(id2label=names, stuff_labels=["sky"])
    model.save_pretrained(tmp_path / "coco")
    DetrImageProcessor(size={"height": 64, "width": 96}).save_pretrained(tmp_path / "coco")
    viewer = Viewer(str(tmp_path / "coco"), "cpu")
    assert viewer.names_to_correct == {1: "cat"}
    corrections = Corrections(tmp_path / "mine", viewer.names_to_correct)
    corrections.save(image, "a.png", [CorrectedBox("cat", (0, 0, 9, 9))])
    rows = load_detection_dataset(tmp_path / "mine", "train", cache_dir=tmp_path / "cache", validation_fraction=0)
    assert list(hf_detr.data.id2label(rows).values()) == ["cat"]


def test_what_cannot_be_right_is_refused_and_nothing_is_saved(image, tmp_path):
    corrections = Corrections(tmp_path / "mine", NAMES)
    for box, reason in (
        (CorrectedBox("bird", (0, 0, 9, 9)), "Box 1 has the class 'bird'. Classes to choose from are cat, dog"),
        (CorrectedBox("", (0, 0, 9, 9)), "Box 1 has no class"),
        (CorrectedBox("cat", (200, 0, 300, 9)), "no area within the image, 120 x 80 pixels"),
    ):
        with pytest.raises(ValueError, match=reason):
            corrections.save(image, "a.png", [box])
    assert not (tmp_path / "mine").exists()
    corrections.save(image, "a.png", [])
    with pytest.raises(ValueError, match="does not have the classes of this model"):
        Corrections(tmp_path / "mine", {0: "bird"}).save(image, "a.png", [])


def _save_some(folder, start):
    corrections = Corrections(Path(folder), NAMES)
    for number in range(start, start + 5):
        file = Path(folder).parent / f"{number}.png"
        Image.new("RGB", (10 + number, 10)).save(file)
        corrections.save(file, file.name, [CorrectedBox("cat", (0, 0, 5, 5))])


def test_a_visitor_without_a_shared_folder_downloads_what_was_saved(viewer, image, tmp_path):
    pytest.importorskip("gradio")
    from hf_detr.app.actions import Actions

    actions, viewed = Actions(viewer, [], None, 0.5), viewer.view(image)
    folder = actions.arrive()
    edited, drawn, _ = actions.edit(viewed, 0.05, folder)
    message, button = actions.save(edited, drawn, folder)
    assert "`corrections`" in message
    assert folder not in message, "a visitor has nothing of the server's folders"
    with zipfile.ZipFile(button.value["path"] if isinstance(button.value, dict) else button.value) as archive:
        coco = json.loads(archive.read("annotations/instances_train.json"))
        assert archive.read(f"train/{coco['images'][0]['file_name']}") == image.read_bytes()
    assert len(coco["annotations"]) == len(viewed.detections)
    boxes = [annotation["bbox"][0] for annotation in coco["annotations"]]
    assert boxes == pytest.approx([d["box"]["xmin"] for d in viewed.detections], abs=0.5 / viewed.scale + 0.01)


def test_two_processes_save_into_one_folder(tmp_path):
    spawned = multiprocessing.get_context("forkserver")  # a fork has the locks of other tests' threads, but no threads
    processes = [spawned.Process(target=_save_some, args=(str(tmp_path / "mine"), start)) for start in (0, 100)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    coco = json.loads(Corrections(tmp_path / "mine", NAMES).file.read_text())
    assert len({entry["id"] for entry in coco["images"]}) == len({entry["id"] for entry in coco["annotations"]}) == 10


def test_a_deleted_upload_is_told_by_name(viewer, image, tmp_path):
    viewed = viewer.view(image, "mine.png")
    image.unlink()
    with pytest.raises(ValueError, match=r"^mine\.png is no longer here; open it again\.$"):
        viewer.attention_of(viewed, 0)
    source = write_video(tmp_path / "clip.mp4", 3)
    found = detect_in_video(viewer, source, "clip.mp4")
    source.unlink()
    with pytest.raises(ValueError, match=r"clip\.mp4 is no longer here"):
        draw_video(viewer, found, 0.5, tmp_path / "out.mp4")


def test_a_video_leaves_the_model_where_it_is(viewer, tmp_path, monkeypatch):
    moved = []
    monkeypatch.setattr(
        "hf_detr.app.viewed_video.pipeline", lambda *args, **kwargs: moved.append(kwargs["device"]) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        detect_in_video(viewer, write_video(tmp_path / "clip.mp4", 1), "clip.mp4")
    assert moved == [viewer.model.device]


def test_the_page_starts_again_where_corrections_were_saved(checkpoint, tmp_path, monkeypatch):
    """`examples/app.py` up to the server, on a folder that exists."""
    served = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corrections").mkdir()
    monkeypatch.setattr("hf_detr.app.serve_page", lambda *args, **kwargs: served.append((args, kwargs)))
    monkeypatch.setattr(sys, "argv", ["app.py", "--model", str(checkpoint), "--device", "cpu"])
    runpy.run_path(str(ROOT / "examples" / "app.py"), run_name="__main__")
    [((viewer, examples, corrections, threshold), options)] = served
    assert (viewer.source, examples, corrections, threshold) == (str(checkpoint), [], Path("corrections"), 0.5)
    assert options == {"server_name": "127.0.0.1", "server_port": None}
    monkeypatch.setenv("SPACE_ID", "me/page")
    runpy.run_path(str(ROOT / "examples" / "app.py"), run_name="__main__")
    assert served[1][0][2] is None, "in a Space each visitor has corrections of their own"
    with pytest.raises(ValueError, match="threshold must be between"):
        serve_page(viewer, threshold=0.995)


def test_the_viewer_leaves_the_model_in_evaluation_mode(viewer, image):
    viewer.view(image)
    assert not viewer.model.training
    assert not any(parameter.grad is not None for parameter in viewer.model.parameters())
    assert torch.is_grad_enabled()
