"""An annotated folder: its files, listed once, and how the files that annotations name are found among them."""

import hashlib
import os
import re
import unicodedata
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from .image_files import IMAGE_SUFFIXES, is_litter, walk_files
from .split_names import split_of, split_of_folder

ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".rar", ".7z")
IMAGE_FOLDERS = ("JPEGImages", "images", "imgs", "img", "data")  # the names of folders of images, in lower case, too
GENERAL_FOLDERS = {*(name.lower() for name in IMAGE_FOLDERS), "image", "upload", "pictures", "photos"}
DESCRIPTIONS = (".yaml", ".yml", ".data")
ANNOTATION_FOLDERS = ("annotations", "annotation", "labels")  # images are beside these folders, and not inside
INSIGNIFICANT = (".md", ".txt", ".zip", ".html", "")  # suffixes of files beside the one folder that holds the dataset


class DatasetFolder:
    """Where a dataset is.

    Args:
        path: a folder, or one annotation file, which is then the training split. A folder that only holds another one
            stands for that one.
        files: annotation files (or folders) by split, in place of a search of `path`.
        images: the folder of the images, if it is not where they are usually looked for.

    Attributes:
        path: the folder that is searched, for images also where annotation files were named.
        description: a YOLO `.yaml` or `.data` file that was named: it stands for all of its splits.

    Raises:
        FileNotFoundError: one of the paths does not exist.
        ValueError: `path` is an archive.
    """

    def __init__(
        self, path: str | Path, files: Mapping[str, str | Path] | None = None, images: str | Path | None = None
    ) -> None:
        given = Path(path)
        self.description: Path | None = None
        self.files_given = {split: Path(file) for split, file in (files or {}).items()}
        self.images_given = None if images is None else Path(images)
        for place in (given, *self.files_given.values(), self.images_given):
            if place is not None and not place.exists():
                raise FileNotFoundError(f"{place} does not exist.")
        if given.is_file():
            if given.suffix.lower() in ARCHIVES:
                raise ValueError(f"{given} is an archive. Unpack it, and name the folder.")
            if given.suffix.lower() in DESCRIPTIONS:
                self.description = given
            else:
                self.files_given.setdefault("train", given)
            beside = given.parent
            self.path = beside.parent if beside.name.lower() in ANNOTATION_FOLDERS else beside
        else:
            self.path = _only_folder(given)

    @property
    def is_searched(self) -> bool:
        """Whether splits are looked for, because no annotation file of the training split was given."""
        return "train" not in self.files_given

    @cached_property
    def files(self) -> list[Path]:
        """All files below the folder, and below that of the images, sorted; without litter."""
        found = sorted(walk_files(self.path))
        if self.images_given is not None and not self.images_given.resolve().is_relative_to(self.path.resolve()):
            found += sorted(walk_files(self.images_given))
        return found

    @cached_property
    def images(self) -> list[Path]:
        """All image files, without the PNGs of COCO's panoptic format, which are called like the images: those in a
        folder beside a JSON file of its name, `panoptic_train/` and `panoptic_train.json`."""
        jsons = (path for path in self.files if path.suffix.lower() == ".json" and "panoptic" in path.name.lower())
        maps = {path.with_suffix("") for path in jsons}
        return [path for path in self.files if path.suffix.lower() in IMAGE_SUFFIXES and path.parent not in maps]

    @cached_property
    def image_folders(self) -> list[Path]:
        """The folders that have images, sorted."""
        return [Path(place) for place in sorted({os.path.dirname(path) for path in self.images})]

    @cached_property
    def image_stems(self) -> set[str]:
        """The names of all images without their suffix."""
        return {_key(path.stem) for path in self.images}

    def of_type(self, *suffixes: str, depth: int = 4) -> list[Path]:
        """Files with one of these suffixes in any case, at most `depth` folders deep; nearest to the top first."""
        found = [path for path in self.files if path.suffix.lower() in suffixes]
        depths = {path: len(path.relative_to(self.path).parts) for path in found if path.is_relative_to(self.path)}
        return sorted((path for path, deep in depths.items() if deep <= depth), key=lambda path: (depths[path], path))

    def find_image(self, name: str, split: str, near: Sequence[Path]) -> Path | None:
        """The image file that annotations of a split call `name`: a path in one of the folders `near`, or else the one
        image whose path ends most like `name`. Slashes are unified, the server of a URL and the letter of a drive are
        dropped, and case, the form of accents and, where `name` has none, the suffix do not matter. An image in the
        folder of another split is taken only if `name` has that folder; and where `name` has a folder, one in another
        folder is taken only if that says nothing, as `images` does.

        Returns:
            None if there is no such image, or several that fit equally well.
        """
        for place in near:
            candidate = os.path.join(place, name)
            if os.path.isfile(candidate):
                return Path(candidate)
        parts = path_parts(name)
        if not parts:
            return None
        wanted = [_key(part) for part in parts]
        candidates = self._images_by_name.get(wanted[-1]) or self._images_by_stem.get(wanted[-1], [])
        best: list[Path] = []
        longest = 0
        for path in candidates:
            length = self._common_end(path, wanted, split)
            if length > longest:
                best, longest = [path], length
            elif length == longest and length:
                best.append(path)
        if len(best) != 1 or (longest == 1 < len(wanted) and not self._says_nothing(best[0].parent)):
            return None
        return best[0]

    def _says_nothing(self, place: Path) -> bool:
        """Whether a folder of images tells nothing about them that could contradict the folder in a name."""
        is_root = place in (self.path, self.images_given)
        return is_root or place.name.lower() in GENERAL_FOLDERS or split_of_folder(place.name) is not None

    def find_stem(self, stem: str, split: str, near: Sequence[Path]) -> Path | None:
        """The image with this name without its suffix: in one of the folders `near`, or else the only one."""
        candidates = self._images_by_stem.get(_key(stem), [])
        for place in near:
            inside = [path for path in candidates if path.parent == place]
            if inside:
                return inside[0]
        candidates = [path for path in candidates if self._common_end(path, [_key(path.name)], split)]
        return candidates[0] if len(candidates) == 1 else None

    def find_place(self, name: str, near: Sequence[Path]) -> Path | None:
        """The file or folder that is called `name`, in one of the folders `near`: as it is, or by the longest end of
        its path that exists, for paths of another machine."""
        for place in near:
            if os.path.exists(place / name):
                return place / name
        parts = path_parts(name)
        for start in range(len(parts)):
            for place in near:
                end = place.joinpath(*parts[start:])
                if end.exists():
                    return end
        return None

    def state(self, files_elsewhere: Iterable[Path] = ()) -> str:
        """A digest of the names, sizes and times of all files, which changes when the folder does."""
        digest = hashlib.sha256()
        given = sorted(self.files_given.values())
        inside = [file for place in given if place.is_dir() for file in sorted(walk_files(place))]
        for file in (*self.files, *given, *inside, *files_elsewhere):
            try:
                stat = file.stat()
            except OSError:  # deleted meanwhile, or a label file that an image does not have
                continue
            digest.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    @cached_property
    def _images_by_name(self) -> dict[str, list[Path]]:
        return _grouped((_key(path.name), path) for path in self.images)

    @cached_property
    def _images_by_stem(self) -> dict[str, list[Path]]:
        return _grouped((_key(path.stem), path) for path in self.images)

    def _common_end(self, path: Path, wanted: list[str], split: str) -> int:
        """Number of parts at the end of both paths that are equal; 0 if the rest of `path` is in another split."""
        root = self.path if path.is_relative_to(self.path) else self.images_given or path.parent
        own = path.relative_to(root).parts
        length = 1
        while length < min(len(own), len(wanted)) and _key(own[-1 - length]) == wanted[-1 - length]:
            length += 1
        splits = {split_of_folder(part) for part in own[:-length]} - {None}
        return 0 if split_of(split) and splits and split not in splits else length


