"""`examples/detr_in_50_lines.py`: the paper's model, written out."""

import runpy
from pathlib import Path

import pytest
import torch

from hf_detr import DetrConfig, DetrForDetection

FILE = Path(__file__).parents[1] / "examples" / "detr_in_50_lines.py"
SMALL = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 96, "num_queries": 7}


def test_it_gives_the_outputs_of_the_package(tmp_path):
    torch.manual_seed(0)
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 2}
    model = DetrForDetection(DetrConfig(backbone="test_resnet", d_model=32, **heads, **SMALL)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # as large as trained ones, so that no part is without effect
            if ".backbone." not in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 96, 130)
    with torch.no_grad():
        logits, boxes = runpy.run_path(str(FILE))["Detr"](tmp_path)(images)
        expected = model(images)
    assert (boxes - boxes.mean(1, keepdim=True)).abs().max() > 0.01, "queries differ"
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(boxes, expected.pred_boxes, rtol=0, atol=1e-5)


def test_it_has_at_most_50_lines():
    source = FILE.read_text()
    model = source[source.index("class Detr") : source.index("if __name__")]
    assert len([line for line in model.splitlines() if line.strip()]) <= 50


@pytest.mark.parametrize("fields", [{"pre_norm": True}, {"query_type": "anchor"}])
def test_it_says_which_model_it_is(tmp_path, fields):
    DetrForDetection(DetrConfig(backbone="test_resnet", d_model=32, **SMALL, **fields)).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="paper's model"):
        runpy.run_path(str(FILE))["Detr"](tmp_path)
