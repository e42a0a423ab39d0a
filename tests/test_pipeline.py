"""`pipeline("object-detection")` with our models, and with everyone else's as before."""

import pickle

import numpy as np
import pytest
import torch
import transformers
from conftest import save_tiny_checkpoint, tiny_model, transformers_twin
from test_image_processing import photo
from transformers import pipeline

from hf_detr import DetrDetectionPipeline, DetrImageProcessor
from hf_detr.speed import PreparedDetr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), {0: "cat", 1: "dog"})


@pytest.fixture
def detector(folder):
    return pipeline("object-detection", model=str(folder))


IMAGES = [photo(90, 60, 1), photo(60, 100, 2).convert("L"), photo(64, 64, 3).convert("CMYK"), photo(120, 50, 4)]


def close(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a["label"] == b["label"]
        assert a["score"] == pytest.approx(b["score"], abs=1e-4)
        assert all(abs(a["box"][key] - b["box"][key]) <= 1 for key in b["box"])  # rounded to whole pixels


def test_batches_of_different_sizes_and_modes_give_what_one_by_one_gives(detector):
    one_by_one = [detector(image, threshold=0.3) for image in IMAGES]
    assert sum(len(result) for result in one_by_one) > 4
    for batch_size in (1, 2, 3, 4):
        batched = detector(IMAGES, threshold=0.3, batch_size=batch_size)
        assert len(batched) == len(IMAGES)
        for a, b in zip(batched, one_by_one, strict=True):
            close(a, b)
    generated = list(detector((image for image in IMAGES), threshold=0.3, batch_size=3))
    for a, b in zip(generated, one_by_one, strict=True):
        close(a, b)


def test_boxes_end_at_the_image(detector):
    for image in IMAGES:
        for found in detector(image, threshold=0.0):
            box = found["box"]
            assert 0 <= box["xmin"] <= box["xmax"] <= image.width
            assert 0 <= box["ymin"] <= box["ymax"] <= image.height


def test_arrays_tensors_and_paths_are_images_too(detector, tmp_path):
    image = photo(90, 60, 1)
    image.save(tmp_path / "a.png")
    expected = detector(image, threshold=0.3)
    array = np.asarray(image)
    for same in (
        array,
        array.transpose(2, 0, 1).copy(),
        torch.from_numpy(array.copy()),
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
    ):
        close(detector(same, threshold=0.3), expected)
    for a in detector([array, array], threshold=0.3, batch_size=2):
        close(a, expected)


def test_model_and_processor_as_objects_and_no_complaint(folder, capfd):
    transformers.utils.logging.set_verbosity_info()
    try:
        model = transformers.AutoModelForObjectDetection.from_pretrained(folder)
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        detector = pipeline("object-detection", model=model, image_processor=processor)
        detector(photo())
    finally:
        transformers.utils.logging.set_verbosity_warning()
    output = capfd.readouterr()
    assert "not supported" not in output.out + output.err
    assert type(detector) is DetrDetectionPipeline


def test_names_of_classes_are_the_models(detector):
    assert {found["label"] for found in detector(photo(), threshold=0.0)} <= {"cat", "dog"}


def test_thresholds_of_each_class_are_used_when_asked(folder, detector):
    with pytest.raises(ValueError, match="needs class_thresholds"):
        detector(photo(), threshold="per_class")
    everything = detector(photo(), threshold=0.0)
    scores = {name: sorted(f["score"] for f in everything if f["label"] == name) for name in ("cat", "dog")}
    limits = [values[len(values) // 2] if values else 0.5 for values in scores.values()]
    processor = DetrImageProcessor.from_pretrained(folder)
    processor.class_thresholds = limits
    found = pipeline("object-detection", model=detector.model, image_processor=processor)(
        photo(), threshold="per_class"
    )
    limit = dict(zip(("cat", "dog"), limits, strict=True))
    assert found == [f for f in everything if f["score"] >= limit[f["label"]]]
    assert 0 < len(found) < len(everything)


def test_boxes_are_whole_pixels_unless_asked_otherwise(detector):
    rounded, exact = detector(photo(), threshold=0.0), detector(photo(), threshold=0.0, round_boxes=False)
    assert any(value % 1 for f in exact for value in f["box"].values())
    for a, b in zip(rounded, exact, strict=True):
        assert a["box"] == {key: int(value) for key, value in b["box"].items()}
        assert all(isinstance(value, int) for value in a["box"].values())


def test_other_models_get_the_pipeline_they_had():
    theirs = transformers_twin(tiny_model(auxiliary_loss=False))
    detector = pipeline(
        "object-detection",
        model=theirs,
        image_processor=transformers.DetrImageProcessor(size={"height": 64, "width": 64}),
    )
    assert type(detector) is transformers.ObjectDetectionPipeline
    assert isinstance(detector(photo(), threshold=0.0), list)


def test_what_predicts_is_a_prepared_copy_that_follows_the_model(folder, detector, tmp_path):
    before = detector(IMAGES[0], threshold=0.0)
    assert isinstance(detector._predictor(), PreparedDetr)
    assert detector._predictor() is detector._predictor()
    assert not isinstance(detector.model, PreparedDetr)
    with torch.no_grad():
        detector.model.class_labels_classifier.bias.add_(torch.tensor([0, 9.0, 0]))
        detector.model.model.backbone.model.get_submodule("conv1.0").weight.mul_(-1)
    after = detector(IMAGES[0], threshold=0.0)
    fresh = pipeline("object-detection", model=detector.model, image_processor=detector.image_processor)
    assert [object["label"] for object in before] != [object["label"] for object in after]
    close(after, fresh(IMAGES[0], threshold=0.0))
    detector.save_pretrained(tmp_path / "saved")
    close(after, pipeline("object-detection", model=str(tmp_path / "saved"))(IMAGES[0], threshold=0.0))


def test_workers_that_are_not_forked_get_the_pipeline_after_it_was_used(detector):
    before = detector(IMAGES[0], threshold=0.0)
    assert pickle.loads(pickle.dumps(detector))(IMAGES[0], threshold=0.0) == before
    assert detector._prepared is not None


def test_outputs_cross_to_the_host_once_a_batch(detector, monkeypatch):
    inputs = [detector.preprocess(image) for image in IMAGES[:2]]
    gathered = {key: [given[key][0] for given in inputs] for key in inputs[0]}
    copies, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor.shape) or cpu(tensor))
    with torch.no_grad():
        outputs = detector._forward(gathered)
    assert copies == [(2, outputs.logits.shape[1], outputs.logits.shape[2] + 4)]


def test_a_compiled_model_is_used_as_it_is(detector):
    detector.model.compile(backend="eager")
    assert detector._predictor() is detector.model
