"""Exports give the model's results for any batch, size and padding, on every runtime; differences are reported."""

import importlib.util
import json
import pickle
import re
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import openvino
import pytest
import torch
from conftest import padded_batch, randomise_norms, relative_difference, tiny_model
from test_image_processing import photo
from torch.utils.data import DataLoader
from transformers import pipeline

from hf_detr import DetrForDetection, DetrImageProcessor
from hf_detr.data import DetectionCollator, draw_shapes_dataset, load_detection_dataset
from hf_detr.evaluation import evaluate_detection
from hf_detr.export import export_model, exporting, is_exported, load_exported
from hf_detr.export.masked_backbone import MaskedBackbone, plan_masks
from hf_detr.export.quantize import CalibrationImages, quantize_graph

pytestmark = pytest.mark.xdist_group("export")  # its fixtures are expensive: one worker runs them once

EXPORT = Path(__file__).parents[1] / "examples" / "export.py"
NAMES = {0: "rectangle", 1: "ellipse", 2: "triangle"}
SMALL = {"backbone": "resnet10t", "feature_stride": 8, "encoder_layers": 1, "decoder_layers": 1,
         "id2label": NAMES, "label2id": {name: index for index, name in NAMES.items()}}  # fmt: skip
KINDS = {  # the formats, and between them every kind of query and of position embedding
    "onnx": {"query_type": "learned"},
    "openvino": {"query_type": "anchor", "decoder_layers": 2},
    "torch": {"query_type": "learned", "position_embedding_type": "learned"},
}
LEARNED = {"query_type": "learned", "position_embedding_type": "learned"}
BATCHES = [[(97, 131), (64, 200), (50, 70)], [(128, 128)], [(64, 96), (64, 96)]]


def spread(model):
    """Some detections above any threshold, with boxes over the image's edge."""
    randomise_norms(model)
    with torch.no_grad():
        head = getattr(model.model.decoder, "bbox_predictor", None) or model.bbox_predictor
        head.layers[-1].weight.normal_(0, 0.3)  # that of anchors starts at zero
        model.class_labels_classifier.weight.mul_(3)
    return model


def processor():
    return DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 120})


class Export(NamedTuple):
    """A model, the folder of its export, the reported messages, and the loaded export."""

    model: Any
    folder: Path
    messages: list[str]
    loaded: Any


@pytest.fixture(scope="module")
def export_of(tmp_path_factory):
    """The export of a model to a format; with post-processing in the ONNX graph."""
    made = {}

    def make(kind):
        if kind not in made:
            torch.manual_seed(0)
            model = spread(tiny_model(**(SMALL | KINDS[kind])))
            folder, messages = tmp_path_factory.mktemp("exports") / kind, []
            options = {"graph_format": kind, "post_process": kind == "onnx", "report": messages.append}
            export_model(model, processor(), folder, **options)
            made[kind] = Export(model, folder, messages, load_exported(folder))
        return made[kind]

    return make


@pytest.fixture(params=list(KINDS))
def exported(request, export_of):
    return export_of(request.param)


@pytest.fixture
def few_cases(monkeypatch):
    """Compare on four batches; `test_export_json_describes_the_comparison` covers the full list."""
    check_cases = exporting.check_cases
    monkeypatch.setattr(exporting, "check_cases", lambda *args: check_cases(*args)[2:6])


@pytest.fixture
def use_export(monkeypatch):
    """Let `export_model` copy the graph of an export in place of tracing and writing one."""

    def use(export):
        def copy_graph(*args, **options):
            for path in export.folder.glob("model.*"):
                shutil.copy(path, args[-1])

        monkeypatch.setattr(exporting, "trace", lambda *args, **kwargs: None)
        monkeypatch.setattr(exporting, "write_graph", copy_graph)

    return use


def assert_equal(found, expected):
    assert relative_difference(found.logits, expected.logits) < 1e-4
    assert relative_difference(found.pred_boxes, expected.pred_boxes) < 1e-4


