"""Images of every kind in, labels of the visible image out; values against transformers' own processor."""

import io
import zlib

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from PIL import Image

from hf_detr import DetrImageProcessor
from hf_detr.model.image_io import open_image, to_image_tensor


@pytest.fixture
def processor():
    return DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 120})


def photo(width=90, height=60, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height // 6 + 1, width // 6 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def annotation(*boxes, image_id=7, **more):
    return {"image_id": image_id, "annotations": [{"bbox": list(b), "category_id": 1, **more} for b in boxes]}


def test_pixel_values_and_mask_equal_those_of_transformers():
    sizes = [(90, 60), (400, 100), (64, 64), (33, 150)]
    images = [photo(*size, seed=index) for index, size in enumerate(sizes)]
    for size in ({"shortest_edge": 80, "longest_edge": 133}, {"height": 50, "width": 70}):
        ours = DetrImageProcessor(size=size)(images, return_tensors="pt")
        theirs = transformers.DetrImageProcessor(size=size)(images, return_tensors="pt")
        torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], atol=1e-5, rtol=1e-5)
        assert torch.equal(ours["pixel_mask"], theirs["pixel_mask"])


def test_the_papers_defaults():
    batch = DetrImageProcessor()([photo(640, 480), photo(1000, 200)], return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 800, 1333)
    assert batch["pixel_mask"].sum((1, 2)).tolist() == [800 * 1066, 267 * 1333]


def test_labels_do_not_depend_on_batch_mates(processor):
    """In transformers boxes are divided by the padded size."""
    narrow, wide = photo(60, 90), photo(200, 60)
    alone = processor(narrow, annotations=annotation([15, 45, 30, 45]), return_tensors="pt")
    beside = processor(
        [narrow, wide], annotations=[annotation([15, 45, 30, 45]), annotation([0, 0, 5, 5])], return_tensors="pt"
    )
    assert beside["pixel_values"].shape[-1] > alone["pixel_values"].shape[-1]
    for name in ("class_labels", "boxes", "area", "iscrowd", "image_id", "orig_size", "size"):
        assert torch.equal(alone["labels"][0][name], beside["labels"][0][name]), name
    torch.testing.assert_close(alone["labels"][0]["boxes"], torch.tensor([[0.5, 0.75, 0.5, 0.5]]))
    assert alone["labels"][0]["orig_size"].tolist() == [90, 60]
    assert alone["labels"][0]["size"].tolist() == [96, 64]
    torch.testing.assert_close(alone["labels"][0]["area"], torch.tensor([30.0 * 45 * (96 / 90) * (64 / 60)]))
    assert alone["labels"][0]["image_id"].tolist() == [7]


def test_labels_survive_the_way_back_through_post_processing(processor):
    image, box = photo(200, 60), [20, 10, 100, 40]
    batch = processor([image, photo(60, 60)], annotations=[annotation(box), annotation()], return_tensors="pt")
    label = batch["labels"][0]
    logits = torch.full((1, 1, 3), -10.0)
    logits[0, 0, 1] = 10.0
    outputs = transformers.utils.ModelOutput(logits=logits, pred_boxes=label["boxes"][None])
    (result,) = processor.post_process_object_detection(outputs, 0.5, target_sizes=label["orig_size"][None])
    torch.testing.assert_close(result["boxes"], torch.tensor([[20.0, 10.0, 120.0, 50.0]]))
    assert result["labels"].tolist() == [1]


def test_post_processing_equals_transformers_but_ends_at_the_image(processor):
    logits, boxes = torch.randn(2, 20, 4) * 3, torch.rand(2, 20, 4) * 0.6 + 0.2
    outputs = transformers.utils.ModelOutput(logits=logits, pred_boxes=boxes)
    sizes = torch.tensor([[100, 200], [50, 60]])
    theirs = transformers.DetrImageProcessor().post_process_object_detection(outputs, 0.4, target_sizes=sizes)
    ours = processor.post_process_object_detection(outputs, 0.4, target_sizes=sizes)
    for a, b, (height, width) in zip(ours, theirs, sizes.tolist(), strict=True):
        torch.testing.assert_close(a["scores"], b["scores"])
        assert torch.equal(a["labels"], b["labels"])
        clipped = torch.stack([b["boxes"][:, i].clamp(0, (width, height)[i % 2]) for i in range(4)], dim=1)
        torch.testing.assert_close(a["boxes"], clipped)
    with pytest.raises(ValueError, match="2 images but 1 target sizes"):
        processor.post_process_object_detection(outputs, 0.4, target_sizes=sizes[:1])


