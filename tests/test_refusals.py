"""Nothing is taken silently: names, labels and values that would have no effect, or another one than meant."""

import json

import datasets
import numpy as np
import pytest
import timm
import torch
import transformers
from conftest import padded_batch, random_labels, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torchvision.transforms import v2
from transformers import AutoConfig, ResNetConfig, pipeline
from transformers import DetrConfig as TheirConfig

from hf_detr import DetrConfig, DetrForDetection, DetrImageProcessor
from hf_detr.data import Augmentation, AugmentedDataset
from hf_detr.model.backbone import Backbone
from hf_detr.model.image_io import to_image_tensor

# -- config ------------------------------------------------------------------------------------------------------------


def test_class_ids_follow_from_names_alone():
    """transformers leaves `label2id` empty then, where the number of classes is not given."""
    config = DetrConfig(id2label={0: "cat", 1: "N/A", 2: "N/A"})
    assert config.label2id == {"cat": 0, "N/A": 1}
    assert DetrConfig(id2label={0: "cat"}, label2id={"cat": 0}).label2id == {"cat": 0}
    assert DetrConfig().label2id == {"LABEL_0": 0, "LABEL_1": 1}


WRONG_VALUES = [
    ("class_loss", "focus"),
    ("position_embedding_type", "learnd"),
    ("query_type", "anchors"),
    ("bbox_cost", -1),
    ("num_queries", -3),
    ("d_model", 30),
    ("prior_probability", 2.0),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)
    DetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "value"), WRONG_VALUES)
def test_a_wrong_value_is_refused_at_every_door(name, value, checkpoint, tmp_path):
    stored = json.loads((checkpoint / "config.json").read_text()) | {name: value}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    doors = [
        lambda: DetrConfig(**{name: value}),
        lambda: DetrConfig.from_dict(stored),
        lambda: DetrConfig.from_json_file(tmp_path / "config.json"),
        lambda: DetrConfig.from_pretrained(tmp_path),
        lambda: DetrConfig.from_pretrained(checkpoint, **{name: value}),
        lambda: AutoConfig.from_pretrained(checkpoint, **{name: value}),
        lambda: DetrForDetection.from_pretrained(checkpoint, ignore_mismatched_sizes=True, **{name: value}),
    ]
    for number, door in enumerate(doors):
        with pytest.raises((StrictDataclassError, ValueError)):
            pytest.fail(f"door {number} let {door()} in")
    config = tiny_model().config
    setattr(config, name, value)
    with pytest.raises((StrictDataclassError, ValueError)):
        DetrForDetection(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_querys": 50}, "no 'num_querys'. Did you mean 'num_queries'"),
        ({"dropuot": 0.2}, "Did you mean 'dropout'"),
        ({"something": 1}, "has no 'something'"),
        ({"use_pretrained_backbone": True}, "from_pretrained_backbone"),
        ({"encoder_layerdrop": 0.1}, "does not skip layers"),
        ({"decoder_layerdrop": 0.1}, "does not skip layers"),
        ({"train_backbone": False}, "freeze_backbone"),
        ({"backbone_config": transformers.ViTConfig()}, "only ResNets"),
    ],
)
def test_fields_that_would_have_no_effect_are_refused(arguments, message, checkpoint):
    with pytest.raises((TypeError, ValueError), match=message):
        DetrConfig(**arguments)
    if not message.startswith(("no ", "Did", "has no")):  # stored fields of other programs are left out with a warning
        with pytest.raises((TypeError, ValueError), match=message):
            DetrConfig.from_dict(arguments)
    if "config" not in next(iter(arguments)):
        with pytest.raises((TypeError, ValueError)):
            DetrConfig.from_pretrained(checkpoint, **arguments)


