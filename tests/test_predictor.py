"""One predictor for every engine: the columns that come out, wherever it wakes up and whatever it is given."""

import io
import os
import pickle
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import save_tiny_checkpoint, tiny_segmentation
from PIL import Image
from transformers import pipeline

from hf_detr import DetrImageProcessor
from hf_detr.export import export_model
from hf_detr.interop import load_model
from hf_detr.prediction import Predictor
from hf_detr.prediction.shards import DETECTION_FIELDS

NAMES = dict(enumerate(["cat", "dog", "cow"]))
SIZES = [(80, 60), (60, 80), (100, 64), (80, 60), (33, 90)]  # width, height
BAD = {"empty": b"", "text": b"not an image", "none": None}


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), NAMES)


@pytest.fixture(scope="module")
def expected(checkpoint, images):
    """Of the pipeline, one image at a time."""
    detector = pipeline("object-detection", model=str(checkpoint), device="cpu")
    return [detector(image, threshold=0.2, round_boxes=False) for image in images]


def objects(row):
    boxes = [dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)) for box in row["boxes"]]
    return [
        {"score": score, "label": label, "box": box}
        for score, label, box in zip(row["scores"], row["labels"], boxes, strict=True)
    ]


def rows_of(columns):
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def test_columns_of_bytes_paths_and_images_give_what_the_pipeline_finds(checkpoint, images, expected, tmp_path):
    paths = [str(tmp_path / f"{number}.png") for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    contents = [encoded(image) for image in images]
    batches = {
        "bytes": contents,
        "path": paths,
        "image": images,
        "arrays": [np.asarray(image) for image in images],
        "structs": [{"bytes": content, "path": None} for content in contents],
    }
    assert expected[0][0]["box"] != expected[3][0]["box"], "images of one size differ in what is found"
    for name, values in batches.items():
        predictor = pickle.loads(pickle.dumps(Predictor(checkpoint, threshold=0.2, device="cpu")))
        column = name if name in ("bytes", "path", "image") else "image"
        found = predictor({column: values, "number": list(range(len(values)))})
        assert found["number"] == list(range(len(values)))
        assert ("path" in found) == (column == "path"), "names stay, contents do not"
        assert column == "path" or column not in found
        for row, of_image, (width, height) in zip(rows_of(found), expected, SIZES, strict=True):
            assert row["error"] is None
            assert (row["width"], row["height"]) == (width, height)
            assert [entry["label"] for entry in objects(row)] == [entry["label"] for entry in of_image]
            assert row["scores"] == pytest.approx([entry["score"] for entry in of_image], abs=1e-5)
            assert row["label_ids"] == [list(NAMES.values()).index(entry["label"]) for entry in of_image]
            for mine, theirs in zip(objects(row), of_image, strict=True):
                assert list(mine["box"].values()) == pytest.approx(list(theirs["box"].values()), abs=1e-2)


def test_tables_have_the_same_types_whatever_is_found(checkpoint, images):
    predictor = Predictor(checkpoint, threshold=0.2, device="cpu")
    good = predictor(pa.table({"bytes": [encoded(image) for image in images], "id": list(range(5))}))
    bad = predictor(pa.table({"bytes": pa.array(list(BAD.values()), pa.binary()), "id": [5, 6, 7]}))
    assert good.schema == bad.schema
    assert good.schema.names == ["id", *(field.name for field in DETECTION_FIELDS)]
    assert good["error"].null_count == 5
    assert bad["error"].null_count == 0
    assert bad["scores"].null_count == 3
    assert "0x" not in "".join(bad["error"].to_pylist()), "no address: equal images give equal rows"
    batch = pa.table({"bytes": [encoded(images[0])], "id": [0]}).to_batches()[0]
    assert predictor(batch).equals(good.slice(0, 1))


def test_the_batch_size_and_the_cut_of_the_stream_do_not_change_what_is_found(checkpoint, images):
    contents = [encoded(image) for image in images * 3] + [b"broken"]
    whole = Predictor(checkpoint, threshold=0.2, device="cpu")({"bytes": contents})
    for batch_size, cut in ((1, 3), (4, 16), (4, 5)):
        predictor = Predictor(checkpoint, threshold=0.2, batch_size=batch_size, device="cpu")
        parts = [predictor({"bytes": contents[start : start + cut]}) for start in range(0, len(contents), cut)]
        joined = {name: [value for part in parts for value in part[name]] for name in whole}
        assert joined["labels"] == whole["labels"]
        assert joined["error"] == whole["error"]
        if batch_size == 1:
            assert joined == whole, "to the last bit"
        for mine, other in zip(joined["boxes"], whole["boxes"], strict=True):
            assert mine is other is None or np.allclose(mine, other, atol=1e-2)


def test_datasets_map_runs_it(checkpoint, images, expected):
    data = datasets.Dataset.from_dict({"image": images, "name": list("abcde")}).cast_column("image", datasets.Image())
    predictor = Predictor(checkpoint, threshold=0.2, device="cpu")
    mapped = data.with_format("arrow").map(predictor, batched=True, batch_size=2, remove_columns=["image"])
    rows = list(mapped.with_format(None))
    assert [row["name"] for row in rows] == list("abcde")
    assert [len(row["scores"]) for row in rows] == [len(of_image) for of_image in expected]
    broken = datasets.Dataset.from_dict({"bytes": [encoded(images[0]), encoded(images[1]), b"broken"]})
    mapped = broken.with_format("arrow").map(predictor, batched=True, batch_size=2, remove_columns=["bytes"])
    rows = list(mapped.with_format(None))
    assert [row["error"] is None for row in rows] == [True, True, False], "the first batch has no error at all"


def test_masks_come_as_run_lengths(images, tmp_path):
    model = tiny_segmentation(encoder_attention_heads=8, decoder_attention_heads=8)
    model.save_pretrained(tmp_path)
    DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 120}).save_pretrained(tmp_path)
    found = Predictor(tmp_path, threshold=0.0, masks=["instance"], device="cpu")({"image": images[:1]})
    assert len(found["segments"][0]) > 0
    assert set(found["segments"][0][0]) == {"kind", "label_id", "score", "counts"}
    table = Predictor(tmp_path, threshold=0.0, masks=["instance"], device="cpu")(
        pa.table({"bytes": [encoded(images[0]), b""]})
    )
    assert table["segments"].null_count == 1
    with pytest.raises(ValueError, match="has no masks"):
        Predictor(save_tiny_checkpoint(tmp_path / "boxes", NAMES), masks=["panoptic"])({"image": images[:1]})


