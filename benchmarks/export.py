"""Our exports against exports of transformers' `DetrForObjectDetection`, with the same weights, on the same runtimes.

    python benchmarks/export.py
    python benchmarks/export.py --quick

DETR R50 with random weights, one image of 800 x 1066 without padding. Both sides run alternately in one process: ONNX
Runtime in float32, OpenVINO in float32 and in bfloat16. transformers' model is exported as its users would do it:
`torch.onnx.export`, and `openvino.convert_model` of `torch.export`'s program, with dynamic batch and image sizes and
`pixel_mask` as an input. Padded batches of two are timed for ours only, because padding changes the results of
transformers' graph.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import torch
from measure import compare, machine, median, print_table
from transformers import PreTrainedModel

from hf_detr import DetrConfig, DetrForDetection, DetrImageProcessor
from hf_detr.export import export_model, load_exported
from hf_detr.interop import to_transformers
from hf_detr.training import use_all_cores

TINY = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}


class Graph(torch.nn.Module):
    """Only the two outputs that detection needs."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values, pixel_mask):
        outputs = self.model(pixel_values=pixel_values, pixel_mask=pixel_mask)
        return outputs.logits, outputs.pred_boxes


def export_transformers(model: PreTrainedModel, folder: Path) -> None:
    """`model.onnx` and `model.xml`, float32."""
    inputs = {"pixel_values": torch.zeros(2, 3, 131, 167), "pixel_mask": torch.ones(2, 131, 167, dtype=torch.int64)}
    free = torch.export.Dim.DYNAMIC
    shapes = {"pixel_values": {0: free, 2: free, 3: free}, "pixel_mask": {0: free, 1: free, 2: free}}
    with torch.no_grad():
        program = torch.export.export(Graph(model), (), kwargs=inputs, dynamic_shapes=shapes, strict=False)
    torch.onnx.export(program, input_names=list(inputs), output_names=["logits", "pred_boxes"], verbose=False).save(
        folder / "model.onnx"
    )
    openvino.save_model(openvino.convert_model(program), folder / "model.xml", compress_to_fp16=False)


def open_transformers(folder: Path, runtime: str, dtype: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """(pixel_values, pixel_mask) to logits."""
    if runtime == "onnx":
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        return lambda values, mask: session.run(None, {"pixel_values": values, "pixel_mask": mask})[0]
    options = {"INFERENCE_PRECISION_HINT": dtype, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(folder / "model.xml", "CPU", options).create_infer_request()
    return lambda values, mask: request.infer([values, mask], share_inputs=True)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="a tiny model and image, to test the script")
    args = parser.parse_args()
    use_all_cores()
    torch.manual_seed(0)
    height, width = (96, 128) if args.quick else (800, 1066)
    tiny = TINY | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "backbone": "resnet18"}
    ours = DetrForDetection(DetrConfig(num_labels=91, **(tiny if args.quick else {"backbone": "resnet50"}))).eval()
    theirs = to_transformers(ours).eval()
    processor = DetrImageProcessor(size={"shortest_edge": height, "longest_edge": 1333})
    values = torch.randn(1, 3, height, width)
    mask = torch.ones(1, height, width, dtype=torch.int64)
    pair = torch.randn(2, 3, height, width)
    pair_mask = torch.ones(2, height, width, dtype=torch.int64)
    pair_mask[1, height * 3 // 4 :] = 0
    rows, padded = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "theirs").mkdir()
        for runtime in ("onnx", "openvino"):
            export_model(ours, processor, folder / runtime, graph_format=runtime)
        export_transformers(theirs, folder / "theirs")
        for runtime, dtype, name in (
            ("onnx", "float32", "ONNX Runtime, float32"),
            ("openvino", "float32", "OpenVINO, float32"),
            ("openvino", "bfloat16", "OpenVINO, bfloat16"),
        ):
            mine = load_exported(folder / runtime, dtype)
            other = open_transformers(folder / "theirs", runtime, {"float32": "f32", "bfloat16": "bf16"}[dtype])
            difference = np.abs(mine(values, mask).logits.numpy() - other(values.numpy(), mask.numpy())).max()
            rows[f"{name}, difference {difference:.0e}"] = compare(
                lambda mine=mine: mine(values, mask),
                lambda other=other: other(values.numpy(), mask.numpy()),
                args.repeats,
            )
            padded[name] = median(lambda mine=mine: mine(pair, pair_mask), args.repeats)
            del mine, other
    print_table(f"1 image of {height} x {width}, {ours.config.backbone}", rows)
    print(f"\n2 images padded to {height} x {width}, ours ({machine()})\n\n| case | ms |\n|---|---|")
    for name, milliseconds in padded.items():
        print(f"| {name} | {milliseconds:.1f} |")


if __name__ == "__main__":
    main()
