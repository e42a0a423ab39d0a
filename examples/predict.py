"""Detect objects in images, folders of images of any size, and videos.

    python examples/predict.py IMAGE_OR_FOLDER --model CHECKPOINT
    accelerate launch examples/predict.py FOLDER --model CHECKPOINT --output_dir DIR --batch_size 8
    python examples/predict.py FOLDER --model CHECKPOINT --tile 800 --overlap 0.25
    python examples/predict.py clip.mp4 --model CHECKPOINT

Inputs are paths or URLs; the model is a checkpoint, or what export.py has written. Files in the output folder, for
images:

    detections.json    COCO results: image_id, category_id, bbox [x, y, width, height] in pixels, score
    images.json        the matching COCO images and categories, and the files that could not be read
    shards/*.parquet   the same, written during prediction: file, width, height, and lists of scores, labels, label_ids
                       and boxes (x_min, y_min, x_max, y_max in pixels); error tells why a file could not be read
    masks.json         of a model with masks: COCO results with run-length encodings, one mask per object
    panoptic.json      of a model with masks: COCO's panoptic format, with the PNGs in panoptic/
    FILE.png           pictures with boxes or masks, by default for up to 1,000 images; never taken for input later
    downloads/         what URLs name

Image and category ids come from the COCO annotations of the folder, if it has any and is the only input; otherwise they
are positions in the sorted list of images, from 0, and class ids. After a kill or SIGTERM, the same command resumes the
job, on any number of processes; only images that are in no shard are predicted, also those that were added since. The
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
from accelerate import Accelerator
from tqdm.auto import tqdm

from hf_detr import DetrDetectionPipeline, DetrImageProcessor
from hf_detr.export import ExportedDetr, is_exported, load_exported
from hf_detr.interop import OtherDetector, load_detector
from hf_detr.prediction import (
    Inputs,
    OutputFolder,
    PlannedJobs,
    PredictionJob,
    Predictor,
    SegmentOptions,
    ShardWriter,
    Tiling,
    VideoJob,
    VideoOutput,
    VideoReader,
    VideoSummary,
    is_unreadable,
    load_batches,
    load_frames,
    merge_shards,
    model_settings,
    open_job,
    open_video_job,
    picture_of,
    predict_batch,
    predict_with_ray,
    save_picture,
)
from hf_detr.runtime import LongBarrier, StopRequest, end_with_launcher, exit_on_error, require_source
from hf_detr.speed import prepare_for_inference
from hf_detr.training import use_all_cores
from hf_detr.visualization import draw_detections, draw_masks

MAX_PICTURES = 1000  # images that are drawn by default


def main() -> None:
    args = parse_args()
    if args.tiling is not None:
        PIL.Image.MAX_IMAGE_PIXELS = None  # tiles are for images that exceed this limit
    end_with_launcher()
    accelerator = Accelerator()
    use_all_cores(accelerator.num_processes)
    inputs = Inputs(args.inputs)
    check_engine(args, has_videos=inputs.has_videos, processes=accelerator.num_processes)
    require_source(args.model)
    with accelerator.main_process_first():  # the other processes load from the cache
        model, processor, dtype = load_model(args)
    settings = {"model": str(Path(args.model).resolve()) if Path(args.model).exists() else args.model}
    settings |= {"threshold": args.threshold, "dtype": dtype}
    settings |= {"tile": args.tile, "overlap": args.overlap if args.tiling else None, "top_k": args.top_k}
    segments = choose_masks(args, model, has_videos=inputs.has_videos)
    if segments is not None:
        settings |= {"masks": segments.kinds, "panoptic_threshold": segments.of_panoptic(processor)}
    settings |= model_settings(model, processor)
    if isinstance(model, OtherDetector):
        model = model.prepared(dtype)
    elif not isinstance(model, ExportedDetr):
        model = prepare_for_inference(model, dtype=dtype, compile=args.compile)
    on_cpu = isinstance(model, ExportedDetr) or args.engine == "ray"  # whose actors need the accelerators
    device = "cpu" if on_cpu else args.device or accelerator.device
    detector = DetrDetectionPipeline(model=model, image_processor=processor, device=device)
    if args.num_workers is None:
        # on a CPU, the model uses all cores, and threads that read would slow it down
        args.num_workers = 0 if detector.device.type == "cpu" else 2

    barrier = LongBarrier()
    if not accelerator.is_main_process:
        barrier.wait()
    plan = inputs.open(args.output_dir, settings, overwrite=args.overwrite, is_main=accelerator.is_main_process)
    job, id2label = None, detector.model.config.id2label
    if plan.images:
        index = accelerator.process_index
        job = open_job(plan.output.path, plan.images, plan.settings, id2label, process_index=index)
    if accelerator.is_main_process:
        barrier.wait()
    if segments is not None and plan.videos:
        print("Videos get boxes only; masks are for images.")
    predict(args, accelerator, detector, job, plan, segments)
    accelerator.end_training()


def check_engine(args: argparse.Namespace, *, has_videos: bool, processes: int) -> None:
    if args.engine == "ray" and has_videos:
        raise SystemExit("--engine ray does not support videos. Predict them without it.")
    if args.engine == "ray" and processes > 1:
        raise SystemExit("--engine ray starts its own processes: run it without a launcher.")
    if has_videos and processes > 1:
        raise SystemExit("A video is predicted by one process. Run without a launcher, or with --num_processes 1.")


def predict(
    args: argparse.Namespace,
    accelerator: Accelerator,
    detector: Any,
    job: PredictionJob | None,
    plan: PlannedJobs,
    segments: SegmentOptions | None,
) -> None:
    """All jobs, whether or not another one fails."""
    output, failed = plan.output, list[Exception]()
    if job is not None and not predict_images(args, accelerator, job, detector, output, segments):
        failed.append(ValueError("None of the images could be read."))
    for path, of_video in plan.videos.items():
        try:
            predict_video(args, detector, path, of_video, output)
        except (ValueError, OSError) as error:
            failed.append(error)
    if failed and output.replaces:
        print(f"The results in {output.target} were not replaced; the new ones are in {output.path}.")
    if failed:
        raise failed[0] if len(failed) == 1 else ValueError("\n".join(map(str, failed)))
    LongBarrier().wait()
    if accelerator.is_main_process:
        output.finish()


def load_model(args: argparse.Namespace) -> tuple[Any, DetrImageProcessor, str]:
    """A checkpoint or an export, its processor, and the name of the dtype in which it computes."""
    if not is_exported(args.model):
        model, processor = load_detector(args.model)
        if isinstance(model, OtherDetector) and (args.compile or args.threshold == "per_class"):
            raise ValueError("--compile and --threshold per_class are for the models of hf_detr.")
        return model, processor, args.dtype or str(model.dtype).removeprefix("torch.")
    if args.compile or args.device not in (None, "cpu"):
        raise ValueError(f"{args.model} is an export, which runs on the CPU: no --compile, and no --device but cpu.")
    exported = load_exported(args.model, args.dtype)
    return exported, DetrImageProcessor.from_pretrained(args.model), args.dtype or exported.export["precision"]


def choose_masks(args: argparse.Namespace, model: Any, *, has_videos: bool) -> SegmentOptions | None:
    """The masks to write; None: boxes only."""
    asked = args.masks or []
    if not model.has_masks or asked == ["none"] or (args.tiling is not None and not asked):
        if set(asked) - {"none"}:
            raise ValueError(f"{args.model} has no masks. Train them: examples/finetune.py --masks.")
        if args.panoptic_threshold is not None:
            raise ValueError("--panoptic_threshold is for panoptic segments, and there are none here: omit it.")
        return None
    if args.tiling is not None:
        raise ValueError("Tiles are merged as boxes: use --tile without --masks, or --masks without --tile.")
    if has_videos and asked:
        raise ValueError("Videos get boxes only: predict them without --masks, apart from images.")
    stuff = frozenset(model.config.stuff_label_ids)
    kinds = tuple(dict.fromkeys(asked)) or ("panoptic" if stuff else "instance",)
    if args.panoptic_threshold is not None and "panoptic" not in kinds:
        raise ValueError("--panoptic_threshold is for panoptic segments: add --masks panoptic, or omit it.")
    return SegmentOptions(kinds, stuff, args.threshold, args.panoptic_threshold)


def predict_images(
    args: argparse.Namespace,
    accelerator: Accelerator,
    job: PredictionJob,
    detector: Any,
    output: OutputFolder,
    segments: SegmentOptions | None,
) -> bool:
    """Predict what is not done. False if no image could be read."""
    barrier = LongBarrier()
    detections_file = output.target / job.detections_file.name
    if accelerator.is_main_process:
        print(*job.notes, sep="\n", end="\n" * bool(job.notes))
    if job.finished:
        if accelerator.is_main_process:
            print(f"Already done, nothing was changed: {detections_file}")
        return not is_unreadable(job)

    if args.engine == "ray":
        detect_with_ray(args, job, detector.model.config, segments)
        return conclude(args, job, detections_file)
    images = job.pending(accelerator.num_processes, accelerator.process_index)
    pictures = job.num_images <= MAX_PICTURES if args.pictures is None else args.pictures
    if pictures:
        job.check_pictures(images)
    barrier.wait()  # no shard is written before all processes have listed the pending images
    stop = StopRequest()
    if detect(args, accelerator, job, detector, images, pictures, stop, segments):
        if accelerator.is_main_process:
            print("Stopped; results so far are in the shards. The same command resumes the job.", flush=True)
        raise SystemExit(stop.exit_code)
    stop.end()
    barrier.wait()  # all shards are written
    return conclude(args, job, detections_file) if accelerator.is_main_process else True


def conclude(args: argparse.Namespace, job: PredictionJob, detections_file: Path) -> bool:
    """Merge the shards and say what was found. False if no image could be read."""
    summary = merge_shards(job)
    print(f"{summary.objects} objects in {summary.images} images: {detections_file}")
    for path, reason in summary.errors:
        print(f"not read: {path}: {reason}")
    if summary.unreadable > len(summary.errors):
        print(f"{summary.unreadable - len(summary.errors)} more could not be read: {job.images_file.name}")
    if summary.images and not summary.objects:
        print(f"No score has reached --threshold {args.threshold}.")
    return summary.images > 0


def detect_with_ray(args: argparse.Namespace, job: PredictionJob, config: Any, segments: SegmentOptions | None) -> None:
    """Predict the pending images on a Ray cluster. Of a model on the Hub, all actors load the commit of this config."""
    if args.pictures is None:
        print("No pictures are drawn with --engine ray.")
    model = Path(args.model)
    predictor = Predictor(
        model.resolve() if model.exists() else args.model,
        threshold=args.threshold,
        batch_size=args.batch_size,
        dtype=args.dtype,
        device=args.device or (None if args.ray_gpus else "cpu"),  # Ray does not hide GPUs that it does not give
        revision=None if model.exists() else getattr(config, "_commit_hash", None),
        top_k=args.top_k,
        masks=() if segments is None else segments.kinds,
        panoptic_threshold=None if segments is None else segments.panoptic_threshold,
    )
    done = job.num_images - len(job.pending())
    with tqdm(total=job.num_images, initial=done, desc="Detecting") as bar:
        predict_with_ray(
            job, predictor, shard_size=args.shard_size, workers=args.ray_workers, cpus=args.ray_cpus,
            gpus=args.ray_gpus, progress=bar.update,
        )  # fmt: skip


def detect(
    args: argparse.Namespace,
    accelerator: Accelerator,
    job: PredictionJob,
    detector: Any,
    images: Any,
    pictures: bool,
    stop: StopRequest,
    segments: SegmentOptions | None,
) -> bool:
    """Predict this process' part of the pending images. True if it was asked to stop before the end."""
    id2label = detector.model.config.id2label
    label2id = {name: index for index, name in id2label.items()}
    if accelerator.is_main_process:
        print(f"{job.num_images} images; ids from {job.ids_from or 'sorted order'}; pictures: {pictures}", flush=True)
    batches = load_batches(
        detector, job.image_folder, images,
        batch_size=args.batch_size, num_workers=args.num_workers, pictures=pictures, tiles=args.tiling is not None,
    )  # fmt: skip
    with (
        ShardWriter(
            job.shards, accelerator.process_index, id2label, args.shard_size, masks=segments is not None
        ) as writer,
        closing(batches),
        tqdm(total=len(images), desc="Detecting", disable=not accelerator.is_main_process) as bar,
    ):
        for batch in batches:
            for prediction in predict_batch(
                detector, batch, args.threshold, args.tiling, args.batch_size, segments, args.top_k
            ):
                if prediction.picture is not None:
                    picture, found = prediction.picture, prediction.segments
                    for kind in ("panoptic", "instance"):
                        if kind in found:
                            picture = draw_masks(picture, **found[kind], id2label=id2label)
                            break
                    if "panoptic" not in found:
                        picture = draw_detections(picture, prediction.objects(id2label), label2id)
                    save_picture(picture, picture_of(job.folder, prediction.file))
                writer.add(prediction)
            bar.update(len(batch))
            if stop.requested:
                return True
    return False