def path_parts(name: str) -> list[str]:
    """The parts of a path as any system or server writes it, without drive, server, `.` and `..`."""
    if re.match(r"[a-zA-Z][\w+.-]+://", name):
        url = urllib.parse.urlsplit(name)
        query = urllib.parse.parse_qs(url.query).get("d", [])  # Label Studio's local files
        name = urllib.parse.unquote(query[0] if query else url.path)
    elif name.startswith("/data/local-files/?d="):
        name = urllib.parse.unquote(name.partition("?d=")[2])
    name = re.sub(r"^[a-zA-Z]:(?=[\\/])", "", name)
    return [part for part in re.split(r"[\\/]+", name) if part not in ("", ".", "..")]


def _key(name: str) -> str:
    """One form of a file name for all systems."""
    return unicodedata.normalize("NFC", name).casefold()


def _grouped(pairs: Iterable[tuple[str, Path]]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for key, path in pairs:
        groups.setdefault(key, []).append(path)
    return groups


def _only_folder(folder: Path) -> Path:
    """The folder, or the one inside it if it holds nothing else, as archives are often unpacked. A folder that is
    named after a split is content."""
    while True:
        entries = [entry for entry in folder.iterdir() if not is_litter(entry.name)]
        inner = [entry for entry in entries if entry.is_dir()]
        others = [entry for entry in entries if not entry.is_dir() and entry.suffix.lower() not in INSIGNIFICANT]
        if len(inner) != 1 or others or split_of(inner[0].name) or _has_lists(entries):
            return folder
        folder = inner[0]


def _has_lists(entries: list[Path]) -> bool:
    """Whether there are text files that mean something beside a folder: lists of a split, or of classes."""
    texts = [entry.stem for entry in entries if entry.suffix.lower() == ".txt"]
    return any(split_of(stem) or stem.lower() in ("classes", "labels", "names", "obj") for stem in texts)
