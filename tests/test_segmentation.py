"""`DetrForSegmentation`: the same masks whatever the batch, for any backbone, trained whole or on a frozen detector."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from checkpoints import spread, their_model
from conftest import padded_batch, randomise_norms, tiny_config, tiny_model, tiny_segmentation
from huggingface_hub.errors import StrictDataclassError
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from test_image_processing import photo
from test_mask_loss import SIZES, labels_with_masks
from transformers import pipeline

from hf_detr import DetrConfig, DetrForDetection, DetrForSegmentation, DetrImageProcessor, DetrSegmentationPipeline
from hf_detr.export.masked_backbone import MaskedBackbone, plan_masks
from hf_detr.model.mask_encoding import NO_MASK
from hf_detr.speed import prepare_for_inference, prepare_for_training

MODEL = Path(__file__).parents[1] / "src" / "hf_detr" / "model"
VARIANTS = [
    {},
    {"query_type": "anchor"},
    {"backbone": "resnet26", "dilation": True},
    {"feature_stride": 16},
    {"backbone": "convnext_atto"},
    {"backbone": "test_efficientnet", "position_embedding_type": "learned"},
    {"pre_norm": True, "activation_function": "gelu"},
]


def spread_model(**changes) -> DetrForSegmentation:
    model = tiny_segmentation(**changes)
    randomise_norms(model)
    spread(model)
    return model


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@torch.no_grad()
def test_a_padded_batch_gives_each_image_the_masks_it_gets_alone(changes):
    model = spread_model(**changes)
    sizes = [*SIZES, (64, 35)]
    images, mask = padded_batch(sizes)
    batch = model(images, mask)
    assert batch.image_sizes.tolist() == [list(size) for size in sizes]
    for index, (height, width) in enumerate(sizes):
        alone = model(images[index : index + 1, :, :height, :width])
        rows, columns = batch.mask_sizes[index].tolist()
        assert alone.pred_masks.shape[-2:] == (rows, columns)
        assert alone.mask_sizes.tolist() == [[rows, columns]]
        assert abs(rows - height / 4) < 1
        assert abs(columns - width / 4) < 1
        assert alone.pred_masks.std() > 0.1
        difference = (batch.pred_masks[index, :, :rows, :columns] - alone.pred_masks[0]).abs().max()
        assert difference <= 1e-5
        assert (batch.pred_masks[index, :, rows:] == NO_MASK).all()
        assert (batch.pred_masks[index, :, :, columns:] == NO_MASK).all()


@torch.no_grad()
def test_transformers_masks_depend_on_the_batch_and_cost_its_adapters_a_pass_per_query():
    theirs = their_model(kind="masks")
    model = spread_model(encoder_attention_heads=8, decoder_attention_heads=8)
    images, mask = padded_batch(SIZES)
    adapted = {"theirs": [], "ours": []}
    for name, owner in (("theirs", theirs), ("ours", model)):
        adapter = owner.mask_head.fpn_stages[0].fpn_adapter
        adapter.register_forward_pre_hook(lambda _, args, name=name: adapted[name].append(len(args[0])))
    batch, alone = theirs(images, mask), theirs(images[1:2, :, :48, :70])
    assert (batch.pred_masks[1, :, :12, :18] - alone.pred_masks[0]).abs().max() > 1e-2
    model(images, mask)
    assert adapted["theirs"][0] == 3 * 12
    assert adapted["ours"] == [1, 1, 1]


def test_transformers_mask_loss_depends_on_the_padding():
    theirs = their_model(kind="masks", auxiliary_loss=False)
    images, mask = padded_batch([SIZES[1]])
    labels = labels_with_masks([2], [SIZES[1]])
    padded = [label | {"masks": torch.nn.functional.pad(label["masks"], (0, 40, 0, 20))} for label in labels]
    larger = torch.nn.functional.pad(images, (0, 40, 0, 20)), torch.nn.functional.pad(mask, (0, 40, 0, 20))
    losses = [theirs(*given).loss_dict["loss_mask"] for given in ((images, mask, None, None, None, None, labels),)]
    losses.append(theirs(*larger, labels=padded).loss_dict["loss_mask"])
    assert (losses[0] - losses[1]).abs() > 1e-2
    model = spread_model()
    torch.testing.assert_close(
        model(*larger, labels=labels).loss_dict["loss_mask"], model(images, mask, labels).loss_dict["loss_mask"]
    )


@torch.no_grad()
def test_masks_of_kept_queries_are_those_of_all_queries():
    model = spread_model()
    model.class_labels_classifier.weight.mul_(3)
    images, mask = padded_batch(SIZES)
    complete = model(images, mask)
    scores, classes = complete.logits.softmax(-1).max(-1)
    threshold = scores[classes != 5].median().item()
    kept = (classes != 5) & (scores > threshold)
    assert 0 < kept.sum() < kept.numel() / 2
    some = model(images, mask, masks_above=threshold)
    torch.testing.assert_close(some.pred_masks[kept], complete.pred_masks[kept])
    assert (some.pred_masks[~kept] == NO_MASK).all()
    processor = DetrImageProcessor()
    for rule in ("paper", "transformers"):
        arguments = {"threshold": threshold, "label_ids_to_fuse": {1}, "target_sizes": SIZES, "rule": rule}
        found, expected = (processor.post_process_panoptic_segmentation(o, **arguments) for o in (some, complete))
        assert all(torch.equal(a["segmentation"], b["segmentation"]) for a, b in zip(found, expected, strict=True))
    queries = []
    model.mask_head.register_forward_pre_hook(lambda head, args: queries.append(args[1].shape[1]))
    model(images, mask, masks_above=threshold)
    assert sum(queries) == kept.sum()
    with pytest.raises(ValueError, match="`masks_above` of at most this threshold"):
        processor.post_process_panoptic_segmentation(some, threshold=threshold / 2, label_ids_to_fuse={1})
    with pytest.raises(ValueError, match="needs the masks of all queries"):
        processor.post_process_semantic_segmentation(some)


@pytest.mark.parametrize("changes", VARIANTS[:5], ids=str)
@torch.no_grad()
def test_one_graph_for_a_padded_batch_gives_the_same_masks(changes):
    """What tracing and exports run, where sizes are data: statistics and upsampling by the mask."""
    model = spread_model(**changes)
    images, mask = padded_batch(SIZES)
    expected = model(images, mask)
    base = model.model(images, mask)
    masks, sizes = model._masks_of_batch(model._levels(base), model._attention_maps(base))
    assert sizes.tolist() == expected.mask_sizes.tolist()
    assert (masks - expected.pred_masks).abs().max() <= 1e-5


@torch.no_grad()
def test_the_model_can_be_exported_with_masks():
    model = spread_model()
    images, mask = torch.randn(2, 3, 67, 99), torch.ones(2, 67, 99, dtype=torch.long)
    free = torch.export.Dim.DYNAMIC
    shapes = {0: free, 2: free, 3: free}, {0: free, 1: free, 2: free}
    program = torch.export.export(model, (images, mask), dynamic_shapes=shapes, strict=False)
    for size in ((1, 3, 67, 99), (3, 3, 96, 64)):
        image = torch.randn(size)
        found = program.module()(image, torch.ones(size[0], *size[2:], dtype=torch.long))
        assert (found.pred_masks - model(image).pred_masks).abs().max() <= 1e-5
        assert found.image_sizes.tolist() == [list(size[2:])] * size[0]


@torch.no_grad()
def test_the_backbone_of_exports_gives_every_level_without_padding():
    model = spread_model()
    images, mask = padded_batch(SIZES)
    expected, backbone = model(images, mask), model.model.backbone
    model.model.backbone = MaskedBackbone(backbone, plan_masks(backbone, 3))
    found = model(images, mask)
    assert found.mask_sizes.tolist() == expected.mask_sizes.tolist()
    assert (found.pred_masks - expected.pred_masks).abs().max() <= 1e-4


@torch.no_grad()
def test_the_detector_s_outputs_are_those_without_masks():
    model = spread_model()
    detector = DetrForDetection(model.config).eval()
    missing = detector.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys
    assert {name.split(".")[0] for name in missing.unexpected_keys} == {"mask_head", "bbox_attention"}
    images, mask = padded_batch(SIZES)
    a, b = model(images, mask, output_hidden_states=True), detector(images, mask, output_hidden_states=True)
    for name in ("logits", "pred_boxes", "last_hidden_state", "feature_mask"):
        assert torch.equal(a[name], b[name])
    assert a.encoder_hidden_states is not None
    assert a.feature_levels is None
    assert "feature_levels" not in a.keys() | b.keys()
    plain = model(images, mask, return_dict=False)
    assert any(torch.equal(value, a.pred_masks) for value in plain if isinstance(value, torch.Tensor))


# -- which models there are --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"backbone": "vit_tiny_patch16_224"},
            r'"vit_tiny_patch16_224" has no feature level of stride 4; it has \[16\]',
        ),
        ({"feature_stride": 8}, r"has no feature level of stride 16 up to its level of stride 8; it has \[2, 4, 8\]"),
        ({"d_model": 24}, r"`d_model` \(24\) must be a multiple of 16"),
    ],
)
def test_models_that_cannot_have_masks_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_segmentation(**changes)


def test_masks_need_images():
    with pytest.raises(ValueError, match="Masks need `pixel_values`"):
        tiny_segmentation()(inputs_embeds=torch.randn(1, 9, 32))
    with pytest.raises(TypeError, match="Did you mean 'masks_above'"):
        tiny_segmentation()(torch.randn(1, 3, 64, 64), mask_above=0.5)


def test_dc5_reads_the_levels_of_the_paper():
    """Layers 1 to 3, of which the third has the stride of the fourth."""
    model = tiny_segmentation(backbone="resnet26", dilation=True)
    assert model.model.backbone.strides == [4, 8, 16, 16]
    assert model.model.backbone.channels == [256, 512, 1024, 2048]
    assert [stage.fpn_adapter.in_channels for stage in model.mask_head.fpn_stages] == [1024, 512, 256]


def test_initial_weights_are_those_of_the_paper_s_code():
    model = DetrForSegmentation(DetrConfig(backbone="test_resnet", encoder_layers=1, decoder_layers=1))
    convolutions = [m for m in model.mask_head.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 5 + 3 + 1
    for layer in convolutions[:-1]:
        bound = math.sqrt(3 / layer.weight[0].numel())  # He with slope 1
        assert 0.99 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()
    norms = [m for m in model.mask_head.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert [norm.num_groups for norm in norms] == [8] * 5
    assert [norm.num_channels for norm in norms] == [264, 128, 64, 32, 16]
    for projection in (model.bbox_attention.q_proj, model.bbox_attention.k_proj):
        bound = math.sqrt(6 / 512)
        assert 0.99 * bound < projection.weight.abs().max() <= bound
        assert not projection.bias.any()


def test_the_gain_is_that_of_the_initial_weights_of_attention_maps_alone(tmp_path):
    torch.manual_seed(0)
    plain = tiny_segmentation()
    torch.manual_seed(0)
    model = tiny_segmentation(mask_attention_gain=256)
    name, d = "mask_head.conv1.conv.weight", model.config.d_model
    before, after = plain.state_dict(), model.state_dict()
    assert torch.equal(after[name][:, :d], before[name][:, :d])
    assert torch.equal(after[name][:, d:], 256 * before[name][:, d:])
    assert all(torch.equal(after[other], before[other]) for other in before if other != name)
    model.save_pretrained(tmp_path)
    loaded = DetrForSegmentation.from_pretrained(tmp_path).state_dict()
    assert torch.equal(loaded[name], after[name]), "weights of a checkpoint are no initial weights"


def test_a_box_checkpoint_loads_with_a_new_mask_head_which_a_sentence_says(tmp_path, warnings):
    detector = tiny_model()
    detector.save_pretrained(tmp_path / "boxes")
    model, info = DetrForSegmentation.from_pretrained(tmp_path / "boxes", output_loading_info=True)
    assert "the checkpoint has no masks, so the mask head starts at random" in warnings.text
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"mask_head", "bbox_attention"}
    assert model.mask_head.output_conv.weight.abs().max() > 0
    images, mask = padded_batch(SIZES)
    with torch.no_grad():
        assert torch.equal(model(images, mask).logits, detector(images, mask).logits)
    warnings.clear()
    model.save_pretrained(tmp_path / "masks")
    again = DetrForSegmentation.from_pretrained(tmp_path / "masks")
    assert "starts at random" not in warnings.text
    with torch.no_grad():
        assert torch.equal(again(images, mask).pred_masks, model(images, mask).pred_masks)
    automatic = transformers.AutoModelForImageSegmentation.from_pretrained(tmp_path / "masks")
    assert type(automatic) is DetrForSegmentation
    boxes = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "masks")
    assert type(boxes) is DetrForDetection


WITHOUT_PACKAGE = """
import sys
sys.modules["hf_detr"] = None  # importing it raises ImportError
import torch
from transformers import AutoImageProcessor, AutoModelForImageSegmentation

