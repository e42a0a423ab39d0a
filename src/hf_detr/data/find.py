"""Which format a folder has, by looking."""

from pathlib import Path

from .formats.coco import find_coco
from .formats.imagefolder import find_imagefolder
from .formats.voc import find_voc
from .formats.yolo import find_yolo
from .source import Source

SPLIT_NAMES = {"val": ("val", "valid", "validation"), "train": ("train", "training")}


def find_source(path: str | Path, split: str) -> Source | None:
    """Read one split of an annotated file or folder; None if there is no such split.

    Looked for, in this order:

    - **COCO**: `annotations/instances_SPLIT*.json`, `SPLIT/_annotations.coco.json` (Roboflow), `SPLIT.json`; a single
      `.json` file, or a folder with only one, is the split "train". Images are looked for beside it and in the usual
      folders.
    - **YOLO**: a `.yaml` file that names splits (`data.yaml`), with labels in `labels/` beside `images/`.
    - **Pascal VOC**: XML files in `Annotations/` with `ImageSets/Main/SPLIT.txt`, or in `SPLIT/`.
    - **imagefolder**: `SPLIT/metadata.jsonl` or, for "train", `metadata.jsonl`, each line with `file_name` and
      `objects`.

    "val" also finds "valid" and "validation".

    Raises:
        ValueError: an annotation file cannot be read; the message names it.
    """
    path = Path(path)
    names = SPLIT_NAMES.get(split, (split,))
    for find in (find_coco, find_yolo, find_voc, find_imagefolder):
        source = find(path, split, names)
        if source is not None:
            return source
    return None
