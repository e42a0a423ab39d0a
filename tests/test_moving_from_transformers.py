"""docs/moving_from_transformers.md against transformers as installed: every name has a row, and every row is true."""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import padded_batch, random_labels, tiny_config, tiny_model, transformers_twin
from PIL import Image
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.detr import (
    configuration_detr,
    image_processing_detr,
    image_processing_pil_detr,
    modeling_detr,
)
from transformers.utils.generic import TransformersKwargs

import hf_detr
from hf_detr.model.configuration_hf_detr import FIELDS_OF_TRANSFORMERS

PAGE = (Path(__file__).parents[1] / "docs" / "moving_from_transformers.md").read_text()
MARKS = ("same", "different", "absent")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
PROCESSOR = "DetrImageProcessor"
SEGMENTATION = ("semantic_segmentation", "instance_segmentation", "panoptic_segmentation")


def read_tables() -> dict[str, dict[str, str]]:
    """{heading: {name: mark}} of the tables below headings such as "### `DetrConfig`"."""
    tables: dict[str, dict[str, str]] = {}
    for heading, text in re.findall(r"^### `(.+?)`\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL):
        rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", text, re.MULTILINE)
        tables[heading] = dict(rows)
        assert len(tables[heading]) == len(rows), f"{heading} has a name twice"
    return tables


def arguments_of(function: Any) -> set[str]:
    """Names of the arguments, without `self` and `**kwargs`."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - {"self"}


def names_in_transformers() -> dict[str, set[str]]:
    """{heading: names that transformers has}."""
    processor = image_processing_detr.DetrImageProcessor
    methods = ["preprocess", "pad", *(f"post_process_{task}" for task in ("object_detection", *SEGMENTATION))]
    modules = (configuration_detr, image_processing_detr, image_processing_pil_detr, modeling_detr)
    of_all_configs = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    own = set(configuration_detr.DetrConfig.__annotations__)
    assert own >= {field.name for field in dataclasses.fields(transformers.DetrConfig)} - of_all_configs
    return {
        "transformers.models.detr": {name for module in modules for name in module.__all__},
        PROCESSOR: set(processor.valid_kwargs.__annotations__),  # of a typed dict, with the inherited ones
        **{f"{PROCESSOR}.{method}": arguments_of(getattr(processor, method)) for method in methods},
        "DetrConfig": own,
        "DetrConfig(**kwargs)": ({*FIELDS_OF_TRANSFORMERS} - own) | {"backbone", "backbone_kwargs"},
        "DetrModel.forward": arguments_of(modeling_detr.DetrModel.forward),
        "DetrForObjectDetection.forward": arguments_of(modeling_detr.DetrForObjectDetection.forward),
        "TransformersKwargs": set(TransformersKwargs.__annotations__),
        "DetrModelOutput": {field.name for field in dataclasses.fields(modeling_detr.DetrModelOutput)},
        "DetrObjectDetectionOutput": {
            field.name for field in dataclasses.fields(modeling_detr.DetrObjectDetectionOutput)
        },
    }


TABLES = read_tables()
NAMES = names_in_transformers()


def rows(heading: str, *marks: str) -> list[str]:
    return [name for name, mark in TABLES.get(heading, {}).items() if mark in (marks or MARKS)]


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_has_a_table_for_each_class_and_method():
    assert TABLES.keys() == NAMES.keys()


@pytest.mark.parametrize("heading", NAMES)
def test_each_name_of_transformers_has_a_row_and_each_row_is_one(heading):
    assert set(TABLES[heading]) == NAMES[heading]


@pytest.mark.parametrize("heading", NAMES)
def test_each_row_is_marked(heading):
    assert set(TABLES[heading].values()) <= {*MARKS}
    assert len(re.findall(r"^\| `", PAGE.split(f"### `{heading}`")[1].split("\n#")[0], re.MULTILINE)) == len(
        TABLES[heading]
    )


def test_the_model_for_masks_has_no_further_arguments_and_one_further_output():
    of_masks = arguments_of(modeling_detr.DetrForSegmentation.forward)
    assert of_masks == NAMES["DetrForObjectDetection.forward"]
    outputs = {field.name for field in dataclasses.fields(modeling_detr.DetrSegmentationOutput)}
    assert outputs - NAMES["DetrObjectDetectionOutput"] == {"pred_masks"}


def test_the_code_of_the_page_runs_and_predicts_as_transformers_does(tmp_path):
    transformers_twin(tiny_model()).save_pretrained(tmp_path)
    transformers.DetrImageProcessor(size={"height": 64, "width": 96}).save_pretrained(tmp_path)
    before, after = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert after == before.replace("from transformers", "from hf_detr").replace("before", "after")
    given = {"images": [picture(0), picture(1)], "sizes": [(50, 60)] * 2, "annotations": ANNOTATIONS}
    found = []
    for code in (before, after):
        scope = dict(given)
        exec(code.replace("facebook/detr-resnet-50", str(tmp_path)).replace("threshold=0.5", "threshold=0.0"), scope)
        assert scope["loss"].requires_grad
        found.append(scope["results"])
    for theirs, ours in zip(*found, strict=True):
        assert torch.equal(ours["labels"], theirs["labels"])
        torch.testing.assert_close(ours["scores"], theirs["scores"], **CLOSE)
        limits = torch.tensor([60.0, 50.0, 60.0, 50.0])
        torch.testing.assert_close(ours["boxes"], torch.minimum(theirs["boxes"].clamp(min=0), limits), **CLOSE)


# -- classes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", rows("transformers.models.detr"))
def test_classes(name):
    assert hasattr(hf_detr, name) == (TABLES["transformers.models.detr"][name] != "absent")


# -- processor ---------------------------------------------------------------------------------------------------------

SIZE = {"shortest_edge": 32, "longest_edge": 64}
RECORD = {"bbox": [5, 6, 20, 10], "category_id": 1, "area": 200, "iscrowd": 0}
ANNOTATIONS = [{"image_id": index, "annotations": [RECORD]} for index in range(2)]
# a value beside the default, and what else the call needs for it to have an effect
OF_PROCESSOR: dict[str, Any] = {
    "format": "coco_panoptic",
    "do_convert_annotations": False,
    "do_convert_rgb": False,
    "do_resize": False,
    "size": {"height": 20, "width": 30},
    "default_to_square": True,
    "crop_size": 10,
    "resample": 0,
    "do_rescale": False,
    "rescale_factor": 0.01,
    "do_normalize": False,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.1, 0.2, 0.3],
    "do_pad": False,
    "pad_size": {"height": 64, "width": 80},
    "do_center_crop": True,
    "data_format": "channels_last",
    "input_data_format": "channels_first",
    "device": "meta",
    "return_tensors": "np",
    "disable_grouping": True,
    "image_seq_length": 5,
}
WITH: dict[str, dict[str, Any]] = {
    "default_to_square": {"size": 20},
    "input_data_format": {"images": np.arange(360, dtype=np.uint8).reshape(3, 40, 3)},
}
WITHOUT_EFFECT = {"disable_grouping"}


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (50, 60, 3), dtype=np.uint8))


def run(processor: Any, name: str, **changes: Any) -> dict[str, tuple[str, str, np.ndarray]]:
    """{key: (type, device, values)} of a call."""
    batch = processor(**{"images": picture(0), "return_tensors": "pt"} | WITH.get(name, {}) | changes)
    found = {}
    for key, value in batch.items():
        device = str(getattr(value, "device", "cpu"))
        found[key] = type(value).__name__, device, np.zeros(value.shape) if device == "meta" else np.asarray(value)
    return found


def agree(a: dict[str, tuple[str, str, np.ndarray]], b: dict[str, tuple[str, str, np.ndarray]]) -> bool:
    return a.keys() == b.keys() and all(
        a[key][:2] == b[key][:2] and a[key][2].shape == b[key][2].shape and np.allclose(a[key][2], b[key][2], **CLOSE)
        for key in a
    )


@pytest.mark.parametrize("name", rows(PROCESSOR, "same", "different"))
def test_arguments_of_the_processor_that_are_accepted_are_obeyed(name):
    given = {name: OF_PROCESSOR[name]}
    ours, theirs = hf_detr.DetrImageProcessor(size=SIZE), transformers.DetrImageProcessor(size=SIZE)
    found = run(ours, name, **given)
    assert agree(found, run(ours, name)) == (name in WITHOUT_EFFECT)
    if TABLES[PROCESSOR][name] == "same":
        assert agree(found, run(theirs, name, **given))
    if name != "return_tensors":  # the call sets it
        assert agree(found, run(hf_detr.DetrImageProcessor(**{"size": SIZE} | given), name))


@pytest.mark.parametrize("name", rows(PROCESSOR, "absent"))
def test_arguments_of_the_processor_that_are_absent_are_refused(name):
    given = {name: OF_PROCESSOR[name]}
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
        hf_detr.DetrImageProcessor(**given)
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
        hf_detr.DetrImageProcessor(size=SIZE)(picture(0), **given)


@pytest.mark.parametrize("name", rows(f"{PROCESSOR}.preprocess"))
@pytest.mark.parametrize("method", ["preprocess", "__call__"])
def test_arguments_of_preprocess(name, method):
    call = getattr(hf_detr.DetrImageProcessor(size=SIZE), method)
    values = {"annotations": ANNOTATIONS[:1], "return_segmentation_masks": True, "masks_path": "masks"}
    given = {"images": [picture(0)]} | ({} if name == "images" else {name: values[name]})
    if TABLES[f"{PROCESSOR}.preprocess"][name] != "absent":
        assert ("labels" in call(**given)) == (name == "annotations")
        return
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
        call(**given)


@pytest.mark.parametrize("name", rows(f"{PROCESSOR}.pad"))
def test_arguments_of_pad(name):
    image = torch.ones(3, 8, 9)
    values = {"image": image, "padded_size": (9, 9), "annotation": {}, "update_bboxes": False, "fill": 3}
    assert TABLES[f"{PROCESSOR}.pad"][name] == "absent"
    with pytest.raises(TypeError, match=rf"\b{name}\b"):
        hf_detr.DetrImageProcessor().pad([image], **{name: values[name]})


@pytest.mark.parametrize("name", rows(f"{PROCESSOR}.post_process_object_detection"))
def test_arguments_of_post_processing(name):
    outputs = transformers.utils.ModelOutput(
        logits=torch.randn(1, 20, 4), pred_boxes=torch.rand(1, 20, 4) * 0.2 + torch.tensor([0.4, 0.4, 0.0, 0.0])
    )
    given = {} if name == "outputs" else {name: {"threshold": 0.3, "target_sizes": [(50, 60)]}[name]}
    assert TABLES[f"{PROCESSOR}.post_process_object_detection"][name] != "absent"
    ours, theirs = (
        processor.post_process_object_detection(outputs=outputs, **given)[0]
        for processor in (hf_detr.DetrImageProcessor(), transformers.DetrImageProcessor())
    )
    for key in ("scores", "labels", "boxes"):
        torch.testing.assert_close(ours[key], theirs[key])


@pytest.mark.parametrize("task", SEGMENTATION)
def test_arguments_of_the_post_processing_of_masks(task):
    """What they do: see tests/test_mask_post_processing.py."""
    heading = f"{PROCESSOR}.post_process_{task}"
    assert "absent" not in TABLES[heading].values()
    ours = inspect.signature(getattr(hf_detr.DetrImageProcessor, f"post_process_{task}")).parameters
    theirs = inspect.signature(getattr(transformers.DetrImageProcessor, f"post_process_{task}")).parameters
    assert list(ours)[: len(theirs)] == list(theirs), "the same order"
    others = {name for name, mark in TABLES[heading].items() if ours[name].default != theirs[name].default}
    assert others == ({"threshold"} if task == "panoptic_segmentation" else set())


# -- config ------------------------------------------------------------------------------------------------------------

OF_CONFIG: dict[str, Any] = {
    "backbone_config": transformers.ResNetConfig(depths=[2, 2, 2, 2], layer_type="basic"),
    "num_channels": 1,
    "num_queries": 7,
    "encoder_layers": 2,
    "encoder_ffn_dim": 8,
    "encoder_attention_heads": 4,
    "decoder_layers": 2,
    "decoder_ffn_dim": 8,
    "decoder_attention_heads": 4,
    "encoder_layerdrop": 0.1,
    "decoder_layerdrop": 0.1,
    "is_encoder_decoder": False,
    "activation_function": "gelu",
    "d_model": 64,
    "dropout": 0.3,
    "attention_dropout": 0.3,
    "activation_dropout": 0.3,
    "init_std": 0.5,
    "init_xavier_std": 0.5,
    "auxiliary_loss": False,
    "position_embedding_type": "learned",
    "dilation": True,
    "class_cost": 3,
    "bbox_cost": 3,
    "giou_cost": 3,
    "mask_loss_coefficient": 3,
    "dice_loss_coefficient": 3,
    "bbox_loss_coefficient": 3,
    "giou_loss_coefficient": 3,
    "eos_coefficient": 0.3,
    "backbone": "resnet18",
    "backbone_kwargs": {"drop_path_rate": 0.1},
    "use_timm_backbone": False,
    "use_pretrained_backbone": True,
    "train_backbone": False,
}
# {name: (what else the config needs, the field that is set, and its value)}
TRANSLATED: dict[str, tuple[dict[str, Any], str, Any]] = {
    "backbone_config": ({}, "backbone", "resnet18"),
    "use_timm_backbone": ({"backbone": "microsoft/resnet-101"}, "backbone", "resnet101"),
}


@pytest.mark.parametrize(
    ("heading", "name"),
    [(heading, name) for heading in ("DetrConfig", "DetrConfig(**kwargs)") for name in rows(heading)],
)
def test_fields_of_the_config(heading, name):
    given = {name: OF_CONFIG[name]}
    if TABLES[heading][name] == "absent":
        with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
            hf_detr.DetrConfig(**given)
        return
    others, field, expected = TRANSLATED.get(name, ({}, name, OF_CONFIG[name]))
    assert getattr(hf_detr.DetrConfig(), field) != expected
    assert getattr(hf_detr.DetrConfig(**others, **given), field) == expected
    if TABLES[heading][name] == "same":
        assert getattr(hf_detr.DetrConfig(), name) == getattr(transformers.DetrConfig(), name), "another default"


# -- forward -----------------------------------------------------------------------------------------------------------

SIDE = 3  # rows and columns of the feature map: transformers takes the map of `inputs_embeds` for a square


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Any, Any]]:
    """{class: (ours, transformers')} with equal weights and eager attention, which is the one that returns weights."""
    torch.manual_seed(0)
    ours = tiny_model()
    theirs = transformers_twin(ours, auxiliary_loss=True)
    for model in (ours, theirs):
        model.set_attn_implementation("eager")
    return {"DetrForObjectDetection": (ours, theirs), "DetrModel": (ours.model, theirs.model)}


def of_forward(name: str) -> Any:
    generator = torch.Generator().manual_seed(1)
    d_model, num_queries = tiny_config().d_model, tiny_config().num_queries
    values = {
        "pixel_values": torch.randn(1, 3, 32 * SIDE, 32 * SIDE, generator=generator),
        "pixel_mask": torch.ones(1, 32 * SIDE, 32 * SIDE, dtype=torch.long),
        "decoder_attention_mask": torch.ones(1, num_queries),
        "encoder_outputs": BaseModelOutput(torch.randn(1, SIDE * SIDE, d_model, generator=generator)),
        "inputs_embeds": torch.randn(1, SIDE * SIDE, d_model, generator=generator),
        "decoder_inputs_embeds": torch.randn(1, num_queries, d_model, generator=generator),
        "labels": random_labels([2]),
        "output_hidden_states": True,
        "output_attentions": True,
        "num_items_in_batch": torch.tensor(7),
        "output_router_logits": True,
        "cu_seq_lens_q": torch.tensor([0, SIDE * SIDE]),
        "cu_seq_lens_k": torch.tensor([0, SIDE * SIDE]),
        "max_length_q": SIDE * SIDE,
        "max_length_k": SIDE * SIDE,
        "position_ids": torch.arange(SIDE * SIDE)[None],
        "is_causal": True,
        "seq_idx": torch.zeros(SIDE * SIDE, dtype=torch.int32),
    }
    return values[name]


@pytest.mark.parametrize(
    ("owner", "heading", "name"),
    [
        (owner, heading, name)
        for owner in ("DetrModel", "DetrForObjectDetection")
        for heading in (f"{owner}.forward", "TransformersKwargs")
        for name in rows(heading)
    ],
)
@torch.no_grad()
def test_arguments_of_forward(owner, heading, name, models):
    ours, theirs = models[owner]
    pixel_values = None if name == "inputs_embeds" else padded_batch([(32 * SIDE, 32 * SIDE)])[0]
    given = {"pixel_values": pixel_values, name: of_forward(name)}
    if TABLES[heading][name] == "absent":
        with pytest.raises(TypeError, match=rf"\b{name}\b"):
            ours(**given)
        return
    found, expected = ours(**given), theirs(**given)
    for key in ("logits", "pred_boxes", "last_hidden_state"):
        if key in expected:
            torch.testing.assert_close(found[key], expected[key], **CLOSE)
    if name.endswith("embeds") or name == "encoder_outputs":
        without = ours(padded_batch([(32 * SIDE, 32 * SIDE)])[0])
        assert not torch.allclose(found["last_hidden_state"], without["last_hidden_state"], **CLOSE)


# -- outputs -----------------------------------------------------------------------------------------------------------

OUTPUTS = {
    "DetrModelOutput": ("DetrModel", hf_detr.DetrModelOutput),
    "DetrObjectDetectionOutput": ("DetrForObjectDetection", hf_detr.DetrDetectionOutput),
}


@pytest.mark.parametrize("heading", OUTPUTS)
@torch.no_grad()
def test_outputs(heading, models):
    owner, output_class = OUTPUTS[heading]
    given: dict[str, Any] = {"pixel_values": padded_batch([(64, 96)])[0]}
    given |= {"output_hidden_states": True, "output_attentions": True}
    if owner == "DetrForObjectDetection":
        given["labels"] = random_labels([3])
    found, expected = (model(**given) for model in models[owner])
    fields = {field.name for field in dataclasses.fields(output_class)}
    for name, mark in TABLES[heading].items():
        assert (name in fields) == (mark != "absent"), name
        if mark == "absent":
            assert not hasattr(found, name)
        elif mark == "same":
            assert found[name] is not None, name
            torch.testing.assert_close(found[name], expected[name], **CLOSE)