model = AutoModelForImageSegmentation.from_pretrained({folder!r}, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
wanted = torch.load({wanted!r}, weights_only=True)
with torch.no_grad():
    outputs = model(wanted["images"])
assert torch.allclose(outputs.pred_masks, wanted["pred_masks"], atol=1e-5)
processor = AutoImageProcessor.from_pretrained({folder!r}, trust_remote_code=True)
found = processor.post_process_panoptic_segmentation(outputs, 0.2, label_ids_to_fuse=model.config.stuff_label_ids)
print(len(found))
"""


def test_a_checkpoint_carries_its_code(tmp_path):
    model, images = spread_model(), torch.randn(1, 3, 64, 96)
    model.save_pretrained(tmp_path / "saved")
    DetrImageProcessor().save_pretrained(tmp_path / "saved")
    carried = {path.name for path in (tmp_path / "saved").glob("*.py")}
    assert carried == {path.name for path in MODEL.glob("*.py")} - {"__init__.py"}
    with torch.no_grad():
        torch.save({"images": images, "pred_masks": model(images).pred_masks}, tmp_path / "wanted.pt")
    code = WITHOUT_PACKAGE.format(folder=str(tmp_path / "saved"), wanted=str(tmp_path / "wanted.pt"))
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "1", result.stderr[-2000:]


def test_classes_queries_and_stuff_follow_the_names(tmp_path):
    names = {0: "person", 1: "sky", 2: "grass"}
    tiny_segmentation(id2label=names, stuff_labels=["sky", "grass"], class_weights={"sky": 2}).save_pretrained(tmp_path)
    assert DetrConfig.from_pretrained(tmp_path).stuff_label_ids == {1, 2}
    kept = DetrForSegmentation.from_pretrained(
        tmp_path, id2label={0: "sky", 1: "dog"}, num_queries=5, ignore_mismatched_sizes=True
    )
    assert (kept.config.stuff_labels, kept.config.stuff_label_ids, kept.config.class_weights) == (
        ["sky"], {0}, {"sky": 2},
    )  # fmt: skip
    given = DetrForSegmentation.from_pretrained(
        tmp_path, id2label={0: "sky", 1: "road"}, stuff_labels=["road"], ignore_mismatched_sizes=True
    )
    assert given.config.stuff_label_ids == {1}
    with pytest.raises(StrictDataclassError, match=r"`stuff_labels` has 'skye'.*Did you mean 'sky'"):
        tiny_config(id2label=names, stuff_labels=["skye"])
    with pytest.raises(StrictDataclassError, match="`stuff_labels` has 'rode'"):
        DetrForSegmentation.from_pretrained(tmp_path, stuff_labels=["rode"])


# -- training ----------------------------------------------------------------------------------------------------------


def test_a_frozen_detector_trains_the_mask_head_only():
    model = tiny_segmentation(freeze_batch_norm=False, denoising_groups=2, query_type="anchor").train()
    model.freeze_detector()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"mask_head", "bbox_attention"}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, mask = padded_batch(SIZES)
    labels = labels_with_masks([2, 1, 0])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(8):
        outputs = model.train()(images, mask, labels)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs.loss_dict)
    after = model.state_dict()
    changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"mask_head", "bbox_attention"}, "neither weights nor statistics of the detector"
    assert losses[0]["loss_ce"] == losses[-1]["loss_ce"], "no dropout, no denoising"
    assert "loss_ce_denoising" not in losses[0]
    assert losses[-1]["loss_dice"] < losses[0]["loss_dice"]


def test_masks_are_learned():
    """The whole model on one image with two objects, until both masks are right."""
    torch.manual_seed(0)
    model = tiny_segmentation(
        num_queries=3, dropout=0.0, query_type="anchor", freeze_batch_norm=False, frozen_stages=-1
    ).train()
    image = torch.zeros(1, 3, 64, 96)
    masks = torch.zeros(2, 64, 96, dtype=torch.bool)
    masks[0, 8:40, 8:40] = True
    masks[1, 24:56, 56:80] = True
    image[0, 0, masks[0]], image[0, 1, masks[1]] = 2.0, 2.0
    boxes = torch.tensor([[24 / 96, 24 / 64, 32 / 96, 32 / 64], [68 / 96, 40 / 64, 24 / 96, 32 / 64]])
    labels = [{"class_labels": torch.tensor([0, 1]), "boxes": boxes, "masks": masks}]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(120):
        optimizer.zero_grad()
        model(image, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    outputs = model.eval()(image)
    found = DetrImageProcessor().post_process_instance_segmentation(outputs, 0.5, return_binary_maps=True)[0]
    assert sorted(segment["label_id"] for segment in found["segments_info"]) == [0, 1]
    for mask, segment in zip(found["segmentation"], found["segments_info"], strict=True):
        truth = masks[segment["label_id"]]
        assert (mask & truth).sum() / (mask | truth).sum() > 0.7


@torch.no_grad()
def test_prepared_models_give_the_same_masks():
    model = spread_model()
    images, mask = padded_batch(SIZES)
    expected = model(images, mask)
    prepared = prepare_for_inference(model)
    assert isinstance(prepared, DetrForSegmentation)
    assert (prepared(images, mask).pred_masks - expected.pred_masks).abs().max() <= 1e-4
    prepare_for_training(model)
    assert (model(images, mask).pred_masks - expected.pred_masks).abs().max() <= 1e-4


# -- labels from annotations -------------------------------------------------------------------------------------------

POLYGON = [10.0, 10.0, 50.0, 12.0, 40.0, 45.5, 12.0, 40.0]


def annotation(size=(60, 90)):
    """An image with a polygon, compressed and uncompressed run lengths, a row's `mask`, and a crowd."""
    height, width = size
    disc = np.zeros(size, np.uint8)
    disc[5:25, 60:85] = 1
    run = coco_mask.encode(np.asfortranarray(disc))
    text = {"size": list(size), "counts": run["counts"].decode()}
    plain = {"size": list(size), "counts": [height * 2, 30, height * width - height * 2 - 30]}
    objects = [
        {"segmentation": [POLYGON, [60.0, 5.0, 70.0, 5.0, 70.0, 20.0]], "bbox": [10, 5, 60, 41], "category_id": 0},
        {"segmentation": text, "bbox": [60, 5, 25, 20], "category_id": 1},
        {"segmentation": plain, "bbox": [2, 0, 1, 30], "category_id": 2},
        {"segmentation": plain, "bbox": [2, 0, 9, 30], "category_id": 2, "iscrowd": 1},
        {"mask": text["counts"], "bbox": [60, 5, 25, 20], "category_id": 1},
    ]
    return {"image_id": 3, "annotations": objects}, [objects[0]["segmentation"], text, plain, text]


def decoded(segmentation, size=(60, 90)):
    if isinstance(segmentation, list):
        return coco_mask.decode(coco_mask.frPyObjects(segmentation, *size)).any(2)
    runs = segmentation if isinstance(segmentation["counts"], str) else coco_mask.frPyObjects(segmentation, *size)
    return coco_mask.decode(runs).astype(bool)


def test_polygons_and_run_lengths_become_the_masks_that_pycocotools_decodes():
    given, segmentations = annotation()
    processor = DetrImageProcessor(do_resize=False, return_segmentation_masks=True)
    [label] = processor(photo(90, 60, 1), annotations=given, return_tensors="pt")["labels"]
    assert label["masks"].dtype == torch.bool
    assert len(label["masks"]) == len(label["class_labels"]) == 4, "the crowd is in neither"
    for mask, segmentation in zip(label["masks"], segmentations, strict=True):
        assert np.array_equal(mask.numpy(), decoded(segmentation))


def test_masks_are_resized_with_the_image_and_not_padded():
    given, segmentations = annotation()
    processor = DetrImageProcessor(size={"shortest_edge": 80, "longest_edge": 200})
    images, others = [photo(90, 60, 1), photo(60, 120, 2)], {"image_id": 4, "annotations": []}
    batch = processor(images, annotations=[given, others], return_segmentation_masks=True, return_tensors="pt")
    masks = batch["labels"][0]["masks"]
    assert tuple(masks.shape[1:]) == tuple(batch["labels"][0]["size"].tolist()) == (80, 120)
    assert batch["labels"][1]["masks"].shape == (0, 160, 80)
    for mask, segmentation in zip(masks, segmentations, strict=True):
        image = Image.fromarray(decoded(segmentation)).resize((120, 80), Image.Resampling.NEAREST)
        assert np.array_equal(mask.numpy(), np.asarray(image))
    loss = tiny_segmentation()(**batch).loss
    assert loss.isfinite()
    without = processor(images, annotations=[given, others], return_tensors="pt")
    assert "masks" not in without["labels"][0]


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "no `segmentation`, which return_segmentation_masks=True needs"),
        ([[1.0, 2.0, 3.0, 4.0]], "at least 3 points"),
        ([[1.0, 2.0, 3.0, 4.0, 5.0, float("nan")]], "at least 3 points"),
        ([], "must be a list of polygons"),
        ({"size": [60, 80], "counts": "abc"}, "60 x 80 pixels .*but the image has 60 x 90"),
        ({"size": [60, 90], "counts": [10, 5]}, "sum up to 15, but the image has 5400"),
        (np.zeros((60, 80)), "60 x 80 pixels"),
        (np.full((60, 90), 7), "values of its mask must be 0 and 1"),
        ({"counts": "abc"}, "run lengths must be"),
    ],
)
def test_segmentations_that_cannot_be_right_are_refused(segmentation, message):
    objects = [{"bbox": [1, 1, 20, 20], "category_id": 0, "id": 9, "segmentation": segmentation}]
    processor = DetrImageProcessor(return_segmentation_masks=True)
    with pytest.raises(ValueError, match=rf"Image 0 \(image_id 3\), object 0 \(id 9\): .*{message}"):
        processor(photo(90, 60, 1), annotations={"image_id": 3, "annotations": objects})


