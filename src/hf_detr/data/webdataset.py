"""WebDataset archives: `.tar` files in which each image has a `.json` of the same name with its objects.

`datasets` reads such archives, too, but infers the types in `.json` from the first samples and fits all others to them:
after integers, fractions are cut off, and new keys vanish. So only its access to files is used here.
"""

import json
import tarfile
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from datasets import Features, Image, Value
from datasets.utils.file_utils import xopen

from .image_files import IMAGE_SUFFIXES, is_litter

END: type[Exception] = vars(tarfile)["EOFHeaderError"]  # the empty block that `tar` writes at the end
OBJECTS = ("objects", "annotations")  # what a `.json` calls its objects
FEATURES = Features({"image": Image(decode=False), "json": Value("string")})


def is_webdataset(folder: Path) -> bool:
    """Whether archives in a folder, or in its folders such as `train/`, begin with an image and its `.json`."""
    archives = sorted(file for pattern in ("*.tar", "*/*.tar") for file in folder.glob(pattern))
    return any(map(_begins_with_a_sample, islice((file for file in archives if not is_litter(file.name)), 3)))


def _begins_with_a_sample(archive: Path) -> bool:
    try:
        with tarfile.open(archive) as tar:
            members = list(islice((member for member in tar if member.isfile()), 2))
            texts = [tar.extractfile(member) for member in members if member.name.lower().endswith(".json")]
            objects_of(texts[0].read() if texts and texts[0] else "")
    except (OSError, tarfile.TarError, ValueError):
        return False
    return len({_split_name(member.name)[0] for member in members}) == 1


def read_archives(archives: list[str]) -> Iterator[dict[str, Any]]:
    """Image file and text of the `.json` of each sample; of further files nothing. A sample without one of the two has
    None, which is reported by who uses it.

    Args:
        archives: paths or addresses.
    """
    for archive in archives:
        sample: dict[str, Any] = {}
        key = None
        for name, content in _members(archive):
            new, suffix = _split_name(name)
            if new is None:
                continue
            if new != key and sample:
                yield {"image": None, "json": None} | sample
            key, sample = new, sample if new == key else {}
            part = "json" if suffix == ".json" else "image" if suffix in IMAGE_SUFFIXES else None
            if part in sample:
                raise ValueError(f"{archive} has two files for the {part} of {new}: {name} is the second.")
            if part == "json":
                sample["json"] = content.decode("utf-8", errors="replace")
            elif part == "image":
                sample["image"] = {"bytes": content, "path": f"{new}{suffix}"}
        if sample:
            yield {"image": None, "json": None} | sample


class _StrictHeader(tarfile.TarInfo):
    """The header of a file in an archive. `tarfile` takes a damaged or missing one for the end of the archive; here
    only the end that `tar` writes is one."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_StrictHeader":
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if isinstance(error, END):
                raise
            raise tarfile.ReadError(str(error)) from error


def _members(archive: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of all files in an archive.

    Raises:
        ValueError: it is cut off or damaged.
    """
    last = ""
    try:
        with xopen(archive, "rb") as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=_StrictHeader) as tar:
            for member in tar:
                if member.isfile() and (content := tar.extractfile(member)) is not None:
                    yield member.name, content.read()
                    last = f" after {member.name}"
                vars(tar)["members"] = []  # a long archive would fill the memory
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{archive} is cut off or damaged{last} ({error}). Copy or write it again.") from error


def _split_name(name: str) -> tuple[str | None, str]:
    """The name of the sample, which ends at the first point as in WebDataset, and the rest, such as `.jpg` of an image
    and `.seg.png` of another file; no name for litter."""
    path = PurePosixPath(name)
    if is_litter(path.name):
        return None, ""
    stem, point, rest = path.name.partition(".")
    return str(path.with_name(stem)), (point + rest).lower()


def unpack_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with what its `json` has: `objects` and, where present, `file_name` and `image_id`.

    Raises:
        ValueError: there is none, or it cannot be parsed.
    """
    if row["json"] is None:
        raise ValueError("there is no .json of this name")
    if row["image"] is None:
        raise ValueError("there is no image of this name (names end at the first point)")
    content = json.loads(row["json"])
    about = content if isinstance(content, Mapping) else {}
    return {"image": row["image"], "objects": objects_of(row["json"])} | {
        name: about[name] for name in ("file_name", "image_id") if name in about
    }


def objects_of(text: str | bytes) -> Any:
    """The objects in a `.json`: under one of `OBJECTS`, or all of it.

    Raises:
        ValueError: it has none. An image without objects has an empty list of them.
    """
    content = json.loads(text)
    if isinstance(content, Mapping):
        for name in OBJECTS:
            if content.get(name) is not None:
                return content[name]
    if isinstance(content, list) or (isinstance(content, Mapping) and content.get("bbox") is not None):
        return content
    raise ValueError(f"its .json has none of the keys {', '.join(OBJECTS)}, and is no list of objects")