def test_stored_fields_that_another_program_added_are_told_and_left_out(warnings):
    """Such as a later version of transformers."""
    config = DetrConfig.from_dict({"num_queries": 7, "of_another_program": 1, "use_cache": False})
    assert config.num_queries == 7
    assert not hasattr(config, "of_another_program")
    assert "of_another_program" in warnings.text
    assert "use_cache" not in warnings.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone_config": transformers.ResNetConfig(), "dilation": True}, "dilation=True contradicts"),
        ({"backbone_config": transformers.ResNetConfig(), "backbone": "resnet34"}, "'resnet34' contradicts"),
        ({"backbone_config": transformers.ResNetConfig(), "use_timm_backbone": True}, "use_timm_backbone=True, but"),
        ({"backbone_config": transformers.ResNetConfig(num_channels=1), "num_channels": 4}, "num_channels=4 contra"),
        (
            {"backbone": "microsoft/resnet-50", "use_timm_backbone": False, "dilation": True},
            "dilation=True contradicts",
        ),
    ],
)
def test_two_descriptions_of_the_backbone_that_contradict_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DetrConfig(**arguments)


def test_the_channels_of_a_nested_backbone_are_taken_over():
    nested = {"model_type": "timm_backbone", "backbone": "resnet18", "num_channels": 1}
    assert DetrConfig(backbone_config=nested).num_channels == 1


@pytest.mark.parametrize("depths", [(3, 4, 6, 3), (3, 4, 23, 3)])
def test_backbones_of_transformers_are_translated_at_every_door(depths, tmp_path):
    name = {6: "resnet50", 23: "resnet101"}[depths[2]]
    resnet = ResNetConfig(depths=list(depths))
    theirs = TheirConfig(backbone_config=resnet, use_timm_backbone=False, backbone=None, num_queries=33)
    theirs.to_json_file(tmp_path / "config.json")
    doors = [
        lambda: DetrConfig(backbone_config=resnet, num_queries=33),
        lambda: DetrConfig(backbone_config=resnet.to_dict(), num_queries=33),
        lambda: DetrConfig.from_dict(theirs.to_dict()),
        lambda: DetrConfig.from_json_file(tmp_path / "config.json"),
        lambda: DetrConfig.from_pretrained(tmp_path),
    ]
    assert [(config.backbone, config.num_queries) for config in (door() for door in doors)] == [(name, 33)] * 5


def test_what_changes_nothing_is_accepted():
    off = {
        "use_timm_backbone": True,
        "use_pretrained_backbone": False,
        "encoder_layerdrop": 0.0,
        "train_backbone": True,
    }
    assert DetrConfig(**off).to_dict() == DetrConfig().to_dict()
    assert DetrConfig(hidden_size=128, num_labels=4).d_model == 128


@pytest.mark.parametrize("names", [{1: "a", 2: "b"}, {0: "a", 2: "b"}, {"1": "a"}])
def test_class_ids_with_gaps_are_refused_when_the_config_is_made(names):
    with pytest.raises((StrictDataclassError, ValueError), match="must be 0 to"):
        DetrConfig(id2label=names)


def test_a_head_of_another_width_than_the_config_is_refused():
    model = tiny_model().train()
    model.config.id2label = {index: str(index) for index in range(model.config.num_labels + 2)}
    pixel_values, pixel_mask = padded_batch([(64, 96)])
    for labels in (None, random_labels([2])):
        with pytest.raises(ValueError, match=r"The config names \d classes, but the class head predicts \d"):
            model(pixel_values, pixel_mask, labels=labels)
    model.resize_class_head(dict(model.config.id2label))
    assert model(pixel_values, pixel_mask).logits.shape[-1] == model.config.num_labels + 1


# -- labels ------------------------------------------------------------------------------------------------------------


def test_labels_that_are_relative_to_the_padded_batch_are_refused():
    """By transformers' own processor, which gives an object that fills its image a width of 0.64."""
    theirs = transformers.DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}, format="coco_detection")
    ours = DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    images = [Image.new("RGB", (96, 64)), Image.new("RGB", (64, 96))]
    annotations = [
        {"image_id": n, "annotations": [{"bbox": [0, 0, *image.size], "category_id": 0, "area": 6144, "iscrowd": 0}]}
        for n, image in enumerate(images)
    ]
    model = tiny_model().train()
    batch = theirs(images, annotations=annotations, return_tensors="pt")
    with pytest.raises(
        ValueError, match=r"Image 0 of the batch .*96 x 96 pixels.*use hf_detr\.DetrImageProcessor|Use hf"
    ):
        model(**batch)
    batch = ours(images, annotations=annotations, return_tensors="pt")
    assert model(**batch).loss > 0
    del batch["pixel_mask"]
    with pytest.raises(ValueError, match="pass its `pixel_mask`"):
        model(**batch)