# -- pipeline ----------------------------------------------------------------------------------------------------------

IMAGES = [photo(90, 60, 1), photo(60, 100, 2).convert("L"), photo(64, 64, 3), photo(120, 50, 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("masks")
    model = spread_model(id2label={0: "cat", 1: "sky", 2: "dog"}, stuff_labels=["sky"])
    processor = DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 120})
    with torch.no_grad():  # queries of different classes
        states = model(**processor(IMAGES, return_tensors="pt")).last_hidden_state.flatten(0, 1)
        deviation, mean = states.std(0), states.mean(0)
        head = model.class_labels_classifier
        head.weight.copy_(torch.randn_like(head.weight) / deviation)
        head.bias.copy_(-head.weight @ mean)
        head.bias[-1] -= 2
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture
def segmenter(folder):
    return pipeline("image-segmentation", model=str(folder))


def same(one, other):
    assert [(s["label"], s["score"]) for s in one] == [
        (s["label"], None if s["score"] is None else pytest.approx(s["score"], abs=1e-4)) for s in other
    ]
    for a, b in zip(one, other, strict=True):
        assert a["mask"].size == b["mask"].size
        assert (np.asarray(a["mask"]) != np.asarray(b["mask"])).mean() < 1e-3


@pytest.mark.parametrize(
    "arguments",
    [
        {"threshold": 0.4},
        {"threshold": 0.4, "rule": "transformers", "overlap_mask_area_threshold": 0.1},
        {"subtask": "instance", "threshold": 0.4, "overlap_mask_area_threshold": 0.0},
        {"subtask": "semantic"},
    ],
    ids=lambda arguments: arguments.get("subtask", "panoptic") + arguments.get("rule", ""),
)
def test_batches_of_different_sizes_give_what_one_by_one_gives(segmenter, arguments):
    assert type(segmenter) is DetrSegmentationPipeline
    one_by_one = [segmenter(image, **arguments) for image in IMAGES]
    assert sum(len(result) for result in one_by_one) >= 4
    for batch_size in (1, 2, 3):
        for found, expected in zip(segmenter(IMAGES, **arguments, batch_size=batch_size), one_by_one, strict=True):
            same(found, expected)
    for image, result in zip(IMAGES, one_by_one, strict=True):
        masks = [np.asarray(segment["mask"]) for segment in result]
        for segment, mask in zip(result, masks, strict=True):
            assert segment["mask"].size == image.size
            assert segment["mask"].mode == "L"
            assert set(np.unique(mask)) <= {0, 255}
            assert segment["label"] in ("cat", "sky", "dog")
        assert (np.sum([mask > 0 for mask in masks], axis=0) <= 1).all()
    if "subtask" not in arguments and "rule" not in arguments:
        stuff = [[s["label"] for s in result].count("sky") for result in one_by_one]
        assert max(stuff) == 1


