"""Detect objects in an image, a folder of images of any size, or a video.

    python examples/predict.py IMAGE_OR_FOLDER --model CHECKPOINT
    accelerate launch examples/predict.py FOLDER --model CHECKPOINT --output_dir DIR --batch_size 8
    python examples/predict.py FOLDER --model CHECKPOINT --tile 800 --overlap 0.25
    python examples/predict.py clip.mp4 --model CHECKPOINT

Files in the output folder, for images:

    detections.json    COCO results: image_id, category_id, bbox [x, y, width, height] in pixels, score
    images.json        the matching COCO images and categories, and the files that could not be read
    shards/*.parquet   the same, written during prediction: file, width, height, and lists of scores, labels, label_ids
                       and boxes (x_min, y_min, x_max, y_max in pixels); error tells why a file could not be read
    FILE.png           pictures with boxes, by default for up to 1,000 images

Image and category ids come from the folder's COCO annotations if it has any; otherwise they are positions in the sorted
list of images, from 0, and class ids. After a kill or SIGTERM, the same command resumes the job, on any number of
processes; only images that are in no shard are predicted again. The images of a job are fixed when it first starts. The
number of threads and the sizes of batches and shards may change between starts; options that affect results may not.

For a video (one process only):

    clip.mp4           the video with boxes, with the times of its frames and its audio
    clip.jsonl         one line per frame: frame (from 0), time in seconds, and objects in the format of the pipeline
                       (score, label, box with xmin, ymin, xmax, ymax in pixels of the frame as displayed)
    clip.job.json      the settings; at the end also the number of frames and objects, and what could not be read

The first two are written atomically. The same command resumes after the frames that were done.
"""

import argparse
from contextlib import closing
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import pipeline

from hf_detr import DetrForDetection, DetrImageProcessor
from hf_detr.prediction import (
    PredictionJob,
    ShardWriter,
    Tiling,
    VideoJob,
    VideoOutput,
    VideoReader,
    VideoSummary,
    is_video,
    load_batches,
    load_frames,
    merge_shards,
    model_settings,
    open_job,
    open_video_job,
    predict_batch,
)
from hf_detr.runtime import LongBarrier, StopRequest, end_with_launcher, exit_on_error, require_source
from hf_detr.speed import prepare_for_inference
from hf_detr.training import use_all_cores
from hf_detr.visualization import draw_detections

MAX_PICTURES = 1000  # images that are drawn by default


def main() -> None:
    args = parse_args()
    if args.tiling is not None:
        PIL.Image.MAX_IMAGE_PIXELS = None  # tiles are for images that exceed this limit
    end_with_launcher()
    accelerator = Accelerator()
    use_all_cores(accelerator.num_processes)
    if is_video(args.images) and accelerator.num_processes > 1:
        raise SystemExit("A video is predicted by one process. Run without a launcher, or with --num_processes 1.")
    require_source(args.model)
    with accelerator.main_process_first():  # the other processes load from the cache
        model = DetrForDetection.from_pretrained(args.model)
        processor = DetrImageProcessor.from_pretrained(args.model)
    dtype = getattr(torch, args.dtype) if args.dtype else model.dtype
    name = str(Path(args.model).resolve()) if Path(args.model).exists() else args.model
    settings = {"model": name, "threshold": args.threshold, "dtype": str(dtype).removeprefix("torch.")}
    settings |= {"tile": args.tile, "overlap": args.overlap if args.tiling else None}
    settings |= model_settings(model, processor)
    model = prepare_for_inference(model, dtype=dtype, compile=args.compile)
    detector = pipeline(
        "object-detection", model=model, image_processor=processor, device=args.device or accelerator.device
    )
    if args.num_workers is None:
        # on a CPU, the model uses all cores, and threads that read would slow it down
        args.num_workers = 0 if detector.device.type == "cpu" else 2
    if is_video(args.images):
        predict_video(args, detector, settings)
    else:
        predict_images(args, accelerator, detector, settings)
    accelerator.end_training()


def predict_images(args: argparse.Namespace, accelerator: Accelerator, detector, settings: dict[str, Any]) -> None:
    barrier = LongBarrier()
    if not accelerator.is_main_process:
        barrier.wait()
    id2label = detector.model.config.id2label
    job = open_job(args.output_dir, args.images, settings, id2label, process_index=accelerator.process_index)
    if accelerator.is_main_process:
        barrier.wait()
    if job.finished:
        if accelerator.is_main_process:
            print(f"Already done, nothing was changed: {job.detections_file}")
        return

    images = job.pending(accelerator.num_processes, accelerator.process_index)
    barrier.wait()  # no shard is written before all processes have listed the pending images
    stop = StopRequest()
    if detect(args, accelerator, job, detector, images, stop):
        if accelerator.is_main_process:
            print("Stopped; results so far are in the shards. The same command resumes the job.", flush=True)
        raise SystemExit(stop.exit_code)
    stop.end()
    barrier.wait()  # all shards are written
    if accelerator.is_main_process:
        summary = merge_shards(job)
        print(f"{summary.objects} objects in {summary.images} images: {job.detections_file}")
        for path, reason in summary.errors:
            print(f"not read: {path}: {reason}")
        if summary.unreadable > len(summary.errors):
            print(f"{summary.unreadable - len(summary.errors)} more could not be read: {job.images_file}")