@pytest.mark.parametrize("kind", ["lists", "numpy", "empty lists"])
def test_labels_may_be_lists_and_arrays(kind):
    model = tiny_model(dropout=0.0).eval()
    pixel_values, pixel_mask = padded_batch([(64, 96), (96, 64)])
    labels = random_labels([2, 0 if kind == "empty lists" else 3])
    to = (lambda tensor: tensor.numpy()) if kind == "numpy" else (lambda tensor: tensor.tolist())
    given = [{name: to(label[name]) for name in ("class_labels", "boxes")} for label in labels]
    expected = model(pixel_values, pixel_mask, labels=labels).loss
    assert torch.equal(model(pixel_values, pixel_mask, labels=given).loss, expected)


# -- processor ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"do_resise": False}, "Did you mean 'do_resize'"),
        ({"format": "coco_panoptic"}, "annotations are COCO's for detection"),
        ({"do_convert_annotations": False}, "labels are always relative"),
        ({"data_format": "channels_last"}, "channels first"),
        ({"do_convert_rgb": False}, "num_channels"),
        ({"do_center_crop": True}, "cut off"),
        ({"masks_path": "masks"}, "`segmentation` of each object"),
    ],
)
def test_arguments_of_the_processor_that_would_have_no_effect_are_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        DetrImageProcessor(**arguments)
    with pytest.raises((TypeError, ValueError), match=message):
        DetrImageProcessor()(Image.new("RGB", (40, 30)), **arguments)


def test_arguments_of_the_processor_that_change_nothing_are_accepted():
    processor = DetrImageProcessor(format="coco_detection", do_convert_annotations=True)
    assert "format" not in processor.to_dict()
    assert processor(Image.new("RGB", (40, 30)), data_format="channels_first")["pixel_values"][0].shape[1:] == (
        800,
        1066,
    )


@pytest.mark.parametrize(
    "arguments", [{"size": 800}, {"size": 800, "max_size": 1333}, {"size": {"shortest_edge": 800}, "max_size": 1333}]
)
def test_a_number_as_size_has_the_limit_of_the_paper(arguments):
    expected = DetrImageProcessor()(Image.new("RGB", (1600, 200)))["pixel_values"][0].shape
    assert DetrImageProcessor(**arguments)(Image.new("RGB", (1600, 200)))["pixel_values"][0].shape == expected
    assert DetrImageProcessor()(Image.new("RGB", (1600, 200)), **arguments)["pixel_values"][0].shape == expected


def test_max_size_that_contradicts_size_is_refused():
    with pytest.raises(ValueError, match="max_size=900 limits the longest edge, which contradicts"):
        DetrImageProcessor(size={"shortest_edge": 800, "longest_edge": 1333}, max_size=900)


