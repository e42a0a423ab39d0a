"""Prediction with OpenVINO: the model of the example against YOLO26n, both trained on the generated data set.

    python examples/finetune.py
    python benchmarks/openvino_yolo.py --model runs/shapes-1 --data data/shapes --minutes 5

YOLO26n is trained from random weights as in convergence.py, and both models are exported to OpenVINO, YOLO26n by
ultralytics itself. Both predict the same image files: complete, from the file to the detections in pixels, as each
package does it, and the graph alone on prepared arrays, in bfloat16 where the processor has it. Both are timed
alternately in one process. AP of both is computed by our evaluator on the validation images, from the complete
predictions. Training differs in time and augmentation, so AP only says which of the two detects better here.

    pip install ultralytics openvino
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openvino
import torch
from convergence import SIZES
from measure import compare, print_table
from peers import from_yolo, import_ultralytics, train_yolo, yolo_parameters
from torchvision.transforms import v2

from hf_detr import DetrImageProcessor
from hf_detr.data import Augmentation, id2label, load_detection_dataset
from hf_detr.evaluation import CocoEvaluator
from hf_detr.export import export_model, load_exported
from hf_detr.interop import load_model
from hf_detr.training import preferred_precision, use_all_cores

PRECISION = {"bf16": ("bfloat16", "bf16"), "no": ("float32", "f32")}
CONFIDENCE = 0.001  # from which YOLO's detections are returned; ours returns all queries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a checkpoint of ours")
    parser.add_argument("--data", type=Path, default=Path("data/shapes"))
    parser.add_argument("--minutes", type=float, default=5.0, help="of training YOLO26n")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    use_all_cores()
    dtype, hint = PRECISION[preferred_precision()]
    train_set = load_detection_dataset(args.data, "train", progress=False)
    val_set = load_detection_dataset(args.data, "val", id2label=id2label(train_set), progress=False)
    size = SIZES["shapes"]
    resize = Augmentation(v2.Resize(list(size.values())))
    rows = {"train_rows": [resize(row) for row in train_set], "val_rows": list(val_set)}
    data = SimpleNamespace(size=size, names=id2label(train_set), val_set=val_set, **rows)
    paths = [str(row["image"].filename) for row in data.val_rows]

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        their_folder = train_and_export_yolo(data, args.minutes, folder)
        model = load_model(args.model)
        processor = DetrImageProcessor.from_pretrained(args.model)
        export_model(model, processor, folder / "ours", graph_format="openvino")
        ours = load_exported(folder / "ours", dtype)
        theirs = open_yolo(their_folder, size)

        def predict(files: list[str]) -> list[dict[str, torch.Tensor]]:
            images = [processor.to_tensor(file) for file in files]
            sizes = [(image.shape[1], image.shape[2]) for image in images]
            outputs = ours(**processor(images, return_tensors="pt"))
            return processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)

        def predict_yolo(files: list[str]) -> list[dict[str, torch.Tensor]]:
            return [from_yolo(found.boxes.data) for found in theirs(files)]

        times = {}
        for count in (1, 32):
            files = paths[:count]
            times[f"complete, {count} file{'s' * (count > 1)}"] = compare(
                partial(predict, files), partial(predict_yolo, files), args.repeats
            )
            both = (prepared(path, count, size, hint) for path in (folder / "ours", their_folder))
            times[f"graph alone, batch of {count}"] = compare(*both, args.repeats)
        print_table(f"Images of {size['height']} x {size['width']}, OpenVINO, {hint}", times, "YOLO26n")
        print("\n| | parameters | AP | AP50 |\n|---|---|---|---|")
        yolo_size = yolo_parameters("yolo26n", len(data.names))
        for name, run, parameters in (("ours", predict, model.num_parameters()), ("YOLO26n", predict_yolo, yolo_size)):
            evaluator = CocoEvaluator(val_set)
            for start in range(0, len(paths), 32):
                ids = [row["image_id"] for row in data.val_rows[start : start + 32]]
                evaluator.update(ids, run(paths[start : start + 32]))
            metrics = evaluator.compute()
            print(f"| {name} | {parameters / 1e6:.2f} M | {metrics['AP']:.3f} | {metrics['AP50']:.3f} |")


def train_and_export_yolo(data: Any, minutes: float, folder: Path) -> Path:
    """The folder of YOLO26n as ultralytics exports it to OpenVINO, for any number of images."""
    import_ultralytics()
    from ultralytics import YOLO

    def save(model: torch.nn.Module) -> None:
        torch.save({"model": model, "train_args": {}}, folder / "yolo26n.pt")

    for *_, evaluator, _ in train_yolo(data, "yolo26n", 0, minutes, 60 * minutes, keep_model=save):
        last = evaluator
    print(f"YOLO26n in PyTorch: AP {last.compute()['AP']:.3f}")
    side = max(data.size.values())
    return Path(YOLO(folder / "yolo26n.pt").export(format="openvino", imgsz=side, dynamic=True, verbose=False))


def open_yolo(folder: Path, size: dict[str, int]) -> Any:
    from ultralytics import YOLO

    model = YOLO(folder, task="detect")
    options = {"imgsz": max(size.values()), "conf": CONFIDENCE, "verbose": False, "device": "cpu"}
    return lambda files: model.predict(files, batch=len(files), **options)


def prepared(folder: Path, count: int, size: dict[str, int], hint: str) -> Callable[[], object]:
    """A run of the graph in a folder on arrays that are ready."""
    options = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(next(folder.glob("*.xml")), "CPU", options)
    values = torch.randn(count, 3, size["height"], size["width"])
    inputs = [values.numpy(), torch.ones(count, *values.shape[2:], dtype=torch.int64).numpy()][: len(compiled.inputs)]
    request = compiled.create_infer_request()
    return lambda: request.infer(inputs, share_inputs=True)


if __name__ == "__main__":
    main()
