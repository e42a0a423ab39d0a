"""A model over a folder of any size: shared out over processes, written in shards, resumed after a kill. Also over
large images in tiles.

`examples/predict.py` shows how the parts go together.
"""

from .images import annotation_ids, category_records, find_images
from .job import PredictionJob, model_settings, open_job
from .merge import Summary, merge_shards
from .predict import LoadedImage, Prediction, load_batches, load_image, predict_batch
from .shards import SHARD_SCHEMA, ShardWriter, done_ids, read_shards
from .tiles import Tiling, merge_views

__all__ = [
    "SHARD_SCHEMA",
    "LoadedImage",
    "Prediction",
    "PredictionJob",
    "ShardWriter",
    "Summary",
    "Tiling",
    "annotation_ids",
    "category_records",
    "done_ids",
    "find_images",
    "load_batches",
    "load_image",
    "merge_shards",
    "merge_views",
    "model_settings",
    "open_job",
    "predict_batch",
    "read_shards",
]