def test_floats_are_taken_as_they_are_without_rescaling():
    values = np.random.default_rng(0).normal(0, 2, (30, 40, 3)).astype(np.float32)
    processor = DetrImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)
    found = processor(values, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(found, torch.from_numpy(values).permute(2, 0, 1))


@pytest.mark.parametrize("excess", [1e-4, 0.05])
def test_a_small_overshoot_is_clipped(excess):
    values = np.linspace(0, 1, 4 * 5 * 3).reshape(4, 5, 3)
    shifted = values.copy()
    shifted[0, 0], shifted[3, 4] = -excess, 1 + excess
    expected = values.copy()
    expected[0, 0], expected[3, 4] = 0, 1
    for scale in (1, 255):
        found = to_image_tensor(shifted * scale).double() / (1 if scale == 1 else 255)
        assert (found - torch.from_numpy(expected).permute(2, 0, 1)).abs().max() < 0.003


@pytest.mark.parametrize("values", [(-2.1, 2.6), (0.0, 1.7), (-0.2, 0.9), (-30.0, 255.0), (0.0, 300.0)])
def test_a_doubtful_range_is_refused(values):
    with pytest.raises(ValueError, match="could be either"):
        to_image_tensor(np.linspace(*values, 60).reshape(4, 5, 3))


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_images_of_other_numbers_of_channels_go_from_the_file_to_boxes(channels, tmp_path):
    torch.manual_seed(0)
    model = tiny_model(num_channels=channels).eval()
    processor = DetrImageProcessor(size={"height": 64, "width": 64}, num_channels=channels)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 65536, (50, 60, channels), dtype=np.uint16)
    if channels == 1:
        image = image[..., 0]
    batch = DetrImageProcessor.from_pretrained(tmp_path)([image, image[:40]], return_tensors="pt")
    assert batch["pixel_values"].shape == (2, channels, 64, 64)
    found = pipeline("object-detection", model=str(tmp_path))([image, image[:40]], threshold=0.0)
    assert [len(boxes) for boxes in found] == [model.config.num_queries] * 2
    if channels != 1:
        with pytest.raises(ValueError, match=f"num_channels={channels}"):
            processor(np.zeros((50, 60, 3), dtype=np.uint8))


def test_grey_images_are_those_of_pillow():
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    found = to_image_tensor(rgb, num_channels=1)
    expected = torch.from_numpy(np.asarray(rgb.convert("L")).copy())[None]
    assert (found.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("last", [True, False])
def test_the_place_of_the_channels_is_obeyed(last):
    """(3, 4, 3) could be both."""
    image = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    processor = DetrImageProcessor(do_resize=False, do_normalize=False)
    data_format = "channels_last" if last else "channels_first"
    found = processor(image, input_data_format=data_format, return_tensors="pt")["pixel_values"][0]
    expected = torch.from_numpy(image).permute(2, 0, 1) if last else torch.from_numpy(image)
    torch.testing.assert_close(found, expected / 255)


def test_pad_gives_values_and_mask():
    images = [torch.rand(3, 20, 30), torch.rand(3, 25, 10)]
    batch = DetrImageProcessor().pad(images, return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 25, 30)
    assert torch.equal(batch["pixel_values"][1, :, :25, :10], images[1])
    assert batch["pixel_mask"].flatten(1).sum(1).tolist() == [600, 250]


@pytest.mark.parametrize("name", ["annotations", "objects"])
def test_annotations_may_be_a_row_of_a_dataset(name):
    records = [
        {"bbox": [1, 2, 3, 4], "category_id": 1, "area": 12},
        {"bbox": [5, 6, 7, 8], "category_id": 0, "area": 56},
    ]
    columns = {"bbox": [[1, 2, 3, 4], [5, 6, 7, 8]], "category": [1.0, torch.tensor(0)], "area": [12, 56]}
    processor = DetrImageProcessor(size={"height": 32, "width": 32})
    image = Image.new("RGB", (40, 30))
    expected, found = (
        processor(image, annotations=given, return_tensors="pt")["labels"][0]
        for given in ({"image_id": 5, "annotations": records}, {"image_id": [5], name: columns})
    )
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((4, 5, 3), np.nan), "NaN"),
        (np.zeros((9, 5, 7), dtype=np.uint8), "channels"),
        (b"no image", "8 bytes cannot be read as an image"),
        ({"url": "x"}, "must have bytes or a path"),
        (object(), "must be a PIL image"),
    ],
)
def test_the_image_of_a_batch_that_cannot_be_used_is_named(image, message):
    with pytest.raises((ValueError, TypeError), match=rf"(?s)Image 1 of 3: .*{message}"):
        DetrImageProcessor()([Image.new("RGB", (40, 30)), image, Image.new("RGB", (40, 30))])


@pytest.mark.parametrize("bbox", ["1 2 3 4", [1, None, 3, 4], None, [1, 2, 3]])
def test_the_record_that_cannot_be_used_is_named(bbox):
    good = {"image_id": 3, "annotations": [{"bbox": [1, 2, 3, 4], "category_id": 0}]}
    bad = {"image_id": 4, "annotations": [good["annotations"][0], {"id": 17, "bbox": bbox, "category_id": 0}]}
    images = [Image.new("RGB", (40, 30))] * 2
    with pytest.raises(ValueError, match=r"Image 1 \(image_id 4\), annotation 1 \(id 17\)"):
        DetrImageProcessor()(images, annotations=[good, bad])


