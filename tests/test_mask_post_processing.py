"""Masks to segments: the paper's rule against a reading of it pixel by pixel, transformers' rule against transformers,
and what transformers gets wrong."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from pycocotools import mask as coco_mask

from hf_detr import DetrImageProcessor

CLASSES = 6
STUFF = {3, 4, 5}
OURS, THEIRS = DetrImageProcessor(), transformers.DetrImageProcessor()


def world(seed, queries=12, size=(11, 14), padded=(13, 20), sharp=5.0):
    """Outputs for one image whose masks are rough discs of all sizes, many of them sure of their class; padding is full
    of nonsense."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, queries, CLASSES + 1, generator=generator) * sharp
    center = torch.rand(queries, 2, 1, 1, generator=generator) * torch.tensor(size)[:, None, None]
    radius = torch.rand(queries, 1, 1, generator=generator) * 6
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) + 0.5 for n in size), indexing="ij"))
    masks = torch.randn(1, queries, *padded, generator=generator) * 50
    discs = 3 * (radius - (grid - center).norm(dim=1)) + torch.randn(queries, *size, generator=generator)
    masks[0, :, : size[0], : size[1]] = discs
    return SimpleNamespace(
        logits=logits,
        pred_masks=masks,
        mask_sizes=torch.tensor([size]),
        image_sizes=torch.tensor([[4 * size[0] - 1, 4 * size[1] - 3]]),
    )


def cut(outputs):
    """The same without padding, as transformers' methods need it."""
    rows, columns = outputs.mask_sizes[0].tolist()
    return SimpleNamespace(logits=outputs.logits, pred_masks=outputs.pred_masks[..., :rows, :columns])


def paper_by_hand(outputs, target, threshold=0.85):
    """The paper's panoptic rule, written out from its code's behaviour: numpy, PIL's resize, dicts per segment."""
    rows, columns = outputs.mask_sizes[0].tolist()
    probability = outputs.logits[0].double().softmax(-1).numpy()
    chosen = [
        (q, int(probability[q].argmax()), float(probability[q].max()))
        for q in range(len(probability))
        if probability[q].argmax() != CLASSES and probability[q].max() > threshold
    ]
    cropped = outputs.pred_masks[:, :, :rows, :columns]
    size = tuple(outputs.image_sizes[0].tolist())
    masks = torch.nn.functional.interpolate(cropped, size, mode="bilinear", align_corners=False)[0].numpy()
    merge = True
    while True:
        if not chosen:
            return np.zeros(target, int), []
        stack = np.stack([masks[q] for q, _, _ in chosen])
        best = stack.argmax(0)
        if merge:
            for label in STUFF:
                same = [index for index, (_, found, _) in enumerate(chosen) if found == label]
                for index in same[1:]:
                    best[best == index] = same[0]
            merge = False
        resized = np.asarray(Image.fromarray(best.astype(np.int32)).resize(target[::-1], Image.Resampling.NEAREST))
        areas = [int((resized == index).sum()) for index in range(len(chosen))]
        if min(areas) > 4:
            return resized + 1, [(index + 1, label, score) for index, (_, label, score) in enumerate(chosen)]
        chosen = [entry for entry, area in zip(chosen, areas, strict=True) if area > 4]


@pytest.mark.parametrize("target", [(43, 53), (80, 97), (21, 30), (5, 4)])
def test_the_paper_s_rule_is_followed_pixel_by_pixel(target):
    merged = removed = 0
    for seed in range(25):
        outputs = world(seed, size=(11, 14))
        [found] = OURS.post_process_panoptic_segmentation(outputs, label_ids_to_fuse=STUFF, target_sizes=[target])
        expected, segments = paper_by_hand(outputs, target)
        assert np.array_equal(found["segmentation"].numpy(), expected), seed
        assert [(s["id"], s["label_id"]) for s in found["segments_info"]] == [s[:2] for s in segments]
        assert [s["score"] for s in found["segments_info"]] == pytest.approx([s[2] for s in segments], abs=1e-5)
        assert all(s["was_fused"] == (s["label_id"] in STUFF) for s in found["segments_info"])
        scores, labels = outputs.logits[0].softmax(-1).max(-1)
        kept = labels[(labels != CLASSES) & (scores > 0.85)].tolist()
        stuff = [label for label in kept if label in STUFF]
        merged += len(stuff) - len(set(stuff))
        removed += len(kept) - (len(stuff) - len(set(stuff))) - len(segments)
    assert merged > 5
    assert removed > 2