class TestKindsOfImages:
    @pytest.fixture
    def rgb(self):
        return np.asarray(photo(40, 30))

    def test_arrays_and_tensors_channels_first_and_last(self, rgb, processor):
        expected = processor(Image.fromarray(rgb), return_tensors="pt")["pixel_values"]
        first = np.ascontiguousarray(rgb.transpose(2, 0, 1))
        for image in (
            rgb,
            first,
            torch.from_numpy(rgb.copy()),
            torch.from_numpy(first),
            rgb / 255.0,
            rgb.astype(float),
        ):
            actual = processor(image, return_tensors="pt")["pixel_values"]
            torch.testing.assert_close(actual, expected, atol=0.02, rtol=0)  # float images are resized unrounded

    def test_paths_urls_of_data_and_lists(self, rgb, processor, tmp_path):
        path = tmp_path / "image.png"
        Image.fromarray(rgb).save(path)
        expected = processor(rgb, return_tensors="pt")["pixel_values"]
        for image in (
            path,
            str(path),
            [path],
            [[path]],
            (str(path),),
            np.stack([rgb]),
            torch.from_numpy(rgb.copy())[None],
        ):
            assert torch.equal(processor(image, return_tensors="pt")["pixel_values"], expected)

    def test_grey_images(self, rgb):
        grey = rgb[..., 0]
        expected = torch.from_numpy(np.stack([grey] * 3))
        for image in (grey, grey[..., None], grey[None], Image.fromarray(grey)):
            assert torch.equal(to_image_tensor(image), expected)

    def test_16_bit_grey_is_scaled_not_cut(self, tmp_path):
        values = np.array([[0, 257, 25700, 65535]] * 3, dtype=np.uint16)
        path = tmp_path / "deep.png"
        Image.fromarray(values).save(path)
        for image in (path, Image.open(path), values, torch.from_numpy(values.astype(np.int32)).to(torch.uint16)):
            assert to_image_tensor(image)[1, 0].tolist() == [0, 1, 100, 255]

    def test_transparency_is_laid_over_white(self, tmp_path):
        rgba = np.zeros((4, 6, 4), dtype=np.uint8)
        rgba[..., 0] = 200
        rgba[:, 3:, 3] = 255
        palette = Image.fromarray((rgba[..., 3] > 0).astype(np.uint8)).convert("P")
        palette.putpalette([7, 7, 7, 200, 0, 0])
        path = tmp_path / "palette.png"
        palette.save(path, transparency=0)
        for image in (rgba, Image.fromarray(rgba), path):
            pixels = to_image_tensor(image)
            assert pixels[:, 0, 0].tolist() == [255, 255, 255]
            assert pixels[:, 0, 5].tolist() == [200, 0, 0]
        grey_alpha = Image.fromarray(rgba).convert("LA")
        assert to_image_tensor(grey_alpha)[:, 0, 0].tolist() == [255, 255, 255]

    def test_cmyk_bilevel_and_palette(self, rgb):
        image = Image.fromarray(rgb)
        assert to_image_tensor(image.convert("CMYK")).shape == (3, 30, 40)
        torch.testing.assert_close(
            to_image_tensor(image.convert("CMYK")).float(), to_image_tensor(image).float(), atol=2, rtol=0
        )
        assert set(to_image_tensor(image.convert("1")).unique().tolist()) <= {0, 255}
        assert to_image_tensor(image.convert("P")).shape == (3, 30, 40)

    def test_exif_orientation_is_applied_to_image_and_labels(self, processor):
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise by a quarter
        file = io.BytesIO()
        photo(90, 60).save(file, "JPEG", exif=exif)
        batch = processor(Image.open(file), annotations=annotation([0, 0, 60, 45]), return_tensors="pt")
        assert batch["labels"][0]["orig_size"].tolist() == [90, 60]
        torch.testing.assert_close(batch["labels"][0]["boxes"], torch.tensor([[0.5, 0.25, 1.0, 0.5]]))

    @pytest.mark.parametrize("ending", ["jpg", "png", "tiff", "webp"])
    def test_files_are_read_as_shown_and_images_in_memory_stay_as_they_are(self, ending, tmp_path):
        for orientation in range(1, 9):
            exif, path = Image.Exif(), tmp_path / f"{orientation}.{ending}"
            exif[0x0112] = orientation
            photo(30, 20).save(path, exif=exif)
            # Pillow itself turns a TIFF
            with Image.open(path) as stored:
                upright = Image.fromarray(np.array(stored))
            turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(orientation) if ending != "tiff" else None
            shown = upright if turn is None else upright.transpose(turn)
            expected = torch.from_numpy(np.array(shown)).permute(2, 0, 1)
            in_memory = Image.open(path)
            for image in (path, path.read_bytes(), in_memory, in_memory):
                assert torch.equal(to_image_tensor(image), expected)

    def test_an_orientation_may_be_stored_after_the_pixels(self, tmp_path):
        exif, path = Image.Exif(), tmp_path / "late.png"
        exif[0x010F] = "maker"  # Pillow finds the orientation before it reads the pixels if there is no EXIF
        photo(30, 20).save(path, exif=exif)
        text = b"iTXtXML:com.adobe.xmp" + bytes(5) + b'<x tiff:Orientation="6"/>'
        late = (len(text) - 4).to_bytes(4, "big") + text + zlib.crc32(text).to_bytes(4, "big")
        data = path.read_bytes()
        path.write_bytes(data[:-12] + late + data[-12:])
        for image in (path, path.read_bytes(), Image.open(path)):
            assert to_image_tensor(image).shape == (3, 30, 20)

    def test_an_image_of_which_more_are_in_the_file_is_closed(self, tmp_path):
        path = tmp_path / "pages.tiff"
        photo(30, 20).save(path, save_all=True, append_images=[photo(30, 20, seed=1)])
        image = open_image(path)
        assert torch.equal(to_image_tensor(image), to_image_tensor(photo(30, 20)))
        assert image.fp is None

    @pytest.mark.parametrize(
        ("image", "message"),
        [
            (np.full((4, 5, 3), np.nan), "NaN"),
            (np.full((4, 5, 3), -0.3), "normalises by itself"),
            (np.zeros((9, 5, 7)), "Neither the first nor the last axis"),
            (np.zeros((0, 5, 3), dtype=np.uint8), "must be"),
            (np.full((4, 5, 3), 70000), r"values in \[0, 255\] or \[0, 65535\], got \[70000, 70000\]"),
            (np.full((4, 5, 3), -1), r"values in \[0, 255\] or \[0, 65535\], got \[-1, -1\]"),
        ],
    )
    def test_what_is_no_image_is_refused(self, image, message):
        with pytest.raises(ValueError, match=message):
            to_image_tensor(image)

    @pytest.mark.parametrize(("largest", "divisor"), [(255, 1), (65535, 257)])
    def test_one_rule_holds_for_wide_integers_of_all_kinds(self, largest, divisor):
        """Values up to 255 are taken as they are, up to 65535 they are scaled to 8 bits, whatever holds them."""
        values = np.linspace(0, largest, 20).round().reshape(4, 5)
        expected = torch.from_numpy((values / divisor).round().astype(np.uint8)).expand(3, -1, -1)
        kinds = [values.astype(dtype) for dtype in (np.uint16, np.int32, np.int64)]
        kinds += [torch.from_numpy(values).to(torch.int32), torch.from_numpy(values.astype(np.uint16))]
        kinds += [Image.fromarray(values.astype(np.uint16)), Image.fromarray(values.astype(np.int32))]
        assert [image.mode for image in kinds[-2:]] == ["I;16", "I"]
        for image in kinds:
            assert torch.equal(to_image_tensor(image), expected)

    def test_broken_and_missing_files_are_named(self, tmp_path):
        path = tmp_path / "cut.jpg"
        photo(200, 200).save(path)
        path.write_bytes(path.read_bytes()[:900])
        with pytest.raises(ValueError, match=r"cut\.jpg cannot be read"):
            to_image_tensor(path)
        with pytest.raises(FileNotFoundError, match=r"nothing\.jpg"):
            to_image_tensor(tmp_path / "nothing.jpg")
        with pytest.raises(TypeError, match="not set"):
            to_image_tensor({1, 2})


