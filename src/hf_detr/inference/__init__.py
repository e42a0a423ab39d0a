"""A model over a folder of any size: shared out over processes, written in shards, resumed after a kill; and models as
graphs for other runtimes.

`examples/predict.py` and `examples/export.py` show how the parts go together.
"""

from .export import export_model
from .exported import ExportedDetr, ExportedOutput, is_exported, load_exported
from .images import annotation_ids, category_records, find_images
from .job import PredictionJob, model_settings, open_job
from .merge import Summary, merge_shards
from .predict import LoadedImage, Prediction, load_batches, predict_batch
from .shards import SHARD_SCHEMA, ShardWriter, done_ids, read_shards

__all__ = [
    "SHARD_SCHEMA",
    "ExportedDetr",
    "ExportedOutput",
    "LoadedImage",
    "Prediction",
    "PredictionJob",
    "ShardWriter",
    "Summary",
    "annotation_ids",
    "category_records",
    "done_ids",
    "export_model",
    "find_images",
    "is_exported",
    "load_batches",
    "load_exported",
    "merge_shards",
    "model_settings",
    "open_job",
    "predict_batch",
    "read_shards",
]