# -- pipeline ----------------------------------------------------------------------------------------------------------


def test_hooks_that_are_added_after_a_call_run(checkpoint):
    detector = pipeline("object-detection", model=str(checkpoint))
    image = Image.new("RGB", (60, 50))
    before = detector(image, threshold=0.0)
    calls = []
    handles = [
        detector.model.model.backbone.register_forward_hook(lambda *args: calls.append("after")),
        detector.model.model.encoder.layers[0].register_forward_pre_hook(lambda *args: calls.append("before")),
    ]
    again = detector(image, threshold=0.0)
    assert sorted(calls) == ["after", "before"]
    assert [found["box"] for found in again] == [found["box"] for found in before]
    for handle in handles:
        handle.remove()
    detector(image)
    assert len(calls) == 2


def test_the_pipeline_takes_images_in_every_form(checkpoint, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    forms = [image, np.asarray(image), torch.from_numpy(np.asarray(image).copy()), str(tmp_path / "a.png"), content]
    forms += [{"bytes": content, "path": None}, {"bytes": None, "path": str(tmp_path / "a.png")}]
    detector = pipeline("object-detection", model=str(checkpoint))
    expected = detector(image, threshold=0.0)
    for form in forms:
        assert detector(form, threshold=0.0) == expected
    assert detector(tuple(forms[:2]), threshold=0.0) == [expected] * 2
    rows = datasets.Dataset.from_dict({"image": [image, image]}).cast_column("image", datasets.Image())
    assert detector(rows["image"], threshold=0.0) == [expected] * 2


# -- freezing ----------------------------------------------------------------------------------------------------------


def test_the_backbone_can_be_frozen_and_trained_again():
    model = tiny_model(frozen_stages=1)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    model.freeze_backbone()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert not any("backbone" in name for name in trained)
    model.unfreeze_backbone()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


# -- networks and channels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["hiera_tiny_224", "mixer_s32_224", "coat_lite_tiny", "levit_128s", "pit_ti_224", "maxvit_nano_rw_256",
             "efficientformer_l1", "tnt_s_legacy_patch16_224", "volo_d1_224", "gmlp_ti16_224", "nest_tiny",
             "visformer_tiny", "convit_tiny", "mvitv2_tiny", "gcvit_xxtiny"],
)  # fmt: skip
def test_networks_of_one_image_size_are_refused_when_the_model_is_made(name):
    with torch.device("meta"), pytest.raises(ValueError, match="does not take images of any size"):
        Backbone(name, frozen_stages=-1)


@pytest.mark.parametrize("name", ["dla46x_c", "tresnet_m"])
@torch.no_grad()
def test_networks_that_need_a_multiple_get_padded_images(name):
    """The same alone, padded by hand, and beside a larger image."""
    backbone = Backbone(name, frozen_stages=-1).eval()
    assert backbone.multiple == 32
    images, mask = padded_batch([(70, 90), (96, 128)])
    together = backbone(images, mask)[-1]
    alone = backbone(images[:1, :, :70, :90])[-1]
    assert alone.map.shape[-2:] == (3, 3)
    by_hand = backbone.model(torch.nn.functional.pad(images[:1, :, :70, :90], (0, 6, 0, 26)))[-1]
    torch.testing.assert_close(alone.map, by_hand)
    torch.testing.assert_close(together.map[:1, :, :3, :3], alone.map, rtol=1e-3, atol=1e-4)
    assert together.mask[0].tolist() == [[True] * 3 + [False]] * 3