class TestAnnotations:
    """What transformers' processor accepts, crashes on or drops without a word."""

    @pytest.mark.parametrize(
        ("box", "reason"),
        [
            ([10, 10, 0, 5], "no area"),
            ([10, 10, 5, -1], "no area"),
            ([10, float("nan"), 5, 5], "not finite"),
            ([200, 10, 5, 5], "outside the image of 90 x 60"),
            ([1, 2, 3], "must be"),
        ],
    )
    def test_bad_boxes_are_named_not_dropped(self, processor, box, reason):
        bad = annotation([1, 1, 9, 9], box, image_id=42)
        with pytest.raises(ValueError, match=rf"image_id 42\), annotation 1 .*{reason}"):
            processor([photo()], annotations=[bad])

    def test_a_missing_area_is_computed_and_boxes_are_cut_at_the_image(self, processor):
        labels = processor(photo(), annotations=annotation([-10, 30, 55, 60]), do_resize=False)["labels"][0]
        assert labels["area"].tolist() == [55 * 60]
        torch.testing.assert_close(labels["boxes"], torch.tensor([[0.25, 0.75, 0.5, 0.5]]))

    def test_crowds_are_left_out_of_the_labels(self, processor):
        mixed = annotation([1, 1, 9, 9], [2, 2, 20, 20])
        mixed["annotations"][1] |= {"iscrowd": 1, "segmentation": {"counts": [], "size": [60, 90]}}
        labels = processor(photo(), annotations=mixed)["labels"][0]
        assert len(labels["class_labels"]) == len(labels["boxes"]) == len(labels["area"]) == len(labels["iscrowd"]) == 1

    def test_images_without_objects(self, processor):
        labels = processor(photo(), annotations=annotation(), return_tensors="pt")["labels"][0]
        assert labels["boxes"].shape == (0, 4)
        assert labels["class_labels"].shape == (0,)

    def test_wrong_forms(self, processor):
        with pytest.raises(ValueError, match="There are no images"):
            processor([])
        with pytest.raises(ValueError, match="2 images but annotations for 1"):
            processor([photo(), photo()], annotations=[annotation()])
        with pytest.raises(ValueError, match="its annotation must be a dict"):
            processor([photo()], annotations=[{"boxes": []}])
        with pytest.raises(ValueError, match="category_id must be an integer, got 'cat'"):
            processor([photo()], annotations=[annotation([1, 1, 9, 9], category_id="cat")])


