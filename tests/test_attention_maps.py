"""What a model looked at: attention maps, their pictures, and whether they explain a detection."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from hf_detr import DetrConfig, DetrForDetection, DetrForSegmentation, DetrImageProcessor
from hf_detr.visualization import attention_maps, explain
from hf_detr.visualization.heat import draw_heat

SIZE = {"height": 64, "width": 96}
SMALL = {
    "backbone": "test_resnet", "feature_stride": 16, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 2,
    "num_queries": 6,
    "id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1},
}  # fmt: skip


def make_model(kind=DetrForDetection, **fields):
    torch.manual_seed(0)
    model = kind(DetrConfig(**SMALL | fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # as large as trained ones: attention is not uniform
            if ".backbone." not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def processor():
    return DetrImageProcessor(size=SIZE)


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 192, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "model",
    [
        make_model(attn_implementation="sdpa"),
        make_model(query_type="anchor"),
        make_model(query_type="anchor", query_proposals=True, dense_loss_coefficient=1),
        make_model(DetrForSegmentation),
    ],
    ids=["learned", "anchor", "proposals", "masks"],
)
def test_maps_are_the_weights_of_eager_attention(model, processor, image):
    implementation = model.config._attn_implementation
    maps = attention_maps(model.train(), image, processor, threshold=0.0)
    assert model.training
    assert model.config._attn_implementation == implementation
    with torch.no_grad():
        inputs = processor(images=image, return_tensors="pt")["pixel_values"]
        outputs = model.eval()(inputs, output_attentions=True)
    rows, columns = outputs.feature_mask.shape[-2:]
    for index, detection in enumerate(maps.detections):
        expected = outputs.cross_attentions[-1][0, :, detection["query"]].view(2, rows, columns)
        torch.testing.assert_close(maps.cross_attention[index], expected)
        torch.testing.assert_close(maps.of_detection(index).sum(), torch.tensor(1.0))
    # pixel (191, 0) lies in the last column of the first row of locations
    expected = outputs.encoder_attentions[-1][0, :, columns - 1].view(4, rows, columns)
    torch.testing.assert_close(maps.from_point(191, 0, head=2), expected[2])
    torch.testing.assert_close(
        maps.from_point(191.9, 127.9), outputs.encoder_attentions[-1][0, :, -1].mean(0).view(rows, -1)
    )


def test_detections_are_those_of_the_pipeline(processor, image):
    model = make_model()
    found = pipeline("object-detection", model=model, image_processor=processor)(
        image, threshold=0.4, round_boxes=False
    )
    maps = attention_maps(model, image, processor, threshold=0.4)
    assert len(found) == len(maps.detections) > 1
    for ours, theirs in zip(maps.detections, sorted(found, key=lambda d: -d["score"]), strict=True):
        assert ours["label"] == theirs["label"]
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)
        assert ours["box"] == pytest.approx(theirs["box"], abs=0.05)


def test_a_processor_that_pads_gives_the_same(image):
    model = make_model()
    padding = DetrImageProcessor(size=SIZE, pad_size={"height": 128, "width": 128})
    expected = attention_maps(model, image, DetrImageProcessor(size=SIZE), threshold=0.0)
    found = attention_maps(model, image, padding, threshold=0.0)
    assert found.detections == expected.detections
    torch.testing.assert_close(found.cross_attention, expected.cross_attention)


def test_what_has_no_attention_is_refused(processor, image):
    with pytest.raises(ValueError, match="needs a DetrForDetection, not Linear"):
        attention_maps(torch.nn.Linear(1, 1), image, processor)


def test_an_image_may_be_anything_that_the_processor_reads(processor, image, tmp_path):
    image.save(tmp_path / "image.png")
    model = make_model()
    expected = attention_maps(model, image, processor, threshold=0.0).cross_attention
    for other in (tmp_path / "image.png", np.asarray(image)):
        torch.testing.assert_close(attention_maps(model, other, processor, threshold=0.0).cross_attention, expected)


def test_layers_and_points_that_do_not_exist_are_refused(processor, image):
    model = make_model()
    with pytest.raises(ValueError, match="has 2 layers, there is no layer 2"):
        attention_maps(model, image, processor, layer=2)
    maps = attention_maps(model, image, processor)
    with pytest.raises(ValueError, match="outside of the image, 192 x 128"):
        maps.from_point(192, 5)


def test_pictures_show_the_map_where_it_is_high():
    weights = torch.zeros(4, 6)
    weights[1, 4] = 0.5
    drawn = np.asarray(draw_heat(Image.new("RGB", (60, 40), (100, 100, 100)), weights)).astype(int)
    assert drawn[15, 45, 0] > 180, "yellow"
    assert drawn[35, 5].tolist() == [60, 60, 60], "dimmed"
    assert draw_heat(Image.new("L", (60, 40)), torch.zeros(2, 2)).size == (60, 40), "no weight at all"


def test_sheets_have_a_picture_for_each_detection_head_and_point(processor, image):
    maps = attention_maps(make_model(), image, processor, threshold=0.0)
    assert maps.draw(columns=3).size == (3 * 320, 320 * -(-(1 + len(maps.detections)) // 3))
    assert maps.draw_heads(0, columns=2).size == (640, 320)
    points = maps.draw_points([(0, 0), (191, 127)], columns=2)
    assert points.size == (640, 320)
    assert not np.array_equal(np.asarray(points)[:, :320], np.asarray(points)[:, 320:])


class Looker(DetrForDetection):
    """Finds a "cat" in proportion to the brightness of one location, which alone its first query attends to."""

    def forward(self, pixel_values, output_attentions=None, **kwargs):
        output = super().forward(pixel_values, output_attentions=output_attentions, **kwargs)
        rows, columns = output.feature_mask.shape[-2:]
        height, width = pixel_values.shape[-2] // rows, pixel_values.shape[-1] // columns
        brightness = pixel_values[:, :, height : 2 * height, 2 * width : 3 * width].mean((1, 2, 3))
        p = 0.05 + 0.9 * brightness.clamp(0, 1)
        rest = (1 - p) / 2
        output.logits = torch.stack((p, rest, rest), dim=-1).log()[:, None].repeat(1, 6, 1)
        output.pred_boxes = torch.tensor([0.5, 0.5, 0.25, 0.5]).expand(len(p), 6, 4)
        if output_attentions:
            weights = torch.full_like(output.cross_attentions[-1], 1e-6)
            weights[..., columns + 2] = 1
            output.cross_attentions = (*output.cross_attentions[:-1], weights)
        return output


def looker(processor):
    model = make_model(Looker)
    rows, columns = model(torch.zeros(1, 3, 64, 96)).feature_mask.shape[-2:]
    pixels = np.zeros((64, 96, 3), dtype=np.uint8)
    pixels[64 // rows : 2 * 64 // rows, 2 * 96 // columns : 3 * 96 // columns] = 255
    return model, Image.fromarray(pixels)


def test_attention_explains_a_detection_that_depends_on_what_it_attends_to():
    plain = DetrImageProcessor(size=SIZE, do_normalize=False)
    model, picture = looker(plain)
    result = explain(model, picture, plain, progress=False, steps=6, batch_size=5)
    assert result.detection["label"] == "cat"
    assert result.highest_first[0] == result.lowest_first[0] == result.random[0, 0, 0] == 1
    assert result.fractions[0] == 0
    assert result.fractions[-1] == 1
    # the location is blurred by the first step of one order and by the last of the other
    gone = result.highest_first[-1].item()
    assert gone < 0.7
    assert result.highest_first[1:].tolist() == pytest.approx([gone] * 6)
    assert result.lowest_first.tolist() == pytest.approx([1.0] * 6 + [gone])
    areas = [float(torch.trapezoid(curve, result.fractions)) for curve in (result.lowest_first, result.highest_first)]
    assert result.faithfulness == pytest.approx(areas[0] - areas[1])
    assert result.is_explained
    assert "random orders reach" in result.describe()
    assert result.insertion[0] == result.lowest_first[-1]
    assert result.insertion[-1] == 1
    assert len(result.random_faithfulness) == 4
    assert len(result.figure().axes) == 3


def test_a_detection_that_does_not_depend_on_the_image_is_not_explained(processor, image):
    class Blind(Looker):
        def forward(self, pixel_values, **kwargs):
            return super().forward(torch.ones_like(pixel_values), **kwargs)

    result = explain(make_model(Blind), image, processor, progress=False, steps=3, random_orders=2)
    assert result.faithfulness == pytest.approx(0, abs=1e-6)
    assert not result.is_explained
    assert "does not show" in result.describe()


def test_a_detection_is_chosen_by_number_or_by_the_result_of_the_pipeline(processor, image):
    model = make_model()
    maps = attention_maps(model, image, processor, threshold=0.3)
    other = {key: maps.detections[1][key] for key in ("label", "box", "score")}
    options = {"threshold": 0.3, "steps": 2, "random_orders": 1, "progress": False}
    assert explain(model, image, processor, other, **options).index == 1
    with pytest.raises(ValueError, match="no number 6"):
        explain(model, image, processor, 6, **options)
    with pytest.raises(ValueError, match="No detection of 'bird'"):
        explain(model, image, processor, other | {"label": "bird"}, **options)
    far = {"xmin": 0, "ymin": 0, "xmax": 1, "ymax": 1}
    with pytest.raises(ValueError, match=r"an IoU of at least 0\.5 with this box"):
        explain(model, image, processor, other | {"box": far}, **options)