@pytest.mark.parametrize("backbone", ["test_resnet", "convnext_atto", "vit_tiny_patch16_224"])
@torch.no_grad()
def test_a_checkpoint_is_adapted_to_other_channels_as_timm_does_it(backbone, tmp_path):
    """Grey images, or six channels of twice the same picture, give what the RGB model gives for them."""
    model = tiny_model(backbone=backbone)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="has 3 channels, not 1"):
        DetrForDetection.from_pretrained(tmp_path, num_channels=1)
    grey = torch.rand(1, 1, 64, 96)
    expected = model(grey.expand(-1, 3, -1, -1)).logits
    for channels in (1, 6):
        adapted = DetrForDetection.from_pretrained(tmp_path, num_channels=channels, ignore_mismatched_sizes=True)
        assert adapted.config.num_channels == channels
        torch.testing.assert_close(adapted(grey.expand(-1, channels, -1, -1)).logits, expected, rtol=1e-4, atol=1e-4)
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        assert frozen == [name for name, p in adapted.named_parameters() if not p.requires_grad]
        adapted.save_pretrained(tmp_path / "again")
        again = DetrForDetection.from_pretrained(tmp_path / "again")
        with pytest.raises(ValueError, match="only 3 can be adapted"):
            again.resize_channels(3)


@torch.no_grad()
def test_pretrained_backbones_are_adapted_by_timm(tmp_path):

    torch.manual_seed(0)
    network = timm.create_model("test_resnet")
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    model = DetrForDetection.from_pretrained_backbone(tiny_config(num_channels=1), tmp_path / "weights.pth")
    torch.testing.assert_close(model.model.backbone.model.conv1[0].weight, network.conv1[0].weight.sum(1, keepdim=True))


# -- arguments of forward --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either `pixel_values`"),
        ({"pixel_values": torch.zeros(1, 3, 64, 64), "inputs_embeds": torch.zeros(1, 4, 32)}, "not both"),
        ({"inputs_embeds": torch.zeros(1, 5, 32)}, "square feature map"),
        ({"inputs_embeds": torch.zeros(1, 4, 31)}, "square feature map"),
        ({"pixel_values": torch.zeros(1, 3, 64, 64), "decoder_inputs_embeds": torch.zeros(1, 3, 32)}, "must be"),
        ({"pixel_values": torch.zeros(1, 3, 64, 64), "encoder_outputs": (torch.zeros(1, 9, 32),)}, "for this batch"),
    ],
)
def test_inputs_of_forward_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**arguments)


def test_features_in_place_of_images_train(tmp_path):
    model = tiny_model(query_type="anchor", denoising_groups=1, d_model=32).train()
    queries = torch.randn(2, model.config.num_queries, 32, requires_grad=True)
    embeds = torch.randn(2, 9, 32, requires_grad=True)
    outputs = model(inputs_embeds=embeds, decoder_inputs_embeds=queries, labels=random_labels([1, 2]))
    outputs.loss.backward()
    assert embeds.grad.abs().sum() > 0
    assert queries.grad.abs().sum() > 0


def test_a_detector_is_loaded_by_automodel_and_a_model_without_head_detects_nothing(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_hf_detr.DetrModel"
    assert auto_map["AutoModelForObjectDetection"] == "modeling_hf_detr.DetrForDetection"
    inner = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(inner.query_position_embeddings.weight, model.model.query_position_embeddings.weight)
    processor = DetrImageProcessor(size={"height": 64, "width": 64})
    with pytest.raises(ValueError, match="no class head"):
        transformers.pipeline("object-detection", model=inner, image_processor=processor)
    features = transformers.pipeline("image-feature-extraction", model=inner, image_processor=processor)
    assert np.array(features(Image.new("RGB", (64, 64)))).shape == (1, model.config.num_queries, 32)


# -- what a reader of the change broke -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("dropout", 7.0), ("attention_dropout", -1.0), ("eos_coefficient", -1), ("class_loss_coefficient", -1),
     ("bbox_loss_coefficient", float("nan")), ("class_cost", float("nan")), ("activation_function", "rel")],
)  # fmt: skip
def test_numbers_that_cannot_be_meant_are_refused(field, value):
    with pytest.raises(StrictDataclassError, match=field if "cost" not in field else "Matching costs"):
        DetrConfig(**{field: value})