def test_without_target_sizes_the_result_has_the_size_of_the_image():
    outputs = world(0)
    [found] = OURS.post_process_panoptic_segmentation(outputs, label_ids_to_fuse=STUFF)
    expected, _ = paper_by_hand(outputs, (43, 53))
    assert np.array_equal(found["segmentation"].numpy(), expected)
    assert found["segmentation"].dtype == torch.int32


@pytest.mark.parametrize(
    "arguments", [{}, {"threshold": 0.7, "mask_threshold": 0.3, "overlap_mask_area_threshold": 0.5}]
)
def test_transformers_rule_gives_what_transformers_gives_where_nothing_is_fused(arguments):
    sizes = []
    for seed in range(25):
        outputs, target = world(seed), (50, 61)
        arguments = arguments | {"target_sizes": [target]}
        for task, mine in (("panoptic", {"rule": "transformers"}), ("instance", {})):
            fuse = {"label_ids_to_fuse": set()} if task == "panoptic" else {}
            name = f"post_process_{task}_segmentation"
            [found] = getattr(OURS, name)(outputs, **arguments, **mine, **fuse)
            [expected] = getattr(THEIRS, name)(cut(outputs), **arguments, **fuse)
            assert torch.equal(found["segmentation"], expected["segmentation"])
            assert found["segments_info"] == expected["segments_info"]
            sizes.append(len(found["segments_info"]))
    assert max(sizes) > 2


def test_semantic_maps_are_those_of_transformers_on_the_image_without_padding():
    outputs = world(3)
    for target_sizes in (None, [(50, 61)]):
        [found] = OURS.post_process_semantic_segmentation(outputs, target_sizes)
        [expected] = THEIRS.post_process_semantic_segmentation(cut(outputs), target_sizes)
        assert torch.equal(found, expected)
    [scored] = OURS.post_process_semantic_segmentation(outputs, [(50, 61)], return_segmentation_scores=True)
    [theirs] = THEIRS.post_process_semantic_segmentation(cut(outputs), [(50, 61)], return_segmentation_scores=True)
    torch.testing.assert_close(scored.segmentation_scores, theirs.segmentation_scores)


def test_binary_maps_are_each_object_s_own_mask():
    outputs, target = world(4), (60, 45)
    [found] = OURS.post_process_instance_segmentation(outputs, 0.5, target_sizes=[target], return_binary_maps=True)
    probability = outputs.logits[0].softmax(-1)
    kept = [q for q in range(12) if probability[q].argmax() != CLASSES and probability[q].max() > 0.5]
    assert [s["label_id"] for s in found["segments_info"]] == [int(probability[q].argmax()) for q in kept]
    cropped = cut(outputs).pred_masks
    large = torch.nn.functional.interpolate(cropped, (43, 53), mode="bilinear", align_corners=False)[0]
    for mask, query in zip(found["segmentation"], kept, strict=True):
        image = Image.fromarray((large[query] > 0).numpy().astype(np.uint8))
        assert np.array_equal(mask.numpy(), np.asarray(image.resize(target[::-1], Image.Resampling.NEAREST)) > 0)
    assert found["segmentation"].sum(0).max() > 1, "they overlap"


