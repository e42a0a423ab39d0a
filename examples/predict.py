"""Detect objects in an image or a folder of images; writes pictures with boxes and one JSON of all detections.

python examples/predict.py IMAGE_OR_FOLDER --model CHECKPOINT
"""

import argparse
import json
from collections import deque
from pathlib import Path

import PIL.Image
from tqdm.auto import tqdm
from transformers import pipeline

from hf_detr import DetrForDetection, DetrImageProcessor
from hf_detr.data import open_image
from hf_detr.training import use_all_cores
from hf_detr.visualization import draw_detections


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="an image, or a folder that is searched for images")
    parser.add_argument("--model", required=True, help="checkpoint, a folder or a Hub id")
    parser.add_argument("--output_dir", type=Path, default=Path("predictions"))
    parser.add_argument("--threshold", type=float, default=0.5, help="least score of a detection")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: the best there is")
    args = parser.parse_args()

    paths = find_images(args.images)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results_file = args.output_dir / "detections.json"
    if results_file.exists():
        raise SystemExit(f"{results_file} exists. Name another --output_dir.")
    use_all_cores()
    model = DetrForDetection.from_pretrained(args.model)
    processor = DetrImageProcessor.from_pretrained(args.model)
    detector = pipeline("object-detection", model=model, image_processor=processor, device=args.device)

    waiting = deque()  # images on their way through the detector, in order
    unreadable: dict[str, str] = {}

    def readable():
        for path in paths:
            try:
                waiting.append((path, open_image(path)))
            except ValueError as error:
                unreadable[str(path)] = str(error)
            else:
                yield waiting[-1][1]

    detections = {}
    root = args.images if args.images.is_dir() else args.images.parent
    found = detector(readable(), threshold=args.threshold, batch_size=args.batch_size)
    for objects in tqdm(found, total=len(paths), desc="Detecting"):
        path, image = waiting.popleft()
        detections[str(path)] = objects
        picture = args.output_dir / f"{path.relative_to(root)}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw_detections(image, objects, detector.model.config.label2id).save(picture)
    results_file.write_text(json.dumps(detections, indent=2))
    count = sum(len(objects) for objects in detections.values())
    print(f"{count} objects in {len(detections)} images: {results_file}")
    for path, reason in unreadable.items():
        print(f"not read: {path}: {reason}")


def find_images(source: Path) -> list[Path]:
    """The image itself, or all images below a folder."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise SystemExit(f"There is no {source}.")
    endings = set(PIL.Image.registered_extensions())
    paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in endings and path.is_file())
    if not paths:
        raise SystemExit(f"{source} holds no images.")
    return paths


if __name__ == "__main__":
    main()