def predict_video(
    args: argparse.Namespace, detector: Any, path: Path, settings: dict[str, Any], output: OutputFolder
) -> None:
    reader = VideoReader(path)
    job = open_video_job(output.path, path, settings, pictures=args.pictures is not False)
    records = output.target / job.records.name
    if job.result is not None:
        print(f"Already done, nothing was changed: {records}")
        return
    stop = StopRequest()
    with reader:
        summary = detect_in_frames(args, job, detector, reader, stop)
    if summary is None:
        print(f"Stopped; there is no video yet. The same command resumes the job: {records}", flush=True)
        raise SystemExit(stop.exit_code)
    stop.end()
    print(f"{summary.objects} objects in {summary.frames} frames: {records}")
    for problem in summary.problems:
        print(f"{path}: {problem}")
    if not summary.frames:
        raise ValueError(f"{path}: no frame could be read.")


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
            predictions = predict_batch(
                detector, batch.images, args.threshold, args.tiling, args.batch_size, top_k=args.top_k
            )
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


def threshold(text: str) -> float | str:
    """The value of --threshold."""
    if text == "per_class":
        return text
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError("a score between 0 and 1, or per_class")
    return value


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="images, folders of images (searched recursively), videos, and URLs of images and videos",
    )
    parser.add_argument(
        "--model",
        required=True,
        help="checkpoint (folder or Hub id), of hf_detr or another detector of transformers, or a folder of export.py",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        metavar="DIR",
        help="default: predictions, or the next free of predictions-2, ...; the same command continues its job",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the results in the output folder when the new ones are done"
    )
    parser.add_argument(
        "--threshold",
        type=threshold,
        default=0.5,
        help="minimum score of a detection, default 0.5; per_class: what evaluate.py --save_thresholds has stored",
    )
    parser.add_argument(
        "--top_k",
        type=int,
        help="most detections per image; default: one per query, or 100 of a model with independent scores",
    )
    parser.add_argument(
        "--masks",
        nargs="+",
        choices=("panoptic", "instance", "none"),
        help="masks to write: panoptic segments, instance masks of objects, or none; default: panoptic if the model "
        "has stuff, otherwise instance; tiles and videos have none",
    )
    parser.add_argument(
        "--panoptic_threshold",
        type=float,
        help="minimum score of a panoptic segment; default: the checkpoint's, or 0.85 if it has none",
    )
    parser.add_argument("--tile", type=int, help="also detect in tiles of this many pixels (for large images)")
    parser.add_argument("--overlap", type=float, default=0.25, help="overlap of tiles, as a fraction of their side")
    parser.add_argument("--batch_size", type=int, default=1, help="images, frames or tiles per forward pass")
    parser.add_argument("--num_workers", type=int, help="reading threads per process; default: 2, and 0 on a CPU")
    parser.add_argument("--shard_size", type=int, default=512, help="images per shard")
    parser.add_argument(
        "--engine",
        choices=("processes", "ray"),
        default="processes",
        help="what distributes the images: the processes of this launch, or a Ray cluster (RAY_ADDRESS), whose nodes "
        "see the folders of images, model and results under the same paths; default: processes",
    )
    parser.add_argument("--ray_workers", type=int, help="actors at most; default: as many as the cluster has room for")
    parser.add_argument("--ray_cpus", type=float, default=1.0, help="CPU cores of an actor, default 1")
    parser.add_argument("--ray_gpus", type=float, default=0.0, help="GPUs of an actor, such as 1 or 0.5; default 0")
    parser.add_argument(
        "--pictures",
        action=argparse.BooleanOptionalAction,
        help=f"draw boxes or masks; default: for up to {MAX_PICTURES:,} images, and for videos",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the computation; default: that of the checkpoint"
    )
    parser.add_argument("--compile", action="store_true", help="use torch.compile; the first images take minutes")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: an accelerator if available")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    try:
        args.tiling = Tiling(args.tile, args.overlap) if args.tile is not None else None
    except ValueError as error:
        parser.error(f"--tile, --overlap: {error}")
    if args.masks and "none" in args.masks and len(args.masks) > 1:
        parser.error("--masks none writes no masks: omit the others.")
    if args.panoptic_threshold is not None and not 0 <= args.panoptic_threshold <= 1:
        parser.error("--panoptic_threshold must be between 0 and 1.")
    for name in ("batch_size", "shard_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1.")
    if args.output_dir is not None and args.output_dir.is_file():
        parser.error(f"--output_dir {args.output_dir} is a file.")
    if args.num_workers is not None and args.num_workers < 0:
        parser.error("--num_workers must not be negative.")
    if args.engine == "ray" and (args.tiling is not None or args.pictures or args.compile):
        parser.error("--engine ray is for boxes and masks of whole images: no --tile, --pictures or --compile.")
    if args.engine != "ray" and (args.ray_workers, args.ray_cpus, args.ray_gpus) != (None, 1.0, 0.0):
        parser.error("--ray_workers, --ray_cpus and --ray_gpus are for --engine ray.")
    if args.ray_cpus < 0 or args.ray_gpus < 0 or (args.ray_workers is not None and args.ray_workers < 1):
        parser.error("--ray_workers must be at least 1, --ray_cpus and --ray_gpus must not be negative.")
    if args.engine == "ray" and (args.num_workers is not None or ":" in (args.device or "")):
        parser.error(
            "--engine ray gives each actor its images and its GPU: no --num_workers, and no --device with a number."
        )
    if args.top_k is not None and args.top_k < 1:
        parser.error("--top_k must be at least 1.")
    return args


if __name__ == "__main__":
    with exit_on_error():
        main()