@pytest.mark.parametrize("binary", [False, True])
def test_coco_annotations_are_run_lengths_that_pycocotools_reads(binary):
    outputs, arguments = world(4), {"target_sizes": [(60, 45)], "return_binary_maps": binary}
    arguments["overlap_mask_area_threshold"] = 0.0
    [plain] = OURS.post_process_instance_segmentation(outputs, **arguments)
    [encoded] = OURS.post_process_instance_segmentation(outputs, **arguments, return_coco_annotation=True)
    assert len(encoded["segmentation"]) == len(plain["segments_info"]) > 1
    for index, (run, segment) in enumerate(zip(encoded["segmentation"], plain["segments_info"], strict=True)):
        mask = plain["segmentation"][index] if binary else plain["segmentation"] == segment["id"]
        assert np.array_equal(coco_mask.decode(run).astype(bool), mask.numpy())


@pytest.mark.parametrize("rule", ["paper", "transformers"])
def test_nothing_above_the_threshold_is_an_empty_map_of_the_same_type(rule):
    outputs = world(0)
    outputs.logits[..., -1] += 100
    arguments = {"label_ids_to_fuse": STUFF, "target_sizes": [(9, 8)], "rule": rule}
    [found] = OURS.post_process_panoptic_segmentation(outputs, **arguments)
    assert torch.equal(found["segmentation"], torch.zeros(9, 8, dtype=torch.int32))
    assert found["segments_info"] == []
    [found] = OURS.post_process_instance_segmentation(outputs, target_sizes=[(9, 8)], return_binary_maps=True)
    assert found["segmentation"].shape == (0, 9, 8)


def test_what_cannot_be_right_is_refused(warnings):
    outputs = world(0)
    with pytest.raises(ValueError, match=r'rule must be "paper" or "transformers"'):
        OURS.post_process_panoptic_segmentation(outputs, label_ids_to_fuse=set(), rule="coco")
    for task in ("panoptic", "instance", "semantic"):
        with pytest.raises(ValueError, match="1 images but 2 target sizes"):
            getattr(OURS, f"post_process_{task}_segmentation")(outputs, target_sizes=[(9, 8)] * 2)
    outputs.pred_masks = None
    with pytest.raises(ValueError, match="no `pred_masks`"):
        OURS.post_process_semantic_segmentation(outputs)


def test_target_sizes_may_be_a_tensor():
    outputs = world(1)
    [a] = OURS.post_process_panoptic_segmentation(
        outputs, label_ids_to_fuse=STUFF, target_sizes=torch.tensor([[50, 61]])
    )
    [b] = OURS.post_process_panoptic_segmentation(outputs, label_ids_to_fuse=STUFF, target_sizes=[(50, 61)])
    assert torch.equal(a["segmentation"], b["segmentation"])


# -- defects of transformers, numbered as in its threads -------------------------------------------------------------