def test_floats_without_rescaling_are_normalised_as_they_are():
    image = torch.rand(3, 20, 30)
    ours = DetrImageProcessor(do_resize=False, do_rescale=False)(image, return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(ours[0], (image - mean) / std)
    again = DetrImageProcessor(do_resize=False)(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(again, ours)


def test_target_sizes_may_be_a_list_of_tensors(processor):
    outputs = transformers.utils.ModelOutput(logits=torch.randn(2, 5, 4), pred_boxes=torch.rand(2, 5, 4))
    sizes = [torch.tensor([100, 200]), torch.tensor([50, 60])]
    as_list = processor.post_process_object_detection(outputs, 0.0, target_sizes=sizes)
    as_tensor = processor.post_process_object_detection(outputs, 0.0, target_sizes=torch.stack(sizes))
    assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(as_list, as_tensor, strict=True))


def test_options_of_resizing_and_padding():
    images = [photo(90, 60), photo(60, 90)]
    fixed = DetrImageProcessor(size={"height": 64, "width": 80})(images, return_tensors="pt")
    assert fixed["pixel_values"].shape == (2, 3, 64, 80)
    assert fixed["pixel_mask"].all()
    fitted = DetrImageProcessor(size={"max_height": 100, "max_width": 100})(images, return_tensors="pt")
    assert fitted["pixel_values"].shape == (2, 3, 100, 100)
    padded = DetrImageProcessor(do_resize=False, pad_size={"height": 128, "width": 128})(images, return_tensors="pt")
    assert padded["pixel_values"].shape == (2, 3, 128, 128)
    assert padded["pixel_mask"].sum().item() == 2 * 60 * 90
    with pytest.raises(ValueError, match="do not fit a batch of 64 x 64"):
        DetrImageProcessor(do_resize=False, pad_size={"height": 64, "width": 64})(images)
    loose = DetrImageProcessor(do_resize=False, do_pad=False)(images)
    assert [tuple(x.shape) for x in loose["pixel_values"]] == [(3, 60, 90), (3, 90, 60)]
    plain = DetrImageProcessor(do_resize=False, do_normalize=False, do_rescale=False)(images[0], return_tensors="pt")
    assert torch.equal(plain["pixel_values"][0], to_image_tensor(images[0]).float())


def test_saving_and_loading_keeps_every_setting(tmp_path):
    DetrImageProcessor(size={"shortest_edge": 50, "longest_edge": 90}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(
        tmp_path
    )
    for loaded in (
        DetrImageProcessor.from_pretrained(tmp_path),
        transformers.AutoImageProcessor.from_pretrained(tmp_path),
    ):
        assert type(loaded) is DetrImageProcessor
        assert dict(loaded.size) == {"shortest_edge": 50, "longest_edge": 90}
        assert list(loaded.image_mean) == [0.1, 0.2, 0.3]


def test_other_checkpoints_keep_transformers_processor(tmp_path):
    transformers.DetrImageProcessor().save_pretrained(tmp_path)
    assert type(transformers.AutoImageProcessor.from_pretrained(tmp_path)) is transformers.DetrImageProcessor


def test_huge_images_are_refused_with_their_name(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    photo(200, 200).save(path)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"bomb\.png cannot be read"):
        to_image_tensor(path)


@pytest.mark.parametrize(
    ("size", "image", "expected"),
    [
        ({"shortest_edge": 384, "longest_edge": 640}, (400, 540), (384, 512)),  # 384 x 518
        ({"shortest_edge": 384, "longest_edge": 640}, (300, 900), (224, 640)),  # 213 x 640; below 256 multiples of 32
        ({"shortest_edge": 800, "longest_edge": 1333}, (480, 640), (768, 1088)),  # 800 x 1066; 832 is above the limit
        ({"max_height": 200, "max_width": 300}, (500, 500), (192, 192)),
        ({"height": 100, "width": 130}, (400, 540), (100, 130)),
    ],
)
def test_sizes_are_rounded_if_training_rounded_them(tmp_path, size, image, expected):
    DetrImageProcessor(size=size, round_size=True).save_pretrained(tmp_path)
    processor = DetrImageProcessor.from_pretrained(tmp_path)
    pixels = torch.zeros(3, *image, dtype=torch.uint8)
    box = {"bbox": [0, 0, image[1] / 2, image[0]], "category_id": 0, "area": 8.0, "iscrowd": 0}
    batch = processor(pixels, annotations={"image_id": 0, "annotations": [box]}, return_tensors="pt")
    assert batch["pixel_values"].shape[-2:] == expected
    [label] = batch["labels"]
    assert label["size"].tolist() == list(expected)
    assert label["boxes"][0].tolist() == pytest.approx([0.25, 0.5, 0.5, 1.0])
    assert label["area"].item() == pytest.approx(8.0 * expected[0] * expected[1] / (image[0] * image[1]))
    plain = processor(pixels, round_size=False, return_tensors="pt")["pixel_values"].shape[-2:]
    assert plain == DetrImageProcessor(size=size)(pixels, return_tensors="pt")["pixel_values"].shape[-2:]
