"""docs/runtimes.md: its programs run without this package, and find what the model finds."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomise_norms, tiny_model
from PIL import Image

from hf_detr import DetrImageProcessor
from hf_detr.data import draw_shapes_dataset
from hf_detr.export import export_model, exporting
from hf_detr.model.processor_size import resized_size

pytestmark = pytest.mark.xdist_group("export")
PAGE = Path(__file__).parents[1] / "docs" / "runtimes.md"
NAMES = {0: "rectangle", 1: "ellipse", 2: "triangle"}
WITHOUT = (
    "import sys\nfor name in ('torch', 'torchvision', 'transformers', 'timm', 'hf_detr'): sys.modules[name] = None\n"
)


@pytest.fixture(scope="module", params=[{"shortest_edge": 64, "longest_edge": 90}, {"height": 64, "width": 64}])
def place(request, tmp_path_factory):
    """A model and its processor, and a folder with its exports and the images that the page names."""
    folder = tmp_path_factory.mktemp("runtimes")
    draw_shapes_dataset(folder / "data" / "shapes", num_train=1, num_val=2, progress=False)
    images = sorted((folder / "data" / "shapes" / "val").iterdir())
    Image.open(images[1]).resize((200, 90)).save(images[1])  # of another shape, with another limit of the resize
    torch.manual_seed(1)
    labels = {"id2label": NAMES, "label2id": {name: index for index, name in NAMES.items()}}
    small = {"backbone": "resnet10t", "feature_stride": 8, "encoder_layers": 1, "decoder_layers": 1}
    model = tiny_model(**small, **labels).eval()
    randomise_norms(model)
    with torch.no_grad():
        model.class_labels_classifier.weight.mul_(6)
    processor = DetrImageProcessor(size=request.param)
    cases = exporting.check_cases
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "check_cases", lambda *args: cases(*args)[2:6])
        for kind, name in (("onnx", "shapes"), ("openvino", "shapes-openvino")):
            target = folder / "exports" / name
            export_model(model, processor, target, graph_format=kind, post_process=True, report=lambda text: None)
    return folder, model, processor


def test_the_programs_find_what_the_model_finds(place):
    folder, model, processor = place
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    code = WITHOUT + "\n".join(blocks) + "\nprint(json.dumps({n: v.tolist() for n, v in prepare(images).items()}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()

    images = [Image.open(path) for path in sorted((folder / "data" / "shapes" / "val").iterdir())]
    theirs = {name: torch.tensor(value) for name, value in json.loads(lines[2]).items()}
    ours = processor(images, return_tensors="pt")
    if "height" in processor.size:
        assert list(theirs) == ["pixel_values", "target_sizes"], "images of one size need no mask"
    else:
        assert theirs["pixel_mask"].equal(ours["pixel_mask"])
    assert (theirs["pixel_values"] - ours["pixel_values"]).abs().max() < 3 / 255 / 0.224  # two roundings apart

    sizes = theirs.pop("target_sizes").tolist()
    assert sizes == [[image.height, image.width] for image in images]
    with torch.no_grad():  # of their pixels, because a random model makes much of a rounding
        expected = processor.post_process_object_detection(model(**theirs), 0.5, sizes)
    assert sum(len(result["scores"]) for result in expected) >= 4, "something to compare"
    for line in lines[:2]:  # ONNX Runtime and OpenVINO
        for found, unsorted in zip(ast.literal_eval(line), expected, strict=True):
            order = unsorted["scores"].argsort(descending=True)
            result = {name: values[order] for name, values in unsorted.items()}
            assert [label for label, _, _ in found] == [NAMES[label] for label in result["labels"].tolist()]
            assert [score for _, score, _ in found] == pytest.approx(result["scores"].tolist(), abs=1e-3)
            torch.testing.assert_close(torch.tensor([box for _, _, box in found]), result["boxes"], rtol=0, atol=0.1)


def test_the_program_refuses_to_pad_for_a_graph_without_a_mask(place, tmp_path):
    folder, _, processor = place
    copied = shutil.copytree(folder, tmp_path / "copy")
    target = copied / "exports" / "shapes" / "export.json"
    target.write_text(json.dumps(json.loads(target.read_text()) | {"inputs": ["pixel_values", "target_sizes"]}))
    first = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    code = WITHOUT + first + "\nprepare([Image.new('RGB', (200, 90)), Image.new('RGB', (64, 64))])"
    done = subprocess.run([sys.executable, "-c", code], cwd=copied, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == ("height" in processor.size)
    assert ("This graph takes no padding" in done.stderr) == ("height" not in processor.size)


def test_the_table_of_inputs_is_that_of_the_graph(place):
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, _, _ = place
    session = onnxruntime.InferenceSession(folder / "exports" / "shapes" / "model.onnx")
    types = {"tensor(float)": "float32", "tensor(int64)": "int64"}
    text = PAGE.read_text()
    for entry in session.get_inputs():
        assert f"| `{entry.name}` | {types[entry.type]} |" in text
    assert [types[entry.type] for entry in session.get_outputs()] == [
        "float32",
        "float32",
        "float32",
        "int64",
        "float32",
    ]


@pytest.mark.parametrize(
    "size",
    [
        {"shortest_edge": 800, "longest_edge": 1333}, {"shortest_edge": 64, "longest_edge": 90}, {"shortest_edge": 64},
        {"max_height": 800, "max_width": 1333}, {"height": 48, "width": 64},
    ],
    ids=lambda size: "-".join(map(str, size.values())),
)  # fmt: skip
def test_sizes_are_those_of_the_image_processor(size):
    function = re.search(r"def resized.*?(?=\n\n\n)", PAGE.read_text(), re.DOTALL)
    scope = {}
    exec(function[0], scope)
    rng = np.random.default_rng(0)
    pairs = [*rng.integers(1, 1500, (5000, 2)).tolist(), [3, 1254], [2000, 3], [1, 5000], [64, 64]]
    assert [scope["resized"](w, h, size)[::-1] for w, h in pairs] == [resized_size((h, w), size) for w, h in pairs]
