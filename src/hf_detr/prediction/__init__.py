"""Object detection on folders of any size, distributed over processes and resumable, on videos, and on large images in
tiles. `examples/predict.py` combines the parts; [`DetrDetectionPipeline`] is what `pipeline("object-detection")` uses.
"""

from .detector import open_model
from .drawings import picture_of, save_picture
from .inputs import Inputs, PlannedJobs
from .job import PredictionJob, model_settings, open_job
from .merge import is_unreadable, merge_shards
from .output_folder import OutputFolder
from .predict import load_batches, load_image, predict_batch
from .predictor import Predictor
from .ray_engine import predict_with_ray
from .segments import SegmentOptions
from .shards import ShardWriter
from .spark import spark_udf
from .tiles import Tiling
from .video import VideoReader, load_frames
from .video_job import VideoJob, VideoOutput, VideoSummary, open_video_job

__all__ = [
    "Inputs",
    "OutputFolder",
    "PlannedJobs",
    "PredictionJob",
    "Predictor",
    "SegmentOptions",
    "ShardWriter",
    "Tiling",
    "VideoJob",
    "VideoOutput",
    "VideoReader",
    "VideoSummary",
    "is_unreadable",
    "load_batches",
    "load_frames",
    "load_image",
    "merge_shards",
    "model_settings",
    "open_job",
    "open_model",
    "open_video_job",
    "picture_of",
    "predict_batch",
    "predict_with_ray",
    "save_picture",
    "spark_udf",
]
