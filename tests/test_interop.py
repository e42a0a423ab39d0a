"""Every DETR checkpoint there is can be read, and ours can be written for transformers."""

import argparse
import functools
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from checkpoints import RESNET, SMALL_RESNET, save_original, save_v4, save_v5, spread, their_model
from conftest import padded_batch, randomise_norms, relative_difference, tiny_model, tiny_segmentation

from hf_detr import DetrConfig, DetrForDetection, DetrForSegmentation, DetrImageProcessor, DetrModel
from hf_detr.interop import load_original, save_for_transformers, to_transformers
from hf_detr.interop.original_checkpoints import coco_labels

TOLERANCE = 1e-5
SIZES = [(64, 96), (48, 70), (64, 40)]
# Every layout: how the model differs from a tiny timm ResNet with sine positions, and how it is saved. Layouts of the
# same model follow each other, so that it is built once.
DC5 = {"backbone": "resnet26", "dilation": True}
LEARNED = {"position_embedding_type": "learned"}
MASKS = {"kind": "masks", "num_labels": 250}
CONDITIONAL, DAB = {"kind": "conditional"}, {"kind": "dab"}
LAYOUTS = {
    "v4": ({}, save_v4),
    "v4-bin": ({}, lambda model, folder: save_v4(model, folder, pickle=True)),
    "v4-bin-sharded": ({}, lambda model, folder: save_v4(model, folder, pickle="sharded")),
    "v4-sharded": ({}, lambda model, folder: save_v4(model, folder, max_shard_size="500KB")),
    "v5": ({}, save_v5),
    "v5-sharded": ({}, lambda model, folder: save_v5(model, folder, max_shard_size="500KB")),
    "v4-dc5": (DC5, save_v4),
    "v5-dc5": (DC5, save_v5),
    "v4-learned": (LEARNED, save_v4),
    "v5-learned": (LEARNED, save_v5),
    "v4-transformers-resnet": ({"resnet": RESNET}, save_v4),
    "v5-transformers-resnet": ({"resnet": SMALL_RESNET}, save_v5),
    "v4-table": ({"kind": "table"}, save_v4),
    "v5-table": ({"kind": "table"}, save_v5),
    "v4-table-learned": ({"kind": "table"} | LEARNED, save_v4),
    "v4-masks": (MASKS, save_v4),
    "v5-masks": (MASKS, save_v5),
    "v4-masks-dc5": (MASKS | DC5, save_v4),
    "v5-masks-dc5": (MASKS | DC5, save_v5),
    "v4-masks-transformers-resnet": (MASKS | {"resnet": RESNET}, save_v4),
    "v4-conditional": (CONDITIONAL, save_v4),
    "v5-conditional": (CONDITIONAL, save_v5),
    "v4-conditional-sharded": (CONDITIONAL, lambda model, folder: save_v4(model, folder, max_shard_size="500KB")),
    "v5-conditional-dc5": (CONDITIONAL | DC5, save_v5),
    "v4-conditional-learned": (CONDITIONAL | LEARNED, save_v4),
    "v4-conditional-transformers-resnet": (CONDITIONAL | {"resnet": RESNET}, save_v4),
    "v5-conditional-transformers-resnet": (CONDITIONAL | {"resnet": SMALL_RESNET}, save_v5),
    "v4-dab": (DAB, save_v4),
    "v5-dab": (DAB, save_v5),
    "v5-dab-sharded": (DAB, lambda model, folder: save_v5(model, folder, max_shard_size="500KB")),
    "v4-dab-bin": (DAB, lambda model, folder: save_v4(model, folder, pickle=True)),
    "v4-dab-dc5": (DAB | DC5, save_v4),
    "v4-dab-patterns": (DAB | {"num_patterns": 3}, save_v4),
    "v5-dab-patterns-dc5": (DAB | DC5 | {"num_patterns": 3}, save_v5),
    "v5-dab-relu": (DAB | {"activation_function": "relu"}, save_v5),
    "v5-dab-temperature": (DAB | {"temperature_height": 100, "temperature_width": 100}, save_v5),
    "v4-dab-transformers-resnet": (DAB | {"resnet": RESNET}, save_v4),
}
ORIGINALS = {
    "detr-r26-dc5.pth": DC5,
    "detr-r101.pth": {"backbone": "resnet101"},
    "detr-r18-learned.pth": {"backbone": "resnet18"} | LEARNED,
    "detr-r50-panoptic.pth": {"backbone": "resnet50"} | MASKS,
    "detr-r26-dc5-panoptic.pth": DC5 | MASKS,
    "detr-r101-panoptic.pth": {"backbone": "resnet101"} | MASKS,
    "conditional-r50.pth": CONDITIONAL | {"backbone": "resnet18"},
    "conditional-r26-dc5.pth": CONDITIONAL | DC5,
    "dab-r50.pth": DAB | {"backbone": "resnet18"},
    "dab-r26-dc5-pat3.pth": DAB | DC5 | {"num_patterns": 3},
}


