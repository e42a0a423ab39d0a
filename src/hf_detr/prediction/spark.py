"""The predictor in Spark."""

import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa

from ..runtime.extras import import_extra
from .predictor import Predictor

# of the columns that are added, in Spark's words; it has no lists of a fixed length
TYPES = {
    "width": "INT", "height": "INT", "scores": "ARRAY<FLOAT>", "labels": "ARRAY<STRING>", "label_ids": "ARRAY<INT>",
    "boxes": "ARRAY<ARRAY<FLOAT>>", "error": "STRING",
    "segments": "ARRAY<STRUCT<kind: STRING, label_id: INT, score: FLOAT, counts: STRING>>",
}  # fmt: skip
BOXES = pa.list_(pa.list_(pa.float32()))


_LAST: dict[bytes, Predictor] = {}  # of a Python worker, which gets the function anew for each task


def _awake(predictor: Predictor) -> Predictor:
    """The predictor with these arguments that this process has used last, with its model."""
    key = pickle.dumps(predictor)
    if key not in _LAST:
        _LAST.clear()
        _LAST[key] = predictor
    return _LAST[key]


def spark_udf(
    predictor: Predictor, schema: Any
) -> tuple[Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]], Any]:
    """What `DataFrame.mapInArrow` takes to detect objects in a data frame:

        images = spark.read.format("binaryFile").load("images/").selectExpr("path", "content AS bytes")
        found = images.mapInArrow(*spark_udf(Predictor("CHECKPOINT"), images.schema))

    The model is loaded once in each Python worker of the executors; give each of these the cores or the GPU that it
    shall use (`spark.task.cpus`, `spark.task.resource.gpu.amount`).

    Args:
        predictor: its column of images has to be one of the data frame.
        schema: of the data frame.

    Returns:
        the function, and the schema of its result: the columns of the data frame, without the content of images, and
        those of [`Predictor`].

    Raises:
        ImportError: PySpark is not installed.
        ValueError: the data frame has no column of images, or one with the name of a column that is added.
    """
    types = import_extra("pyspark.sql.types", "spark")
    source = predictor.source_of(schema.names)
    added = {field.name for field in predictor.fields}
    both = sorted(added.intersection(schema.names))
    if both:
        raise ValueError(f"The data frame has the columns {', '.join(both)}, which the predictor adds. Rename them.")
    kept = [field for field in schema.fields if field.name != source or source == "path"]
    of_result = types.StructType(kept)
    for name in (field.name for field in predictor.fields):
        of_result = of_result.add(name, types._parse_datatype_string(TYPES[name]))

    def predict(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        awake = _awake(predictor)
        for batch in batches:
            table = awake(batch)
            index = table.schema.get_field_index("boxes")
            yield from table.set_column(index, "boxes", table["boxes"].cast(BOXES)).to_batches()

    return predict, of_result