def test_an_export_is_woken_up_in_the_same_way(checkpoint, images, expected, tmp_path):
    processor = DetrImageProcessor.from_pretrained(checkpoint)
    export_model(load_model(checkpoint), processor, tmp_path / "out", graph_format="torch", report=lambda line: None)
    found = pickle.loads(pickle.dumps(Predictor(tmp_path / "out", threshold=0.2)))({"image": images})
    assert [len(scores) for scores in found["scores"]] == [len(of_image) for of_image in expected]


def test_huge_and_truncated_images_are_rows_with_an_error(checkpoint, images, monkeypatch):
    whole = encoded(images[2], "JPEG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    found = Predictor(checkpoint, device="cpu")({"bytes": [whole[: len(whole) // 2], encoded(images[0])]})
    assert all(found["error"])
    assert found["scores"] == [None, None]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"batch_size": 0}, "at least 1"),
        ({"threshold": "best"}, "per_class"),
        ({"threshold": 50}, "from 0 to 1"),
        ({"threshold": float("nan")}, "from 0 to 1"),
        ({"top_k": 0}, "at least 1"),
        ({"panoptic_threshold": 0.5}, '"panoptic" among'),
        ({"masks": ["semantic"]}, "panoptic"),
    ],
)
def test_arguments_that_mean_nothing_are_refused_before_a_model_is_loaded(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        Predictor("nowhere", **arguments)


def test_a_batch_without_images_names_its_columns(checkpoint):
    with pytest.raises(ValueError, match=r"no column of images \(image or bytes or path\); it has the columns url"):
        Predictor(checkpoint)({"url": ["x"]})
    with pytest.raises(ValueError, match=r"no column of images \(picture\)"):
        Predictor(checkpoint, column="picture")({"bytes": [b""]})


def test_columns_that_it_would_replace_are_refused(checkpoint, images):
    for batch in ({"image": images[:1], "labels": [1]}, pa.table({"bytes": [encoded(images[0])], "width": [3]})):
        with pytest.raises(ValueError, match=r"which the predictor adds\. Rename"):
            Predictor(checkpoint, device="cpu")(batch)


def test_a_model_that_has_changed_since_is_not_used_and_has_another_pickle(checkpoint, images, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    predictor = Predictor(tmp_path / "model", device="cpu")
    before = pickle.dumps(predictor)
    assert before == pickle.dumps(Predictor(tmp_path / "model", device="cpu"))
    os.utime(tmp_path / "model" / "model.safetensors", (0, 0))
    assert before != pickle.dumps(Predictor(tmp_path / "model", device="cpu")), "caches of datasets know them by it"
    with pytest.raises(ValueError, match="has changed since the job began"):
        pickle.loads(before)({"image": images[:1]})
    with pytest.raises(OSError, match="connect"):  # and no row says that its image cannot be read
        Predictor("nowhere", device="cpu")({"image": images[:1]})


def test_a_pickle_has_no_weights(checkpoint, images):
    predictor = Predictor(checkpoint, device="cpu")
    predictor({"image": images[:1]})
    assert len(pickle.dumps(predictor)) < 1000
    assert torch.is_grad_enabled()