@torch.no_grad()
def test_an_export_gives_what_the_model_gives_for_any_batch_size_and_padding(exported):
    model, loaded = exported.model, exported.loaded
    for sizes in BATCHES:
        pixel_values, pixel_mask = padded_batch(sizes)
        assert_equal(loaded(pixel_values, pixel_mask), model(pixel_values, pixel_mask))
    pixel_values, pixel_mask = padded_batch(BATCHES[0])
    wider, mask = (torch.nn.functional.pad(tensor, (0, 45, 0, 30)) for tensor in (pixel_values, pixel_mask))
    wider = wider + 7.0 * (1 - mask[:, None])  # arbitrary values in the padding
    assert_equal(loaded(wider, mask), model(pixel_values, pixel_mask))
    alone, _ = padded_batch([(90, 110)])
    assert_equal(loaded(alone), model(alone))
    assert "20 cases" in exported.messages[-1]
    assert len(exported.messages) == 1


def test_a_pipeline_takes_an_export_in_place_of_the_model(exported):
    model, folder, _, loaded = exported
    images = [photo(90, 60, 1), photo(60, 100, 2), photo(64, 64, 3)]
    expected = pipeline("object-detection", model=model, image_processor=processor(), device="cpu")
    detector = pipeline("object-detection", model=loaded, image_processor=str(folder), device="cpu")
    for batch_size in (1, 3):
        pairs = zip(
            detector(images, threshold=0.1, batch_size=batch_size),
            expected(images, threshold=0.1, batch_size=batch_size),
            strict=True,
        )
        found = 0
        for ours, theirs in pairs:
            assert [d["label"] for d in ours] == [d["label"] for d in theirs]
            for a, b in zip(ours, theirs, strict=True):
                assert a["score"] == pytest.approx(b["score"], abs=1e-4)
                assert all(abs(a["box"][key] - b["box"][key]) <= 1 for key in b["box"])
            found += len(ours)
        assert found > 3

    assert "ExportedDetr" in repr(detector)
    again = pickle.loads(pickle.dumps(detector))  # as spawned workers receive it
    assert again(images[0], threshold=0.25) == detector(images[0], threshold=0.25)


def test_export_json_describes_the_comparison(exported):
    content = json.loads((exported.folder / "export.json").read_text())
    assert content["format"] == exported.folder.name
    assert (content["precision"], content["padding_exact"]) == ("float32", True)
    assert content["check"]["tolerance"] == 1e-4
    assert 0 < content["check"]["largest_difference"] < 1e-4
    cases = [(case["batch"], case["height"], case["width"], case["padded"]) for case in content["check"]["cases"]]
    assert len(set(cases)) == 20
    assert {case[0] for case in cases} == {1, 2, 3}
    assert content["versions"]["torch"] == torch.__version__.split("+")[0]


@torch.no_grad()
def test_post_processing_in_the_graph_is_that_of_the_processor(export_of):
    model, _, _, loaded = export_of("onnx")
    pixel_values, pixel_mask = padded_batch(BATCHES[0])
    sizes = torch.tensor([[480, 640], [100, 333], [75, 50]])
    found = loaded(pixel_values, pixel_mask, sizes)
    expected = processor().post_process_object_detection(model(pixel_values, pixel_mask), 0.0, sizes)
    for index, result in enumerate(expected):
        assert torch.allclose(found.scores[index], result["scores"], atol=1e-5)
        assert torch.equal(found.labels[index], result["labels"])
        assert torch.allclose(found.boxes[index], result["boxes"], atol=1e-2)


def test_an_onnx_file_names_its_inputs_outputs_and_free_sizes(export_of):
    graph = onnx.load(export_of("onnx").folder / "model.onnx").graph
    shapes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.input}
    assert shapes == {
        "pixel_values": ["batch", 3, "height", "width"],
        "pixel_mask": ["batch", "height", "width"],
        "target_sizes": ["batch", 2],
    }
    assert [output.name for output in graph.output] == ["logits", "pred_boxes", "scores", "labels", "boxes"]


@pytest.mark.skipif(
    "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"), reason="this CPU has no bfloat16"
)
@torch.no_grad()
def test_openvino_computes_in_bfloat16_on_request_only(export_of):
    model, folder, _, _ = export_of("openvino")
    pixel_values, pixel_mask = padded_batch(BATCHES[0])
    expected = model(pixel_values, pixel_mask)
    differences = {
        name: relative_difference(load_exported(folder, name)(pixel_values, pixel_mask).logits, expected.logits)
        for name in ("float32", "bfloat16")
    }
    assert differences["float32"] < 1e-4 < differences["bfloat16"] < 0.1