def test_fields_that_are_set_on_a_loaded_model_are_checked_before_a_step():
    labels, images = random_labels([1]), torch.zeros(1, 3, 64, 64)
    for name, value in (("class_weights", {"zz": 1}), ("eos_coefficient", -1), ("bbox_cost", float("nan"))):
        model = tiny_model()
        setattr(model.config, name, value)
        with pytest.raises(ValueError, match=r"zz|eos|costs"):
            model(images, labels=labels)


@torch.no_grad()
def test_channels_of_a_scaled_convolution_survive_saving(tmp_path):
    """timm's ScaledStdConv2d has a constant that depends on the number of channels."""
    model = tiny_model(backbone="test_nfnet", frozen_stages=-1)
    model.resize_channels(4)
    model.save_pretrained(tmp_path)
    images = torch.rand(1, 4, 64, 64)
    torch.testing.assert_close(DetrForDetection.from_pretrained(tmp_path)(images).logits, model(images).logits)


@torch.no_grad()
def test_padding_to_a_multiple_is_no_image_at_any_stride():
    """By hand: 70 x 100 pixels at stride 8 are 9 x 13 locations, however the batch is run."""
    backbone = Backbone("dla46x_c", frozen_stages=-1, feature_stride=8).eval()
    images, mask = padded_batch([(70, 100), (96, 128)])
    found = backbone(images, mask)[-1]
    assert found.mask[0].sum() == 9 * 13
    assert backbone(images[:1, :, :70, :100])[-1].map.shape[-2:] == (9, 13)
    assert backbone._run_padded(images, mask)[-1][1][0].sum() == 9 * 13


@torch.no_grad()
def test_outputs_of_an_earlier_call_are_encoder_outputs():
    model, images = tiny_model(), torch.rand(1, 3, 96, 128)
    earlier = model(images, output_hidden_states=True)
    again = model(images, encoder_outputs=earlier)
    torch.testing.assert_close(again.logits, earlier.logits)
    torch.testing.assert_close(
        model(images, encoder_outputs=(earlier.encoder_last_hidden_state,)).logits, earlier.logits
    )
    queries = model.model.build_queries(1, images.device)
    with pytest.raises(ValueError, match="cannot be given as well"):
        model.model(images, queries=queries, decoder_inputs_embeds=queries.content)


def test_every_label_with_a_size_is_checked_and_masks_may_begin_anywhere():
    model = tiny_model().train()
    images, mask = padded_batch([(64, 96), (96, 96)])
    labels = random_labels([1, 1])
    labels[1]["size"] = torch.tensor([64, 96])
    with pytest.raises(ValueError, match="Image 1 of the batch"):
        model(images, mask, labels=labels)
    labels[1]["size"] = None
    with pytest.raises(ValueError, match="`size` must be"):
        model(images, mask, labels=labels)
    labels[0]["size"], labels[1]["size"] = [64, 96], [96, 96]
    assert model(images, mask.flip(1), labels=labels).loss > 0  # padded at the top


def test_labels_that_are_not_labels_are_named():
    model, images = tiny_model(class_weights={"LABEL_1": 2.0}), torch.zeros(1, 3, 64, 64)
    with pytest.raises(ValueError, match="must be a list of dicts"):
        model(images, labels={"class_labels": [0], "boxes": [[0.5, 0.5, 0.1, 0.1]]})
    with pytest.raises(ValueError, match="Image 0 of the batch: its labels are not numbers"):
        model(images, labels=[{"class_labels": ["cat"], "boxes": [[0.5, 0.5, 0.1, 0.1]]}])
    counts = model.count_for_loss([{"class_labels": [1], "boxes": [[0.5, 0.5, 0.1, 0.1]]}])
    assert counts[0] == 1