def test_the_pipeline_gives_what_model_and_processor_give(segmenter, folder):
    model = DetrForSegmentation.from_pretrained(folder)
    processor = DetrImageProcessor.from_pretrained(folder)
    image = IMAGES[3]
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    [expected] = processor.post_process_panoptic_segmentation(
        outputs, 0.4, label_ids_to_fuse=model.config.stuff_label_ids, target_sizes=[(image.height, image.width)]
    )
    found = segmenter(image, threshold=0.4)
    assert found
    assert [s["label"] for s in found] == [model.config.id2label[s["label_id"]] for s in expected["segments_info"]]
    for segment, info in zip(found, expected["segments_info"], strict=True):
        wrong = (np.asarray(segment["mask"]) > 0) != (expected["segmentation"] == info["id"]).numpy()
        assert wrong.mean() < 1e-3


def test_arguments_that_contradict_are_refused(segmenter, tmp_path):
    for arguments, message in (
        ({"subtask": "instances"}, "subtask must be"),
        ({"subtask": "semantic", "threshold": 0.5}, "no effect"),
        ({"subtask": "instance", "rule": "paper"}, 'rule is for subtask="panoptic"'),
        ({"mask_threshold": 0.7}, 'add rule="transformers"'),
        ({"rule": "coco"}, 'rule must be "paper" or "transformers"'),
    ):
        with pytest.raises(ValueError, match=message):
            segmenter(IMAGES[0], **arguments)
    semantic = pipeline("image-segmentation", model=segmenter.model, image_processor=segmenter.image_processor,
                        subtask="semantic")  # fmt: skip
    with pytest.raises(ValueError, match="no effect"):
        semantic(IMAGES[0], threshold=0.5)
    with pytest.raises(TypeError, match="Did you mean 'threshold'"):
        segmenter(IMAGES[0], treshold=0.5)
    with pytest.raises(ValueError, match="has no masks"):
        pipeline("image-segmentation", model=tiny_model(), image_processor=DetrImageProcessor())


def test_a_model_with_masks_detects_in_the_other_pipeline_without_computing_them(folder):
    detector = pipeline(
        "object-detection", model=DetrForSegmentation.from_pretrained(folder), image_processor=str(folder)
    )
    boxes = pipeline("object-detection", model=str(folder))
    assert type(boxes.model) is DetrForDetection
    heads = []
    detector.model.mask_head.register_forward_pre_hook(lambda head, args: heads.append(args))
    found = detector(IMAGES[0], threshold=0.4)
    assert not heads
    for one, other in zip(found, boxes(IMAGES[0], threshold=0.4), strict=True):
        assert one == other | {"score": pytest.approx(other["score"], abs=1e-5)}
    assert len(found) > 1


def test_transformers_own_models_get_the_pipeline_they_had():
    theirs = their_model(kind="masks")
    processor = transformers.DetrImageProcessor(size={"height": 64, "width": 64})
    other = pipeline("image-segmentation", model=theirs, image_processor=processor)
    assert type(other) is transformers.ImageSegmentationPipeline
    image = Image.new("RGB", (64, 64))
    ImageDraw.Draw(image).rectangle((8, 8, 30, 30), fill="red")
    assert isinstance(other(image), list)