def calibration_folder(path, count=3):
    path.mkdir()
    for index in range(count):
        photo(80 + index, 64, index).save(path / f"{index}.jpg")
    (path / "damaged.jpg").write_text("no image")
    return path


@torch.no_grad()
def test_onnx_int8_quantises_convolutions_and_linear_layers_but_not_the_heads(export_of, tmp_path):
    model, folder, _, _ = export_of("onnx")
    folder = shutil.copytree(folder, tmp_path / "int8")
    images = CalibrationImages(calibration_folder(tmp_path / "images"), processor())
    padding = DetrImageProcessor(size={"height": 64, "width": 64}, pad_size={"height": 96, "width": 96})
    unpadded = next(iter(CalibrationImages(tmp_path / "images", padding)))
    assert unpadded["pixel_values"].shape == (1, 3, 64, 64), "a border that is no image would be calibrated on"
    quantize_graph("onnx", folder, ["pixel_values", "pixel_mask", "target_sizes"], images)
    assert list(images.unread) == [tmp_path / "images" / "damaged.jpg"]
    graph = onnx.load(folder / "model.onnx").graph
    producer = {output: node.op_type for node in graph.node for output in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert all(producer[node.input[1]] == "DequantizeLinear" for node in convolutions)
    assert len(convolutions) > 7
    rounded = {producer.get(node.input[0]) for node in graph.node if node.op_type == "QuantizeLinear"}
    assert "Conv" in rounded  # one runs in int8 only if its result is
    assert not rounded & {"MatMul", "Gemm", "Softmax"}
    initializers = {entry.name: list(entry.dims) for entry in graph.initializer}
    kept = [initializers.get(node.input[1]) for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    assert [32, 4] in kept or [4, 32] in kept  # classes
    pixel_values, pixel_mask = padded_batch(BATCHES[0])
    found, expected = load_exported(folder)(pixel_values, pixel_mask), model(pixel_values, pixel_mask)
    assert 1e-4 < relative_difference(found.pred_boxes, expected.pred_boxes) < 0.3


def run_example(monkeypatch, *arguments):
    """`examples/export.py` with these arguments, in this process."""
    spec = importlib.util.spec_from_file_location("export_example", EXPORT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [str(EXPORT), *map(str, arguments)])
    module.main()


def test_the_example_quantises_measures_ap_and_stores_both(
    export_of, use_export, few_cases, monkeypatch, capsys, tmp_path
):
    data = tmp_path / "data"
    draw_shapes_dataset(data, num_train=1, num_val=3, progress=False)
    use_export(export_of("openvino"))
    model = export_of("openvino").model
    model.save_pretrained(tmp_path / "model")
    processor().save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    options = ["--format", "openvino", "--output_dir", out, "--int8", "--calibration"]
    options += [calibration_folder(tmp_path / "images"), "--dataset", data]
    run_example(monkeypatch, tmp_path / "model", *options)
    printed = capsys.readouterr().out
    for words in ("float32 against PyTorch", "int8 against PyTorch", "Calibrated on 3 of 4 images", "a drop of"):
        assert words in printed
    content = json.loads((out / "export.json").read_text())
    assert (content["precision"], content["calibration"]) == ("int8", {"images": 3, "unread": 1, "in_folder": 4})
    assert content["check"]["largest_difference"] < 1e-4 < content["int8_check"]["largest_difference"]
    assert 'element_type="i8"' in (out / "model.xml").read_text()
    dataset = load_detection_dataset(data, "val", id2label=NAMES)
    loader = DataLoader(dataset, batch_size=3, collate_fn=DetectionCollator(processor()))
    for name, tested in (("before", model), ("after", load_exported(out))):
        again = evaluate_detection(tested, loader, dataset, processor(), progress=False).compute()
        assert again["AP"] == pytest.approx(content["evaluation"][name]["AP"], abs=2e-3)
    drop = content["evaluation"]["before"]["AP"] - content["evaluation"]["after"]["AP"]
    assert content["evaluation"]["drop"] == drop


def test_the_example_explains_errors_in_one_sentence(monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run_example(monkeypatch, tmp_path / "nowhere", "--format", "torch", "--output_dir", tmp_path / "out")


# -- where padding cannot be masked --------------------------------------------------------------------------------


@torch.no_grad()
def test_squeeze_and_excitation_runs_images_of_equal_size_together(few_cases, tmp_path):
    model = spread(tiny_model(**(SMALL | {"backbone": "test_efficientnet"})))
    messages = []
    content = export_model(model, processor(), tmp_path / "out", graph_format="torch", report=messages.append)
    assert content["padding_exact"] is False
    assert any("padding_exact: false" in line for line in messages)
    loaded = load_exported(tmp_path / "out")
    pixel_values, pixel_mask = padded_batch([(64, 100), (97, 90), (64, 100)])
    expected = model(pixel_values, pixel_mask)
    assert_equal(loaded(pixel_values, pixel_mask), expected)
    as_the_graph = loaded._run({"pixel_values": pixel_values})
    assert relative_difference(as_the_graph[0], expected.logits) > 1e-4
    with pytest.raises(ValueError, match="rectangle"):
        loaded(pixel_values, pixel_mask.flip(1))
    pixel_mask[1, :, 3:] = 0
    with pytest.raises(ValueError, match=r"got 97 x 3\."):
        loaded(pixel_values, pixel_mask)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("onnx", LEARNED),
        ("openvino", {}),
        ("openvino", LEARNED),
        ("torch", LEARNED),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_graph_for_images_of_one_size_takes_no_mask(kind, changes, few_cases, tmp_path):
    model, messages = small_model(**changes), []
    exact = DetrImageProcessor(size={"height": 80, "width": 96})
    content = export_model(model, exact, tmp_path / "out", graph_format=kind, report=messages.append)
    assert content["inputs"] == ["pixel_values"]
    assert "takes no pixel_mask" in messages[0]
    assert not any("padding_exact: false" in line for line in messages), "no advice about padding that there is not"
    loaded = load_exported(tmp_path / "out")
    assert not loaded.takes_pixel_mask
    pixel_values = torch.randn(3, 3, 80, 96)
    assert_equal(loaded(pixel_values), model(pixel_values))
    padded = padded_batch([(64, 100), (97, 90), (64, 100)])  # from another image processor
    assert_equal(loaded(*padded), model(*padded))

    fixed = tmp_path / "fixed"
    messages.clear()
    export_model(model, exact, fixed, graph_format=kind, shape=(2, 64, 128), report=messages.append)
    assert re.search(r"2 cases, largest difference \S+ without padding\.$", messages[1])
    assert DetrImageProcessor.from_pretrained(fixed).size == {"height": 64, "width": 128}
    pixel_values = torch.randn(3, 3, 64, 128)
    assert_equal(load_exported(fixed)(pixel_values), model(pixel_values))


@pytest.mark.parametrize(
    "fields",
    [
        {"size": {"height": 64, "width": 64}, "pad_size": {"height": 96, "width": 96}},
        {"size": {"height": 64, "width": 64}, "do_resize": False},
        {"size": {"max_height": 64, "max_width": 64}},
    ],
    ids=str,
)
def test_a_graph_for_images_that_may_be_padded_takes_a_mask(fields, few_cases, tmp_path):
    content = export_model(
        small_model(), DetrImageProcessor(**fields), tmp_path / "out", graph_format="torch", report=lambda text: None
    )
    assert content["inputs"] == ["pixel_values", "pixel_mask"]
    assert content["padding_exact"]


@pytest.mark.parametrize(
    ("backbone", "changes"),
    [
        ("resnet18", {}),
        ("resnet26d", {}),  # average pools that exclude padding
        ("resnet26", {"dilation": True}),
        ("convnext_atto", {}),  # incomplete patches are dropped
        ("vgg11_bn", {}),
        ("densenet121", {}),
    ],
)
@torch.no_grad()
def test_masking_padding_gives_the_features_of_each_image_alone(backbone, changes):
    model = tiny_model(backbone=backbone, **changes)
    randomise_norms(model)
    eager = model.model.backbone
    pixel_values, pixel_mask = padded_batch([(97, 131), (70, 200), (64, 83)])
    images = [pixel_values[i : i + 1, :, :h, :w] for i, (h, w) in enumerate([(97, 131), (70, 200), (64, 83)])]
    alone = [eager(image)[0].map[0] for image in images]
    masked = MaskedBackbone(eager, plan_masks(eager, 3))
    [level] = masked(pixel_values + 5.0 * (1 - pixel_mask[:, None]), pixel_mask)
    found, mask = level.map, level.mask
    for index, expected in enumerate(alone):
        rows, columns = expected.shape[1:]
        assert relative_difference(found[index, :, :rows, :columns], expected) < 1e-5
        assert mask[index].sum() == rows * columns
        assert mask[index, :rows, :columns].all()


# -- errors --------------------------------------------------------------------------------------------------------


def test_a_failed_check_writes_nothing_and_leaves_an_earlier_export(export_of, use_export, few_cases, tmp_path):
    earlier = shutil.copytree(export_of("openvino").folder, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in earlier.iterdir()}
    other = DetrForDetection(export_of("openvino").model.config).eval()
    use_export(export_of("openvino"))
    with pytest.raises(ValueError, match=r"differ from PyTorch.*Nothing was written"):
        export_model(other, processor(), earlier, graph_format="openvino", report=lambda line: None)
    assert {path.name: path.read_bytes() for path in earlier.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_cleans_up_after_a_kill(monkeypatch, export_of, tmp_path):
    """The kill came while the new folder was being filled, or after the earlier export was renamed and before the new
    one had its name."""
    model, folder, _, _ = export_of("openvino")
    shutil.copytree(folder, tmp_path / ".out.old")
    (tmp_path / ".out.partial").mkdir()
    monkeypatch.setattr(exporting, "trace", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ValueError, match=r'"resnet10t" cannot be exported as openvino\. ZeroDivisionError'):
        export_model(model, processor(), tmp_path / "out", graph_format="openvino", report=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    load_exported(tmp_path / "out")


def test_what_cannot_be_written_with_padding_masked_is_written_without(monkeypatch, few_cases, tmp_path):
    model, messages = spread(tiny_model(**SMALL)), []
    trace = exporting.trace

    def fail_with_masks(*args, mask_padding, **kwargs):
        if mask_padding:
            raise RuntimeError("no such operator\nand a page of it")
        return trace(*args, mask_padding=mask_padding, **kwargs)

    monkeypatch.setattr(exporting, "trace", fail_with_masks)
    content = export_model(model, processor(), tmp_path / "out", graph_format="torch", report=messages.append)
    assert content["padding_exact"] is False
    assert 'masked padding failed for "resnet10t" (RuntimeError: no such operator)' in messages[0]
    pixel_values, pixel_mask = padded_batch(BATCHES[0])
    with torch.no_grad():
        assert_equal(load_exported(tmp_path / "out")(pixel_values, pixel_mask), model(pixel_values, pixel_mask))


def test_an_export_of_another_model_is_not_replaced(export_of, tmp_path):
    model, folder, _, _ = export_of("torch")
    earlier = shutil.copytree(folder, tmp_path / "last-torch")
    other = DetrForDetection(model.config).eval()
    other.config.name_or_path = "someone/other"
    with pytest.raises(FileExistsError, match="is the export of another model"):
        export_model(other, processor(), earlier, graph_format="torch")
    assert [path.name for path in tmp_path.iterdir()] == ["last-torch"]


def test_a_folder_of_something_else_is_refused_before_anything_is_computed(export_of, tmp_path):
    model = export_of("torch").model
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="neither empty nor an export"):
        export_model(model, processor(), tmp_path, graph_format="torch")
    with pytest.raises(ValueError, match="no images"):
        export_model(model, processor(), tmp_path / "out", graph_format="onnx", calibration=tmp_path)
    with pytest.raises(FileNotFoundError, match="calibration images does not exist"):
        export_model(model, processor(), tmp_path / "out", graph_format="onnx", calibration=tmp_path / "none")
    with pytest.raises(ValueError, match=r"onnx, openvino, torch"):
        export_model(model, processor(), tmp_path / "out", graph_format="tflite")
    with pytest.raises(ValueError, match="float32"):
        export_model(tiny_model().bfloat16(), processor(), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_loading_explains_what_is_wrong_with_a_folder(export_of, tmp_path):
    good = export_of("openvino").folder
    assert is_exported(good)
    assert not is_exported(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_exported(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"not an exported model: it has no export\.json"):
        load_exported(tmp_path)
    with pytest.raises(ValueError, match="pass the folder"):
        load_exported(good / "model.xml")
    folder = shutil.copytree(good, tmp_path / "copy")
    (folder / "model.bin").unlink()
    with pytest.raises(ValueError, match=r"incomplete: it has no model\.bin"):
        load_exported(folder)
    (folder / "model.bin").write_bytes(b"")
    (folder / "model.xml").write_text("<net>")
    with pytest.raises(ValueError, match=r"model\.xml cannot be opened"):
        load_exported(folder)
    content = json.loads((folder / "export.json").read_text())
    for contradiction in ({"padding_exact": False}, {"inputs": ["pixel_values"]}):  # the first was once written
        (folder / "export.json").write_text(json.dumps(content | contradiction))
        with pytest.raises(ValueError, match=r"padding_exact is .*, and the inputs are .*\. Export the model again"):
            load_exported(folder)
    (folder / "export.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_exported(folder)
    (folder / "export.json").write_text('{"format": "tflite"}')
    with pytest.raises(ValueError, match="not written by hf_detr"):
        load_exported(folder)


def test_a_precision_that_a_runtime_does_not_have_is_refused(export_of):
    with pytest.raises(ValueError, match=r"dtype cannot be changed to torch\.bfloat16"):
        load_exported(export_of("onnx").folder, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match='no dtype "bf16"'):
        load_exported(export_of("openvino").folder, dtype="bf16")
    with pytest.raises(ValueError, match=r"torch\.int8"):
        load_exported(export_of("openvino").folder, dtype=torch.int8)


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_a_missing_runtime_is_named_with_its_extra(monkeypatch, export_of, tmp_path, kind):
    model, folder, _, _ = export_of(kind)
    monkeypatch.setitem(sys.modules, {"onnx": "onnxruntime", "openvino": "openvino"}[kind], None)
    with pytest.raises(ImportError, match=rf"hf_detr\[{kind}\]"):
        load_exported(folder)
    with pytest.raises(ImportError, match=rf"hf_detr\[{kind}\]"):
        export_model(model, processor(), tmp_path / "out", graph_format=kind)


def test_inputs_that_do_not_fit_are_refused(export_of):
    loaded = export_of("torch").loaded
    with pytest.raises(ValueError, match=r"\(batch, 3, height, width\)"):
        loaded(torch.zeros(1, 1, 64, 64))
    with pytest.raises(ValueError, match="to fit `pixel_values`"):
        loaded(torch.zeros(1, 3, 64, 64), torch.ones(1, 64, 65))
    with pytest.raises(ValueError, match="none"):
        loaded(torch.zeros(1, 3, 64, 64), target_sizes=torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"`target_sizes` must be \(2, 2\)"):
        export_of("onnx").loaded(torch.zeros(2, 3, 64, 64), target_sizes=torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"images of at least \d+ pixels"):
        loaded(torch.zeros(1, 3, 4, 64))
    with pytest.raises(ValueError, match="trained"):
        loaded.train()


# -- fixed shapes, float16, opsets -------------------------------------------------------------------------------------


def small_model(**config):
    torch.manual_seed(0)
    return spread(tiny_model(**(SMALL | {"query_type": "anchor"} | config)))


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_graph_of_one_shape_gives_what_the_model_gives_on_images_that_fit(kind, tmp_path):
    model, messages = small_model(), []
    content = export_model(
        model, processor(), tmp_path / "fixed", graph_format=kind, shape=(2, 96, 128), report=messages.append
    )
    assert content["shape"] == [2, 96, 128]
    assert "3 cases" in messages[0]
    if kind == "onnx":
        graph = onnx.load(tmp_path / "fixed" / "model.onnx").graph
        sizes = [[d.dim_value for d in entry.type.tensor_type.shape.dim] for entry in graph.input]
        assert sizes == [[2, 3, 96, 128], [2, 96, 128]]
    if kind == "openvino":
        graph = openvino.Core().read_model(tmp_path / "fixed" / "model.xml")
        assert [list(entry.shape) for entry in graph.inputs] == [[2, 3, 96, 128], [2, 96, 128]]
    loaded = load_exported(tmp_path / "fixed")
    with torch.no_grad():
        for sizes in ([(96, 128)], [(60, 100), (96, 40), (33, 47)], [(96, 128), (96, 128)]):
            assert_equal(loaded(*padded_batch(sizes)), model(*padded_batch(sizes)))
    with pytest.raises(ValueError, match=r"images of up to 96 x 128 pixels, got 97 x 128. Its own image processor"):
        loaded(torch.zeros(1, 3, 97, 128))

    images = [photo(500, 375, 1), photo(300, 700, 2), photo(64, 64, 3)]
    fitting = DetrImageProcessor.from_pretrained(tmp_path / "fixed")
    detector = pipeline("object-detection", model=loaded, image_processor=fitting, device="cpu")
    expected = pipeline("object-detection", model=model, image_processor=fitting, device="cpu")
    for found, wanted in zip(detector(images, threshold=0.1), expected(images, threshold=0.1), strict=True):
        assert [row["label"] for row in found] == [row["label"] for row in wanted]
        assert [row["score"] for row in found] == pytest.approx([row["score"] for row in wanted], abs=1e-4)


def test_where_padding_matters_a_graph_of_one_shape_takes_only_images_of_this_size(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "plan_masks", lambda *args: None)
    model = small_model()
    content = export_model(
        model, processor(), tmp_path / "fixed", graph_format="torch", shape=(1, 96, 64), report=lambda text: None
    )
    assert not content["padding_exact"]
    assert DetrImageProcessor.from_pretrained(tmp_path / "fixed").size == {"height": 96, "width": 64}
    loaded = load_exported(tmp_path / "fixed")
    with torch.no_grad():
        assert_equal(loaded(torch.ones(3, 3, 96, 64)), model(torch.ones(3, 3, 96, 64)))
    with pytest.raises(ValueError, match="exactly 96 x 64 pixels, got 90 x 64"):
        loaded(torch.ones(1, 3, 90, 64))


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_float16_halves_the_file_and_hardly_changes_results(kind, export_of, use_export, tmp_path, few_cases):
    single, messages = export_of(kind), []
    use_export(single)
    content = export_model(
        single.model, processor(), tmp_path / "half", graph_format=kind, post_process=kind == "onnx", half=True,
        report=messages.append,
    )  # fmt: skip
    assert (content["precision"], content["check"]["tolerance"]) == ("float16", 1e-4)
    assert 0 < content["float16_check"]["largest_difference"] < 0.05
    assert "float16 against PyTorch" in messages[-1]
    weights = "model.onnx" if kind == "onnx" else "model.bin"
    assert (tmp_path / "half" / weights).stat().st_size < 0.75 * (single.folder / weights).stat().st_size
    found = load_exported(tmp_path / "half")(*padded_batch(BATCHES[0]))
    with torch.no_grad():
        expected = single.model(*padded_batch(BATCHES[0]))
    assert found.logits.dtype == torch.float32
    torch.testing.assert_close(found.pred_boxes, expected.pred_boxes, rtol=0, atol=0.02)


def test_a_model_that_overflows_in_float16_is_refused(tmp_path, few_cases):
    model = small_model()
    with torch.no_grad():
        model.class_labels_classifier.weight.mul_(1e6)
    with pytest.raises(ValueError, match=r"In float16 the results differ by more than 0.05.* Nothing was written"):
        export_model(model, processor(), tmp_path / "half", half=True, report=lambda text: None)
    assert not (tmp_path / "half").exists()


def test_the_opset_is_the_requested_one(tmp_path, few_cases):
    opset = 20
    content = export_model(small_model(), processor(), tmp_path / "out", opset=opset, report=lambda text: None)
    assert content["opset"] == opset
    assert onnx.load(tmp_path / "out" / "model.onnx").opset_import[0].version == opset


def test_an_opset_that_cannot_be_made_is_refused(tmp_path, few_cases):
    for opset in (9, 99):
        with pytest.raises(ValueError, match=r"The opset must be between 18 and \d+, got"):
            export_model(small_model(), processor(), tmp_path / "out", opset=opset, report=lambda text: None)
    assert not (tmp_path / "out").exists()