def test_names_that_are_nearly_right_are_told_at_every_door(checkpoint):
    model = DetrForDetection.from_pretrained(checkpoint)
    with pytest.raises(TypeError, match="Did you mean 'labels'"):
        model(torch.zeros(1, 3, 64, 64), label=[])
    with pytest.raises(TypeError, match="Did you mean 'num_queries'"):
        DetrForDetection.from_pretrained(checkpoint, num_querys=7)
    with pytest.raises(TypeError, match="give 'use_timm_backbone' to a DetrConfig"):
        DetrForDetection.from_pretrained(checkpoint, use_timm_backbone=True)
    processor = DetrImageProcessor(size={"height": 64, "width": 64})
    processor.save_pretrained(checkpoint)
    with pytest.raises(TypeError, match="Did you mean 'do_resize'"):
        DetrImageProcessor.from_pretrained(checkpoint, do_resise=False)
    assert DetrImageProcessor.from_pretrained(checkpoint, do_resize=False).do_resize is False
    detector = pipeline("object-detection", model=model, image_processor=processor)
    with pytest.raises(TypeError, match="Did you mean 'threshold'"):
        detector(Image.new("RGB", (64, 64)), treshold=0.1)


def test_settings_that_another_program_stored_are_told_and_left_out(tmp_path, warnings):
    DetrImageProcessor().save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"of_another_program": 1}))
    assert not hasattr(DetrImageProcessor.from_pretrained(tmp_path), "of_another_program")
    assert "of_another_program" in warnings.text


def test_a_checkpoint_with_other_ids_is_named_and_can_be_repaired(tmp_path):
    model = tiny_model(num_labels=2)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text()) | {"id2label": {"1": "cat", "2": "dog"}, "label2id": {"cat": 1, "dog": 2}}
    file.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"config.json must be 0 to 1, got \['1', '2'\]"):
        DetrForDetection.from_pretrained(tmp_path)
    repaired = DetrForDetection.from_pretrained(tmp_path, id2label={0: "cat", 1: "dog"}, eos_coefficient=0.2)
    assert torch.equal(repaired.class_labels_classifier.weight, model.class_labels_classifier.weight)
    assert (repaired.config.id2label, repaired.config.eos_coefficient) == ({0: "cat", 1: "dog"}, 0.2)
    repaired.save_pretrained(tmp_path / "again")
    assert DetrForDetection.from_pretrained(tmp_path / "again").config.label2id == {"cat": 0, "dog": 1}


def test_a_frozen_backbone_gathers_no_statistics():
    model = tiny_model(freeze_batch_norm=False, frozen_stages=-1)
    model.freeze_backbone()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()(torch.rand(2, 3, 64, 64), labels=random_labels([1, 1]))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    model.unfreeze_backbone()
    model(torch.rand(2, 3, 64, 64), labels=random_labels([1, 1]))
    assert not all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_transparency_of_floats_that_are_bytes():
    image = np.full((20, 30, 4), 100.0, dtype=np.float32)
    image[..., 3] = 255.0
    processor = DetrImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)
    assert processor(image, return_tensors="pt")["pixel_values"].mean() == pytest.approx(100)


def test_the_fields_of_transformers_own_config_are_taken():
    theirs = TheirConfig(use_timm_backbone=True, backbone="resnet34", use_pretrained_backbone=False)
    config = DetrConfig(**{k: v for k, v in theirs.to_dict().items() if k != "model_type"})
    assert config.backbone == "resnet34"


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_floats_of_any_channels_go_through_the_augmentation_as_they_are(channels):
    """Also four channels, which are no RGB with transparency."""
    values = np.random.default_rng(0).normal(0, 2, (20, 30, channels)).astype(np.float32)
    processor = DetrImageProcessor(num_channels=channels, do_rescale=False)
    objects = {"bbox": [], "category": [], "area": [], "iscrowd": []}
    rows = [{"image": values, "image_id": 1, "width": 30, "height": 20, "objects": objects}]
    keep = Augmentation(v2.RandomHorizontalFlip(0.0))
    found = AugmentedDataset(rows, keep, to_tensor=processor.to_tensor)[0]["image"]
    assert np.array_equal(found.numpy(), values.transpose(2, 0, 1))


def test_classes_keep_their_weights_by_id_in_whatever_order_the_config_names_them():
    model = tiny_model(num_labels=2)
    before = model.class_labels_classifier.weight.detach().clone()
    model.config.id2label = {1: "dog", 0: "cat"}
    model.resize_class_head({0: "dog", 1: "cat", 2: "cow"})
    after = model.class_labels_classifier.weight.detach()
    assert torch.equal(after[[0, 1, 3]], before[[1, 0, 2]])
