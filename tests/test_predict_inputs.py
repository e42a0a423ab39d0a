"""What `examples/predict.py` takes and where its results go: several inputs, URLs, exports, folders with results."""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import save_tiny_checkpoint
from predict_example import PredictExample
from test_image_processing import photo
from test_predict import rows_of

from hf_detr import DetrForDetection, DetrImageProcessor
from hf_detr.evaluation import save_class_thresholds
from hf_detr.export import export_model

pytestmark = pytest.mark.xdist_group("predict")  # with the checkpoint that is expensive to load


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), {0: "rectangle", 1: "ellipse", 2: "triangle"})


@pytest.fixture(scope="module")
def predict(checkpoint):
    return PredictExample(checkpoint)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, with three images in two folders."""
    for index, name in enumerate(("images/0.jpg", "images/deeper/1.jpg", "more/2.jpg")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        photo(90, 60, index).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder with an image at two paths."""
    folder = tmp_path_factory.mktemp("served")
    for name, index in (("a b.jpg", 5), ("deeper/a b.jpg", 6)):
        (folder / name).parent.mkdir(exist_ok=True)
        photo(80, 60, index).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def address(served):
    """Of a server of it on the loopback."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=served))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def files_of(output):
    return sorted(image["file_name"] for image in json.loads((output / "images.json").read_text())["images"])


def test_files_folders_and_urls_are_one_job(here, predict, address):
    arguments = ("images", "more/2.jpg", f"{address}/a%20b.jpg", f"{address}/deeper/a%20b.jpg?size=1")
    predict(*arguments)
    out = here / "predictions"
    loaded = ["predictions/downloads/a b-2.jpg", "predictions/downloads/a b.jpg"]
    assert files_of(out) == ["images/0.jpg", "images/deeper/1.jpg", "more/2.jpg", *loaded]
    assert (out / "images" / "deeper" / "1.jpg.png").is_file()
    assert set(arguments[2:]) < set(json.loads((out / "job.json").read_text())["settings"]["images"])
    assert "Already done" in predict(*reversed(arguments), "./more/2.jpg")
    predict(*arguments, "--overwrite", "--output_dir", "predictions")
    assert files_of(out) == ["images/0.jpg", "images/deeper/1.jpg", "more/2.jpg", *loaded]
    assert "Already done" in predict(*arguments)

    predict(arguments[2], "--output_dir", "one")
    assert files_of(here / "one") == ["a b.jpg"]


def test_overwriting_downloads_again(here, predict, address, served):
    url = f"{address}/changed.jpg"
    for index in (1, 2):
        photo(80, 60, index).save(served / "changed.jpg")
        predict(url, "--overwrite")
        loaded = here / "predictions" / "downloads" / "changed.jpg"
        assert loaded.read_bytes() == (served / "changed.jpg").read_bytes()
    photo(80, 60, 3).save(served / "changed.jpg")
    assert "Already done" in predict(url)
    assert loaded.read_bytes() != (served / "changed.jpg").read_bytes()


def test_what_is_not_there_is_named_before_anything_is_loaded(here, predict, address):
    with pytest.raises(FileNotFoundError, match=r"There is no nowhere\.jpg\."):
        predict("images", "nowhere.jpg", "--model", "no/such/model")
    with pytest.raises(OSError, match=rf"{address}/none.jpg cannot be downloaded: .*404"):
        predict(f"{address}/none.jpg")
    with pytest.raises(OSError, match="cannot be downloaded"):
        predict("http://127.0.0.1:9/none.jpg")
    assert not (here / "predictions" / "job.json").exists()


def test_an_export_predicts_what_its_checkpoint_does(here, predict, checkpoint):
    model = DetrForDetection.from_pretrained(checkpoint)
    export_model(
        model, DetrImageProcessor.from_pretrained(checkpoint), here / "export", graph_format="torch",
        report=lambda text: None,
    )  # fmt: skip
    predict("images", "--output_dir", "theirs")
    predict("images", "--output_dir", "ours", "--model", "export", "--batch_size", "2")
    theirs, ours = rows_of(here / "theirs"), rows_of(here / "ours")
    assert sum(len(row["scores"]) for row in theirs.values()) > 5
    for file, row in theirs.items():
        assert ours[file]["labels"] == row["labels"]
        assert ours[file]["scores"] == pytest.approx(row["scores"], abs=1e-4)
        for box, expected in zip(ours[file]["boxes"], row["boxes"], strict=True):
            assert box == pytest.approx(expected, abs=1e-2)
    settings = json.loads((here / "ours" / "job.json").read_text())["settings"]
    assert settings["dtype"] == "float32"
    assert settings["weights"] != json.loads((here / "theirs" / "job.json").read_text())["settings"]["weights"]
    with pytest.raises(ValueError, match="an export, which runs on the CPU"):
        predict("images", "--model", "export", "--compile")


def test_the_threshold_of_each_class(here, predict, checkpoint):
    predict("images", "--output_dir", "all", "--threshold", "0")
    pairs = [pair for row in rows_of(here / "all").values() for pair in zip(row["labels"], row["scores"], strict=True)]
    chosen = max({name for name, _ in pairs}, key=[name for name, _ in pairs].count)
    scores = sorted(score for name, score in pairs if name == chosen)
    middle = (scores[len(scores) // 2 - 1] + scores[len(scores) // 2]) / 2
    with pytest.raises(ValueError, match="threshold"):
        predict("images", "--output_dir", "own", "--threshold", "per_class")
    names = ("rectangle", "ellipse", "triangle")
    save_class_thresholds(checkpoint, [middle if name == chosen else 1.0 for name in names])
    predict("images", "--output_dir", "now", "--threshold", "per_class")
    found = [name for row in rows_of(here / "now").values() for name in row["labels"]]
    assert found == [chosen] * sum(score > middle for score in scores)
    for wrong in ("50", "nan", "-0.1", "per-class"):
        with pytest.raises(SystemExit):
            predict("images", "--threshold", wrong)


def test_without_a_folder_a_job_finds_its_own_or_a_free_one(here, predict):
    predict("images")
    assert "predictions-2" in predict("images", "--threshold", "0.3")
    assert "predictions-3" in predict("more")
    assert "Already done, nothing was changed: predictions-2" in predict("images", "--threshold", "0.3")
    for path in (here / "predictions").rglob("*"):
        path.unlink() if path.is_file() else None
    assert "Already done, nothing was changed: predictions-3" in predict("more"), "though an earlier one is free"
    assert "predictions/detections.json" in predict("images", "--threshold", "0.4")


def test_results_are_overwritten_when_the_new_ones_are_complete(here, predict, monkeypatch):
    predict("images")
    before = (here / "predictions" / "detections.json").read_text()
    monkeypatch.setattr(predict.module, "merge_shards", lambda job: 1 / 0)  # stopped before the end
    with pytest.raises(ZeroDivisionError):
        predict("more", "images", "--overwrite", "--output_dir", "predictions")
    assert (here / "predictions" / "detections.json").read_text() == before
    monkeypatch.undo()
    monkeypatch.chdir(here)
    out = ("--output_dir", "predictions")
    predict("more", "images", "--overwrite", "--threshold", "0.3", *out)  # another command, which forgets that one
    assert files_of(here / "predictions") == ["images/0.jpg", "images/deeper/1.jpg", "more/2.jpg"]
    assert not (here / "predictions" / "0.jpg.png").exists(), "drawings of the job before"
    assert [path.name for path in here.iterdir() if path.name.startswith(".")] == []

    (here / "predictions" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"more than the results to overwrite: notes.txt. Nothing was changed"):
        predict("more", "--overwrite", *out)
    assert len(files_of(here / "predictions")) == 3
    assert "3 images" not in predict("more", "--output_dir", "new", "--overwrite"), "there is nothing to overwrite"


def test_overwriting_replaces_no_other_job(here, predict):
    predict("images")
    predict("more")
    before = (here / "predictions" / "job.json").read_text()
    predict("more", "--overwrite")
    assert (here / "predictions" / "job.json").read_text() == before
    assert files_of(here / "predictions-2") == ["2.jpg"]
    (here / "predictions" / "clip.job.json").write_text("{}")  # of a video that this command does not name
    with pytest.raises(ValueError, match="more than the results to overwrite"):
        predict("more", "--overwrite", "--output_dir", "predictions")


def test_a_drawing_replaces_no_file_of_the_user(here, predict):
    photo(50, 40, 3).save(here / "images" / "0.jpg.png")
    mine = (here / "images" / "0.jpg.png").read_bytes()
    with pytest.raises(ValueError, match=r"0.jpg.png would be replaced by the drawing of 0.jpg"):
        predict("images", "--output_dir", "images")
    assert (here / "images" / "0.jpg.png").read_bytes() == mine
    predict("images", "--output_dir", "out")
    assert files_of(here / "out") == ["0.jpg", "0.jpg.png", "deeper/1.jpg"], "it is no drawing"


def test_links_keep_their_names(here, predict):
    (here / "blobs").mkdir()
    (here / "images" / "0.jpg").rename(here / "blobs" / "abc")
    (here / "link.jpg").symlink_to(here / "blobs" / "abc")
    predict("link.jpg")
    assert files_of(here / "predictions") == ["link.jpg"]


def test_files_of_others_beside_the_input_are_no_job_files(here, predict):
    (here / "images" / "worklist.parquet").write_text("mine")
    (here / "images" / "clip.job.json").write_text("[]")
    assert "2 images" in predict("images")


def test_drawings_are_never_taken_for_input(here, predict):
    for _ in range(2):
        predict(".", "--output_dir", "images")  # in the middle of them
        assert files_of(here / "images") == ["images/0.jpg", "images/deeper/1.jpg", "more/2.jpg"]
    predict("images", "--output_dir", "images/out")
    assert "3 images" in predict(".", "--output_dir", "again")
    assert files_of(here / "again") == ["images/0.jpg", "images/deeper/1.jpg", "more/2.jpg"]
    with pytest.raises(ValueError, match=r"images/images/0.jpg.png was drawn by predict.py"):
        predict("images/images/0.jpg.png")
    for folder in ("again", "again/images"):
        with pytest.raises(ValueError, match=rf"{folder} contains no images but drawings of predict.py"):
            predict(folder)


def test_images_added_after_the_end_are_predicted(here, predict):
    predict("images")
    before = rows_of(here / "predictions")
    photo(70, 70, 9).save(here / "images" / "a.jpg")
    output = predict("images")
    assert "1 images were added since the job started, such as a.jpg" in output
    assert files_of(here / "predictions") == ["0.jpg", "a.jpg", "deeper/1.jpg"]
    after = rows_of(here / "predictions")
    assert {file: after[file] for file in before} == before, "what was done is not done again"
    assert len(json.loads((here / "predictions" / "detections.json").read_text())) == sum(
        len(row["scores"]) for row in after.values()
    )
    assert "Already done" in predict("images")


def test_the_ends_that_are_empty(here, predict):
    (here / "broken").mkdir()
    (here / "broken" / "1.jpg").write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"None of the images could be read\."):
            predict("broken", "--output_dir", "out")
    assert len(json.loads((here / "out" / "images.json").read_text())["unreadable"]) == 1
    assert "No score has reached --threshold 1.0." in predict("images", "--output_dir", "none", "--threshold", "1")
    assert json.loads((here / "none" / "detections.json").read_text()) == []
