"""A model over a folder of any size: shared out over processes, written in shards, resumed after a kill. Over videos,
too, and over large images in tiles. And models as graphs for other runtimes.

`examples/predict.py` and `examples/export.py` show how the parts go together.
"""

from .image_folder import annotation_ids, category_records, find_images
from .job import PredictionJob, model_settings, open_job
from .merge import Summary, merge_shards
from .predict import LoadedImage, Prediction, load_batches, load_image, predict_batch
from .shards import SHARD_SCHEMA, ShardWriter, done_ids, read_shards
from .tiles import Tiling, merge_views
from .video import VIDEO_SUFFIXES, Frame, FrameBatch, VideoReader, is_video, load_frames
from .video_job import VideoJob, VideoOutput, VideoSummary, open_video_job
from .video_writer import VideoWriter

__all__ = [
    "SHARD_SCHEMA",
    "VIDEO_SUFFIXES",
    "Frame",
    "FrameBatch",
    "LoadedImage",
    "Prediction",
    "PredictionJob",
    "ShardWriter",
    "Summary",
    "Tiling",
    "VideoJob",
    "VideoOutput",
    "VideoReader",
    "VideoSummary",
    "VideoWriter",
    "annotation_ids",
    "category_records",
    "done_ids",
    "find_images",
    "is_video",
    "load_batches",
    "load_frames",
    "load_image",
    "merge_shards",
    "merge_views",
    "model_settings",
    "open_job",
    "open_video_job",
    "predict_batch",
    "read_shards",
]
