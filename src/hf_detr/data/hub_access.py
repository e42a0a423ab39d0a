"""How `datasets` gives the splits of a dataset on the Hub or in a folder: on this machine or as streams."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Image, IterableDataset
from datasets.exceptions import DatasetGenerationError

from .formats.imagefolder import METADATA
from .image_files import is_litter
from .schema import DetectionDataset
from .split_names import name_rank
from .webdataset import FEATURES, is_webdataset, read_archives

# names of the column that has the image of segments, beside `segments_info`
MAP_NAMES = ("segmentation_map", "panoptic_map", "panoptic", "segmentation", "mask", "label", "annotation")


def is_hub_format(folder: Path) -> bool:
    """Whether a folder was saved by `save_to_disk`, or holds Parquet files as on the Hub or WebDataset archives."""
    if is_saved(folder) or is_webdataset(folder):
        return True
    files = [file for place in (folder, folder / "data") for file in place.glob("*.parquet")]
    return any(
        "image" in _columns(file) for file in files if file.name.lower() not in METADATA and not is_litter(file.name)
    )


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    is_dataset = all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))
    return is_dataset or (folder / "dataset_dict.json").is_file()


def _columns(file: Path) -> list[str]:
    try:
        names: list[str] = pq.read_schema(file).names
    except (OSError, ValueError):
        return []
    return names


def open_rows(path: str, cache_dir: str | Path | None, *, streaming: bool, **kwargs: Any) -> Mapping[str, Any]:
    """The splits of a dataset by their names. Streams give the files of images, see [`undecoded`].

    Raises:
        FileNotFoundError: there is no such dataset, or it cannot be reached.
    """
    folder = Path(path)
    if not folder.exists() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise FileNotFoundError(f"{path} does not exist.")
    if is_saved(folder):
        loaded = datasets.load_from_disk(path)
        loaded = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
        return {n: undecoded(rows.to_iterable_dataset()) for n, rows in loaded.items()} if streaming else loaded
    cache = None if cache_dir is None else str(cache_dir)
    try:
        builder = datasets.load_dataset_builder(path, cache_dir=cache, **kwargs)
        if builder.name == "webdataset":
            return open_archives(builder, cache, streaming=streaming)
        loaded = datasets.load_dataset(path, streaming=streaming, cache_dir=cache, **kwargs)
        return {name: with_image_column(undecoded(rows) if streaming else rows) for name, rows in loaded.items()}
    except (DatasetGenerationError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path} cannot be read: {error.__cause__ or error}") from error
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{path} is no folder, and no dataset on the Hub that can be reached: {error}"
        ) from error


def open_archives(builder: Any, cache_dir: str | None, *, streaming: bool) -> dict[str, Any]:
    """The splits of a WebDataset, each a shard per archive, or written to the cache."""
    splits: dict[str, Any] = {}
    for name, files in builder.config.data_files.items():
        arguments = {"archives": [str(file) for file in files]}
        if streaming:
            rows = IterableDataset.from_generator(read_archives, features=FEATURES, gen_kwargs=arguments)
        else:
            fingerprint = datasets.fingerprint.Hasher.hash([arguments, files.origin_metadata])
            rows = Dataset.from_generator(
                read_archives, features=FEATURES, gen_kwargs=arguments, fingerprint=fingerprint,
                cache_dir=cache_dir or str(datasets.config.HF_DATASETS_CACHE),
            )  # fmt: skip
        splits[str(name)] = rows
    return splits


def undecoded(rows: IterableDataset) -> IterableDataset:
    """A stream that gives the files of its images. This comes first: any other change of a stream, such as a new name
    of a column, decodes images and encodes them once more, which costs time and, for JPEG, quality."""
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
    return rows


def with_image_column(rows: DetectionDataset) -> DetectionDataset:
    """The dataset, whose only column of images is called `image`, whatever its name was."""
    features = rows.features or {}
    images = [name for name, feature in features.items() if isinstance(feature, Image) and name not in MAP_NAMES]
    return rows.rename_column(images[0], "image") if "image" not in features and len(images) == 1 else rows


def find_split_name(loaded: Mapping[str, Any], split: str) -> str | None:
    """The name that fits a split best."""
    ranked = [(rank, name) for name in loaded if (rank := name_rank(name, split)) is not None]
    return min(ranked)[1] if ranked else None
