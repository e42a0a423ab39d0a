"""Detect objects in an image or a folder of images of any size.

    python examples/predict.py IMAGE_OR_FOLDER --model CHECKPOINT
    accelerate launch examples/predict.py FOLDER --model CHECKPOINT --output_dir DIR --batch_size 8

Leaves in the output folder:

    detections.json    COCO results: image_id, category_id, bbox [x, y, width, height] in pixels, score
    images.json        COCO's images and categories to these ids, and the files that could not be read
    shards/*.parquet   the same while it goes: file, width, height, and lists of scores, labels, label_ids and boxes
                       (x_min, y_min, x_max, y_max in pixels); error tells why a file could not be read
    FILE.png           pictures with boxes, by default for up to 1,000 images

Ids are those of the folder's annotations, if it has any, else positions in the sorted list of images, from 0; class ids
likewise. After a kill or SIGTERM, the same command goes on, on any number of processes; only images that were in no
shard yet are done again. Which images belong to the job is decided when it first starts. Threads, batches and shards
may change between starts; what decides about the results may not.
"""

import argparse
from contextlib import closing
from pathlib import Path

from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import pipeline

from hf_detr import DetrForDetection, DetrImageProcessor
from hf_detr.inference import (
    PredictionJob,
    ShardWriter,
    load_batches,
    merge_shards,
    model_settings,
    open_job,
    predict_batch,
)
from hf_detr.jobs import Everyone, StopRequest, end_with_launcher
from hf_detr.training import use_all_cores
from hf_detr.visualization import draw_detections

MOST_PICTURES = 1000  # drawn without being asked for


def main() -> None:
    args = parse_args()
    end_with_launcher()
    accelerator = Accelerator()
    everyone = Everyone()
    use_all_cores(accelerator.num_processes)
    with accelerator.main_process_first():  # the others find it in the cache
        model = DetrForDetection.from_pretrained(args.model)
        processor = DetrImageProcessor.from_pretrained(args.model)
    name = str(Path(args.model).resolve()) if Path(args.model).exists() else args.model
    settings = {"model": name, "threshold": args.threshold, **model_settings(model, processor)}
    id2label = model.config.id2label
    if not accelerator.is_main_process:
        everyone.wait()
    try:
        job = open_job(args.output_dir, args.images, settings, id2label, is_main=accelerator.is_main_process)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    if accelerator.is_main_process:
        everyone.wait()
    if job.finished:
        if accelerator.is_main_process:
            print(f"Done already, nothing was changed: {job.detections_file}")
        accelerator.end_training()
        return

    detector = pipeline(
        "object-detection", model=model, image_processor=processor, device=args.device or accelerator.device
    )
    images = job.pending(accelerator.num_processes, accelerator.process_index)
    everyone.wait()  # nobody writes while others still look at what is left
    stop = StopRequest()
    if detect(args, accelerator, job, detector, images, stop):
        if accelerator.is_main_process:
            print("Stopped; what is done is in the shards. The same command goes on from here.", flush=True)
        raise SystemExit(stop.exit_code)
    stop.end()
    everyone.wait()  # all shards are written
    if accelerator.is_main_process:
        summary = merge_shards(job)
        print(f"{summary.objects} objects in {summary.images} images: {job.detections_file}")
        for path, reason in summary.unread:
            print(f"not read: {path}: {reason}")
        if summary.unreadable > len(summary.unread):
            print(f"{summary.unreadable - len(summary.unread)} more could not be read: {job.images_file}")
    accelerator.end_training()


def detect(
    args: argparse.Namespace, accelerator: Accelerator, job: PredictionJob, detector, images, stop: StopRequest
) -> bool:
    """Predict these images, this process' share of what is left. Whether it was asked to stop before the end."""
    id2label = detector.model.config.id2label
    label2id = {name: index for index, name in id2label.items()}
    pictures = job.num_images <= MOST_PICTURES if args.pictures is None else args.pictures
    if accelerator.is_main_process:
        print(f"{job.num_images} images; ids from {job.ids_from or 'their order'}; pictures: {pictures}", flush=True)
    # on a CPU, the model keeps all cores busy, and reading ahead only takes some away
    num_workers = (0 if detector.device.type == "cpu" else 2) if args.num_workers is None else args.num_workers
    batches = load_batches(
        detector, job.image_folder, images, batch_size=args.batch_size, num_workers=num_workers, pictures=pictures
    )
    with (
        ShardWriter(job.shards, accelerator.process_index, id2label, args.shard_size) as writer,
        closing(batches),
        tqdm(total=len(images), desc="Detecting", disable=not accelerator.is_main_process) as bar,
    ):
        for batch in batches:
            for prediction in predict_batch(detector, batch, args.threshold):
                if prediction.picture is not None:
                    path = args.output_dir / f"{prediction.file}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    draw_detections(prediction.picture, prediction.objects(id2label), label2id).save(path)
                writer.add(prediction)
            bar.update(len(batch))
            if stop.requested:
                return True
    return False


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="an image, or a folder that is searched for images")
    parser.add_argument("--model", required=True, help="checkpoint, a folder or a Hub id")
    parser.add_argument("--output_dir", type=Path, default=Path("predictions"))
    parser.add_argument("--threshold", type=float, default=0.5, help="least score of a detection")
    parser.add_argument("--batch_size", type=int, default=1, help="images a process and step")
    parser.add_argument(
        "--num_workers", type=int, help="threads a process that read images ahead; default: 2, and 0 on a CPU"
    )
    parser.add_argument("--shard_size", type=int, default=512, help="images a process between two writes")
    parser.add_argument(
        "--pictures", action=argparse.BooleanOptionalAction, help=f"default: for up to {MOST_PICTURES:,} images"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: the best there is")
    args = parser.parse_args()
    for name in ("batch_size", "shard_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1.")
    if args.num_workers is not None and args.num_workers < 0:
        parser.error("--num_workers must not be negative.")
    return args


if __name__ == "__main__":
    main()