@pytest.fixture
def connections(monkeypatch) -> Iterator[list[tuple]]:
    """Connections that were attempted, all of which fail, although the Hub may be used."""
    attempts = []

    def connect(*arguments, **kwargs):
        attempts.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, connect)
    return attempts


@functools.lru_cache(maxsize=1)
def their_model_of(fields: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return their_model(**json.loads(fields))


@torch.no_grad()
def largest_difference(ours, theirs) -> float:
    """Largest difference of logits, boxes and masks, divided by the largest value if that exceeds 1: each image alone,
    and each image of a padded batch against it alone."""
    images, mask = padded_batch(SIZES)
    batch = ours(images, mask)
    differences = []
    for index, (height, width) in enumerate(SIZES):
        image = images[index : index + 1, :, :height, :width]
        expected, alone = theirs(image), ours(image)
        assert expected.pred_boxes[0].std(0).max() > 1e-3, "queries must differ, or equal outputs would prove little"
        for name in ("logits", "pred_boxes"):
            differences += [
                relative_difference(found, expected[name][0]) for found in (alone[name][0], batch[name][index])
            ]
        if "pred_masks" in expected:
            assert expected.pred_masks[0].std(0).max() > 10 * TOLERANCE, "masks of queries must differ"
            rows, columns = batch.mask_sizes[index]
            for masks in (alone.pred_masks[0], batch.pred_masks[index, :, :rows, :columns]):
                differences.append(relative_difference(masks, expected.pred_masks[0]))
    return float(max(differences))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_of_transformers_give_the_same_outputs_without_the_network(layout, connections, tmp_path):
    fields, save = LAYOUTS[layout]
    theirs = their_model_of(json.dumps(fields))
    folder = save(theirs, tmp_path / "a")
    kind = DetrForSegmentation if fields.get("kind") == "masks" else DetrForDetection
    ours, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert "sharded" not in layout or len([*folder.glob("*.safetensors"), *folder.glob("*.bin")]) > 1
    difference = largest_difference(ours, theirs)
    print(f"| {layout} | {difference:.1e} |")  # pytest -rP shows the table
    assert difference <= TOLERANCE
    assert connections == []


@pytest.mark.parametrize("name", ORIGINALS)
def test_checkpoints_of_the_paper_give_the_same_outputs_without_the_network(name, connections, tmp_path):
    theirs = their_model_of(json.dumps(ORIGINALS[name]))
    file = save_original(theirs, tmp_path / name)
    ours, notes = load_original(file, attention_heads=theirs.config.encoder_attention_heads)
    assert isinstance(ours, DetrForSegmentation) == ("panoptic" in name)
    difference = largest_difference(ours, theirs)
    print(f"| {name} | {difference:.1e} |")
    assert difference <= TOLERANCE
    assert "the file's name" in notes[0]
    assert connections == []


def test_our_own_checkpoints_load_without_the_network_and_hub_ids_do_not(connections, tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    DetrImageProcessor().save_pretrained(tmp_path)
    DetrForDetection.from_pretrained(tmp_path)
    DetrImageProcessor.from_pretrained(tmp_path)
    assert connections == []
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between tries
    with pytest.raises(OSError, match="couldn't connect"):
        DetrConfig.from_pretrained("nobody/nothing")
    assert connections != [], "attempts are noticed"


@pytest.mark.parametrize(
    "fields", [{}, {"dilation": True}, {"feature_stride": 16}, {"backbone": "convnext_atto"}], ids=str
)
def test_ours_with_masks_written_for_transformers_gives_the_same_outputs_there_and_back(fields, tmp_path):
    heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
    names = {index: ("thing" if index < 3 else "stuff") + str(index) for index in range(5)}
    ours = tiny_segmentation(**heads, **fields, id2label=names, mask_loss_coefficient=3)
    randomise_norms(ours)
    spread(ours)
    save_for_transformers(ours, DetrImageProcessor(), tmp_path)
    theirs, info = transformers.DetrForSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    difference = largest_difference(ours, theirs.eval())
    back = DetrForSegmentation.from_pretrained(tmp_path)
    print(f"| masks to transformers: {fields} | {difference:.1e} | back: {largest_difference(back, theirs):.1e} |")
    assert max(difference, largest_difference(back, theirs)) <= TOLERANCE
    assert theirs.config.mask_loss_coefficient == back.config.mask_loss_coefficient == 3


def test_masks_with_pre_norm_have_no_counterpart_in_transformers():
    with pytest.raises(ValueError, match="pre-norm in its Table Transformer only, without masks"):
        to_transformers(tiny_segmentation(pre_norm=True))


@pytest.mark.parametrize(
    "fields",
    [
        {"dilation": True},
        {"position_embedding_type": "learned"},
        {"pre_norm": True, "position_embedding_type": "learned"},
        {"feature_stride": 16, "freeze_batch_norm": False},
        {"backbone": "convnext_atto"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())) or "plain",
)
def test_ours_written_for_transformers_gives_the_same_outputs_there_and_back(fields, tmp_path):
    ours = tiny_model(**fields)
    randomise_norms(ours)
    spread(ours)
    save_for_transformers(ours, DetrImageProcessor(size={"height": 64, "width": 96}), tmp_path)
    kind = "TableTransformerForObjectDetection" if fields.get("pre_norm") else "DetrForObjectDetection"
    theirs, info = getattr(transformers, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    difference = largest_difference(ours, theirs.eval())
    back = largest_difference(DetrForDetection.from_pretrained(tmp_path), theirs)
    print(f"| to transformers: {fields} | {difference:.1e} | back: {back:.1e} |")
    assert max(difference, back) <= TOLERANCE
    assert dict(transformers.DetrImageProcessor.from_pretrained(tmp_path).size)["width"] == 96
    assert DetrImageProcessor.from_pretrained(tmp_path).size["height"] == 64


def test_a_backbone_that_transformers_gets_wrong_is_not_exported(tmp_path):
    model = tiny_model(backbone="test_efficientnet")
    randomise_norms(model)
    with pytest.raises(ValueError, match="computes the backbone"):
        save_for_transformers(model, DetrImageProcessor(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_arguments_of_timm_that_transformers_has_no_place_for_are_not_dropped():
    with pytest.raises(ValueError, match="backbone_kwargs"):
        to_transformers(tiny_model(backbone="resnet18", backbone_kwargs={"layers": [1, 1, 1, 1]}))


def test_labels_of_the_paper_are_coco_s():
    labels = coco_labels()
    assert len(labels) == 91
    assert (labels[0], labels[1], labels[12], labels[90]) == ("N/A", "person", "N/A", "toothbrush")
    assert sum(name != "N/A" for name in labels.values()) == 80


def test_args_in_a_file_of_a_training_run_are_believed(tmp_path):
    theirs = their_model(backbone="resnet26", dilation=True, num_labels=91)
    args = argparse.Namespace(dilation=True, nheads=4, lr=1e-4, dataset_file="coco")
    file = save_original(theirs, tmp_path / "checkpoint.pth", args=args, epoch=3)
    ours, notes = load_original(file)
    assert largest_difference(ours, theirs) <= TOLERANCE
    assert ours.config.id2label[17] == "cat"
    assert "args in the file" in notes[0]


def test_the_classes_of_the_panoptic_files_are_those_of_coco_panoptic(tmp_path):
    theirs = their_model("resnet18", **MASKS)
    ours, _ = load_original(save_original(theirs, tmp_path / "panoptic.pth"), attention_heads=8)
    names = ours.config.id2label
    assert (names[1], names[90], names[92], names[187], names[200]) == (
        "person", "toothbrush", "banner", "sky-other-merged", "rug-merged",
    )  # fmt: skip
    assert len(ours.config.stuff_labels) == len(ours.config.stuff_label_ids) == 53
    assert sum(name != "N/A" for name in names.values()) == 133
    folder = save_v4(theirs, tmp_path / "hub")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] |= {"92": "banner", "91": "LABEL_91", "90": "toothbrush", "200": "rug-merged"}
    (folder / "config.json").write_text(json.dumps(config | {"label2id": {}}))
    read = DetrConfig.from_pretrained(folder)
    assert read.stuff_labels == ["banner", "rug-merged"]
    assert read.stuff_label_ids == {92, 200}
    config["id2label"] = {str(number): f"product {number}" for number in range(250)}  # as many classes of one's own
    (folder / "config.json").write_text(json.dumps(config | {"label2id": {}}))
    assert DetrConfig.from_pretrained(folder).stuff_labels == []


def test_the_panoptic_checkpoint_of_transformers_loads_as_a_detector(tmp_path):
    theirs = their_model(kind="masks")
    ours, info = DetrForDetection.from_pretrained(save_v4(theirs, tmp_path), output_loading_info=True)
    theirs.detr.eval()
    assert largest_difference(ours, theirs.detr) <= TOLERANCE
    assert {name.split(".")[0] for name in info["unexpected_keys"]} == {"mask_head", "bbox_attention"}
    assert not info["missing_keys"]


def test_the_base_model_reads_checkpoints_of_transformers_too(tmp_path):
    theirs = their_model()
    model = DetrModel.from_pretrained(save_v4(theirs, tmp_path))
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        difference = model(images).last_hidden_state - theirs.model(images).last_hidden_state
    assert difference.abs().max() <= TOLERANCE


# -- configs and processors as they are on the Hub -------------------------------------------------------------------

PUBLISHED = {
    "activation_dropout": 0.0, "activation_function": "relu", "architectures": ["DetrForObjectDetection"],
    "attention_dropout": 0.0, "auxiliary_loss": False, "backbone": "resnet50", "bbox_cost": 5,
    "bbox_loss_coefficient": 5, "class_cost": 1, "classifier_dropout": 0.0, "d_model": 256,
    "decoder_attention_heads": 8, "decoder_ffn_dim": 2048, "decoder_layerdrop": 0.0, "decoder_layers": 6,
    "dice_loss_coefficient": 1, "dilation": False, "dropout": 0.1, "encoder_attention_heads": 8,
    "encoder_ffn_dim": 2048, "encoder_layerdrop": 0.0, "encoder_layers": 6, "eos_coefficient": 0.1, "giou_cost": 2,
    "giou_loss_coefficient": 2, "id2label": {"0": "N/A", "1": "person", "2": "bicycle"}, "init_std": 0.02,
    "init_xavier_std": 1.0, "is_encoder_decoder": True, "label2id": {"N/A": 0, "person": 1, "bicycle": 2},
    "mask_loss_coefficient": 1, "max_position_embeddings": 1024, "model_type": "detr", "num_channels": 3,
    "num_hidden_layers": 6, "num_queries": 100, "position_embedding_type": "sine", "scale_embedding": False,
}  # fmt: skip


def read_config(tmp_path: Path, **changes) -> DetrConfig:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED | changes))
    return DetrConfig.from_pretrained(tmp_path)


def test_the_oldest_config_on_the_hub_is_the_paper_s_detr(tmp_path):
    config = read_config(tmp_path)
    expected = DetrConfig(num_labels=3)
    expected.id2label = {0: "N/A", 1: "person", 2: "bicycle"}
    expected.label2id = {"N/A": 0, "person": 1, "bicycle": 2}
    ours, theirs = config.to_dict(), expected.to_dict()
    assert {n: v for n, v in ours.items() if n[0] != "_"} == {n: v for n, v in theirs.items() if n[0] != "_"}
    assert config.auxiliary_loss, "the files say no, but training needs it and predictions do not change"


def test_configs_of_each_generation_name_their_backbone(tmp_path):
    dc5 = read_config(tmp_path, backbone="resnet101", dilation=True)
    assert (dc5.backbone, dc5.dilation) == ("resnet101", True)
    table = read_config(tmp_path, model_type="table-transformer", backbone="resnet18", use_timm_backbone=True)
    assert (table.backbone, table.pre_norm) == ("resnet18", True)
    nested = {"model_type": "timm_backbone", "backbone": "resnet34", "out_indices": [1, 2, 3], "output_stride": None}
    v5 = read_config(tmp_path, backbone_config=nested, backbone=None)
    assert (v5.backbone, v5.feature_stride) == ("resnet34", 16)
    own = transformers.ResNetConfig(depths=[3, 4, 23, 3], out_features=["stage4"]).to_dict()
    assert read_config(tmp_path, backbone=None, use_timm_backbone=False, backbone_config=own).backbone == "resnet101"
    assert read_config(tmp_path, backbone="microsoft/resnet-50", use_timm_backbone=False).backbone == "resnet50"


def test_a_backbone_that_transformers_computed_differently_is_not_read(tmp_path):
    with pytest.raises(ValueError, match=r"efficientnet_b0.*another network than timm's"):
        read_config(tmp_path, backbone="efficientnet_b0")
    with pytest.raises(ValueError, match=r"resnet5000.*cannot be built"):
        read_config(tmp_path, backbone="resnet5000")


def test_transformers_own_config_object_will_do(tmp_path):
    save_v5(their_model("resnet18"), tmp_path)
    config = transformers.DetrConfig.from_pretrained(tmp_path)
    config.num_queries = 5
    model = DetrForDetection.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
    assert (model.config.model_type, model.config.num_queries, model.config.backbone) == ("hf_detr", 5, "resnet18")


def test_what_is_not_detr_is_refused_by_name(tmp_path):
    with pytest.raises(
        ValueError, match=r'test_what_is.*"deformable_detr".*hf_detr reads "hf_detr", "detr", "table-transformer"'
    ):
        read_config(tmp_path, model_type="deformable_detr")
    with pytest.raises(ValueError, match=r'"swin".*only ResNets can be read'):
        read_config(tmp_path, use_timm_backbone=False, backbone_config={"model_type": "swin"})
    with pytest.raises(ValueError, match="hidden_act=silu"):
        read_config(tmp_path, use_timm_backbone=False, backbone_config={"model_type": "resnet", "hidden_act": "silu"})


@pytest.mark.parametrize(
    ("stored", "size", "do_pad"),
    [
        ({"feature_extractor_type": "DetrFeatureExtractor", "size": 800, "max_size": 1333, "format": "coco_detection"},
         {"shortest_edge": 800, "longest_edge": 1333}, True),
        ({"feature_extractor_type": "DetrFeatureExtractor", "size": 800, "max_size": 800},
         {"shortest_edge": 800, "longest_edge": 800}, True),
        ({"image_processor_type": "DetrImageProcessor", "size": {"shortest_edge": 600}, "max_size": 1000,
          "pad_and_return_pixel_mask": False}, {"shortest_edge": 600, "longest_edge": 1000}, False),
        ({"image_processor_type": "DetrImageProcessor", "size": {"longest_edge": 1000}},
         {"max_height": 1000, "max_width": 1000}, True),
        ({"image_processor_type": "DetrImageProcessorFast", "size": {"height": 480, "width": 640}, "do_pad": True,
          "pad_size": {"height": 640, "width": 640}}, {"height": 480, "width": 640}, True),
        ({"image_processor_type": "DetrImageProcessor"}, {"shortest_edge": 800, "longest_edge": 1333}, True),
    ],
)  # fmt: skip
def test_processors_of_each_generation_are_read(stored, size, do_pad, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored | {"image_mean": [0.5, 0.4, 0.3]}))
    processor = DetrImageProcessor.from_pretrained(tmp_path)
    assert {name: value for name, value in dict(processor.size).items() if value} == size
    assert processor.do_pad == do_pad
    assert list(processor.image_mean) == [0.5, 0.4, 0.3]
    processor.save_pretrained(tmp_path / "again")
    again = DetrImageProcessor.from_pretrained(tmp_path / "again")
    assert again.to_dict() == processor.to_dict()
    assert processor(torch.zeros(3, 300, 500, dtype=torch.uint8), return_tensors="pt")["pixel_values"].shape[0] == 1


def test_a_processor_of_another_kind_of_model_is_refused(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor"}))
    with pytest.raises(ValueError, match="ViTImageProcessor"):
        DetrImageProcessor.from_pretrained(tmp_path)


# -- safety ----------------------------------------------------------------------------------------------------------


class Malicious:
    """A pickle that creates a file when it is opened without `weights_only`."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


def test_a_malicious_pickle_raises_and_runs_nothing(tmp_path):
    witness = tmp_path / "it-ran"
    save_v4(their_model(), tmp_path, pickle=True)
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    torch.save(weights | {"extra": Malicious(witness)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        DetrForDetection.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights_only=True"):
        DetrForDetection.from_pretrained(tmp_path, weights_only=False)
    with pytest.raises(ValueError, match="nothing in it was run"):
        load_original(tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        tiny_model().model.backbone.load_pretrained(tmp_path / "pytorch_model.bin")
    assert not witness.exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert witness.exists(), "the pickle is malicious indeed"


def test_files_that_are_no_checkpoint_of_the_paper_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_original(tmp_path / "nowhere.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.pth cannot be read"):
        load_original(tmp_path / "text.pth")
    torch.save({"model": {"fc.weight": torch.zeros(3, 3)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth"):
        load_original(tmp_path / "other.pth")
    file = save_original(their_model("resnet18"), tmp_path / "detr.pth")
    state = torch.load(file, weights_only=True)["model"]
    del state["transformer.decoder.norm.bias"]
    torch.save({"model": state}, file)
    with pytest.raises(ValueError, match="1 weights are missing"):
        load_original(file, attention_heads=4)
    with pytest.raises(ValueError, match="5 classes, but there are 2 names"):
        load_original(file, id2label={0: "cat", 1: "dog"})


def test_rounded_sizes_that_transformers_does_not_have_are_logged(tmp_path, warnings):
    model = tiny_model()
    save_for_transformers(model, DetrImageProcessor(), tmp_path / "plain")
    assert "rounds" not in warnings.text
    save_for_transformers(model, DetrImageProcessor(round_size=True), tmp_path / "rounded")
    assert "rounds the sizes of images" in warnings.text