def detect(
    args: argparse.Namespace, accelerator: Accelerator, job: PredictionJob, detector, images, stop: StopRequest
) -> bool:
    """Predict this process' part of the pending images. True if it was asked to stop before the end."""
    id2label = detector.model.config.id2label
    label2id = {name: index for index, name in id2label.items()}
    pictures = job.num_images <= MAX_PICTURES if args.pictures is None else args.pictures
    if accelerator.is_main_process:
        print(f"{job.num_images} images; ids from {job.ids_from or 'sorted order'}; pictures: {pictures}", flush=True)
    batches = load_batches(
        detector, job.image_folder, images,
        batch_size=args.batch_size, num_workers=args.num_workers, pictures=pictures, tiles=args.tiling is not None,
    )  # fmt: skip
    with (
        ShardWriter(job.shards, accelerator.process_index, id2label, args.shard_size) as writer,
        closing(batches),
        tqdm(total=len(images), desc="Detecting", disable=not accelerator.is_main_process) as bar,
    ):
        for batch in batches:
            for prediction in predict_batch(detector, batch, args.threshold, args.tiling, args.batch_size):
                if prediction.picture is not None:
                    path = args.output_dir / f"{prediction.file}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    draw_detections(prediction.picture, prediction.objects(id2label), label2id).save(path)
                writer.add(prediction)
            bar.update(len(batch))
            if stop.requested:
                return True
    return False


def predict_video(args: argparse.Namespace, detector, settings: dict[str, Any]) -> None:
    reader = VideoReader(args.images)
    job = open_video_job(args.output_dir, args.images, settings, pictures=args.pictures is not False)
    if job.result is not None:
        print(f"Already done, nothing was changed: {job.records}")
        return
    stop = StopRequest()
    with reader:
        summary = detect_in_frames(args, job, detector, reader, stop)
    if summary is None:
        print(f"Stopped; there is no video yet. The same command resumes the job: {job.records}", flush=True)
        raise SystemExit(stop.exit_code)
    stop.end()
    print(f"{summary.objects} objects in {summary.frames} frames: {job.records}")
    for problem in summary.problems:
        print(f"{args.images}: {problem}")


def detect_in_frames(
    args: argparse.Namespace, job: VideoJob, detector, reader: VideoReader, stop: StopRequest
) -> VideoSummary | None:
    """Predict, draw and record all frames. None if it was asked to stop before the end."""
    id2label = detector.model.config.id2label
    label2id = {name: index for index, name in id2label.items()}
    output = VideoOutput(job, reader)
    batches = load_frames(
        detector, reader,
        batch_size=args.batch_size, num_workers=args.num_workers,
        num_done=output.num_recorded, tiles=args.tiling is not None,
    )  # fmt: skip
    with output, closing(batches), tqdm(total=reader.num_frames, desc="Detecting", unit="frame") as bar:
        for batch in batches:
            predictions = predict_batch(detector, batch.images, args.threshold, args.tiling, args.batch_size)
            found = {prediction.image_id: prediction for prediction in predictions}
            for frame in batch.frames:
                objects = output.record(frame, found.get(frame.index), id2label)
                if args.pictures is not False:
                    output.write(frame, draw_detections(frame.picture, objects, label2id))
            output.copy_audio(batch.audio)
            bar.update(len(batch.frames))
            if stop.requested and not (reader.num_frames and bar.n >= reader.num_frames):
                return None
        return output.finish()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="an image, a folder (searched recursively), or a video")
    parser.add_argument("--model", required=True, help="checkpoint: a folder or a Hub id")
    parser.add_argument("--output_dir", type=Path, default=Path("predictions"))
    parser.add_argument("--threshold", type=float, default=0.5, help="minimum score of a detection")
    parser.add_argument("--tile", type=int, help="also detect in tiles of this many pixels (for large images)")
    parser.add_argument("--overlap", type=float, default=0.25, help="overlap of tiles, as a fraction of their side")
    parser.add_argument("--batch_size", type=int, default=1, help="images, frames or tiles per forward pass")
    parser.add_argument("--num_workers", type=int, help="reading threads per process; default: 2, and 0 on a CPU")
    parser.add_argument("--shard_size", type=int, default=512, help="images per shard")
    parser.add_argument(
        "--pictures",
        action=argparse.BooleanOptionalAction,
        help=f"draw boxes; default: for up to {MAX_PICTURES:,} images, and for videos",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: that of the checkpoint")
    parser.add_argument("--compile", action="store_true", help="use torch.compile; the first images take minutes")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: an accelerator if available")
    args = parser.parse_args()
    try:
        args.tiling = Tiling(args.tile, args.overlap) if args.tile is not None else None
    except ValueError as error:
        parser.error(f"--tile, --overlap: {error}")
    if not 0 <= args.threshold <= 1:
        parser.error("--threshold is a score between 0 and 1.")
    for name in ("batch_size", "shard_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1.")
    if args.num_workers is not None and args.num_workers < 0:
        parser.error("--num_workers must not be negative.")
    return args


if __name__ == "__main__":
    with exit_on_error():
        main()