def four_quarters(labels):
    """Four sure queries, each of a quarter of the image, of these classes."""
    logits = torch.full((1, 4, CLASSES + 1), -10.0)
    masks = torch.full((1, 4, 8, 8), -10.0)
    for query, label in enumerate(labels):
        logits[0, query, label] = 10
        row, column = 4 * (query // 2), 4 * (query % 2)
        masks[0, query, row : row + 4, column : column + 4] = 10
    return SimpleNamespace(logits=logits, pred_masks=masks)


def test_ids_stay_unique_after_a_fused_segment_which_they_do_not_in_transformers():
    """23461 of transformers: stuff, thing, the same stuff, thing."""
    outputs = four_quarters([3, 0, 3, 1])
    arguments = {"label_ids_to_fuse": {3}, "target_sizes": [(8, 8)]}
    [theirs] = THEIRS.post_process_panoptic_segmentation(outputs, **arguments)
    ids = [segment["id"] for segment in theirs["segments_info"] if segment["label_id"] != 3]
    assert len(set(ids)) < len(ids), "transformers gives two things one id"
    for rule in ("paper", "transformers"):
        [found] = OURS.post_process_panoptic_segmentation(outputs, **arguments, rule=rule)
        ids = {segment["id"]: segment["label_id"] for segment in found["segments_info"]}
        assert sorted(ids.values()) == [0, 1, 3]
        assert len(found["segments_info"]) == 3
        quarters = [found["segmentation"][r, c].item() for r, c in ((0, 0), (0, 7), (7, 0), (7, 7))]
        if rule == "transformers":
            assert [ids[quarter] for quarter in quarters] == [3, 0, 3, 1]
        assert (found["segmentation"] > 0).all()


def test_the_paper_s_rule_is_not_that_of_transformers():
    """A speck of 4 pixels is a segment there, and a segment that loses half its mask to another is none."""
    outputs = four_quarters([0, 1, 2, 3])
    outputs.pred_masks[0, 3, 4:, 4:] = -10
    outputs.pred_masks[0, 3, 6:, 6:] = 12
    outputs.pred_masks[0, 2] = 8  # everywhere, below the others
    arguments = {"label_ids_to_fuse": set(), "threshold": 0.85, "target_sizes": [(8, 8)]}
    [theirs] = THEIRS.post_process_panoptic_segmentation(outputs, **arguments)
    [ours] = OURS.post_process_panoptic_segmentation(outputs, **arguments)
    assert {segment["label_id"] for segment in theirs["segments_info"]} == {0, 1, 3}
    assert {segment["label_id"] for segment in ours["segments_info"]} == {0, 1, 2}
    assert (ours["segmentation"] > 0).all()
    assert (ours["segmentation"][4:] == ours["segmentation"][7, 7]).all(), "pixels of the speck are assigned again"


def test_the_threshold_of_panoptic_segments_is_that_of_the_processor_or_the_paper_s(tmp_path):
    outputs = four_quarters([0, 1, 2, 4])
    outputs.logits[0, 0, 0], outputs.logits[0, 0, -1] = math.log(0.65), math.log(0.35)  # scores
    arguments = {"label_ids_to_fuse": set(), "target_sizes": [(8, 8)]}

    def labels(processor, **more):
        [result] = processor.post_process_panoptic_segmentation(outputs, **arguments, **more)
        return [segment["label_id"] for segment in result["segments_info"]]

    assert labels(OURS) == [1, 2, 4]
    DetrImageProcessor(panoptic_threshold=0.6).save_pretrained(tmp_path)
    trained = DetrImageProcessor.from_pretrained(tmp_path)
    assert labels(trained) == [0, 1, 2, 4]
    assert labels(trained, threshold=0.7) == [1, 2, 4]
    assert labels(trained, rule="transformers", threshold=0.7) == labels(OURS, rule="transformers", threshold=0.7)
    DetrImageProcessor().save_pretrained(tmp_path)
    assert "panoptic_threshold" not in (tmp_path / "preprocessor_config.json").read_text()


def test_masks_are_resized_from_the_image_and_not_from_the_padded_batch_as_in_transformers():
    image = four_quarters([0, 1, 2, 4])
    padded = four_quarters([0, 1, 2, 4])
    padded.pred_masks = torch.nn.functional.pad(padded.pred_masks, (0, 8, 0, 4), value=-10.0)
    padded.mask_sizes, padded.image_sizes = torch.tensor([[8, 8]]), torch.tensor([[32, 32]])
    arguments = {"label_ids_to_fuse": set(), "target_sizes": [(40, 40)]}
    [expected] = THEIRS.post_process_panoptic_segmentation(image, **arguments)
    [theirs] = THEIRS.post_process_panoptic_segmentation(padded, **arguments)
    assert (theirs["segmentation"] != expected["segmentation"]).float().mean() > 0.3, "stretched by the padding"
    for rule in ("paper", "transformers"):
        [ours] = OURS.post_process_panoptic_segmentation(padded, **arguments, rule=rule)
        assert torch.equal(ours["segmentation"], expected["segmentation"])
