"""What happens when a visitor of the page uses its parts."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from ..prediction.video import is_video
from ..visualization.draw import CORNERS
from .corrections import CorrectedBox, Corrections
from .viewed_video import FoundVideo, detect_in_video, draw_video
from .viewer import Viewed, Viewer, gone

BOX, POINT = "where the query of a box attends", "the encoder's attention from a point"
HINTS = {
    BOX: "Click a box, or a row of the table.",
    POINT: "Click a point of the picture.",
}
EDIT = "Edit the detections above the threshold"
ARCHIVE = "corrections"  # what the downloaded data set is called in the command that trains on it


class Actions:
    """The functions of a page. Each visitor has a state, which is a [`Viewed`], a [`FoundVideo`] or None, and a folder,
    which is deleted after they have left. What each function returns are the values of parts of the page."""

    def __init__(self, viewer: Viewer, examples: Sequence[Path], corrections: Path | None, threshold: float) -> None:
        self.viewer, self.examples, self.threshold = viewer, list(examples), threshold
        self.corrections = None if corrections is None else Corrections(corrections, viewer.names_to_correct)
        self._temporary = tempfile.TemporaryDirectory(prefix="hf-detr-")  # deleted with the page

    def arrive(self) -> str:
        """The folder of a visitor."""
        return tempfile.mkdtemp(dir=self._temporary.name)

    # -- an image or a video ---------------------------------------------------------------------------------------

    def open_upload(
        self,
        file: str | None,
        threshold: float,
        folder: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Any, ...]:
        return self._open(None if file is None else Path(file), threshold, folder, progress)

    def open_example(self, threshold: float, folder: str, event: gr.SelectData) -> tuple[Any, ...]:
        return self._open(self.examples[event.index], threshold, folder)

    def open_first(self, threshold: float, folder: str) -> tuple[Any, ...]:
        return self._open(self.examples[0] if self.examples else None, threshold, folder)

    def _open(self, file: Path | None, threshold: float, folder: str, progress: Any = None) -> tuple[Any, ...]:
        picture, video = gr.Image(None, visible=True), gr.Video(None, visible=False)
        state: Viewed | FoundVideo | None = None
        message = ""
        try:
            if file is not None and is_video(file):
                state = detect_in_video(self.viewer, file, file.name, progress)
                drawn, message = self._draw_video(state, threshold, folder)
                picture, video = gr.Image(None, visible=False), gr.Video(drawn, visible=True)
            elif file is not None:
                state = self.viewer.view(file)
        except (ValueError, ImportError, OSError) as error:
            message = f"⚠ {error}"
        if isinstance(state, Viewed):
            drawn_picture, message, *others = self.draw_again(state, threshold, folder)
            return state, gr.Image(drawn_picture, visible=True), video, message, *others
        return state, picture, video, message, [], *(gr.DownloadButton(value=None, interactive=False) for _ in range(2))

    def draw_again(self, state: Any, threshold: float, folder: str) -> tuple[Any, ...]:
        """Picture, status, table and downloads of another threshold, from the same predictions."""
        if not isinstance(state, Viewed):
            return gr.skip(), gr.skip(), gr.skip(), gr.skip(), gr.skip()
        width, height = state.picture.size
        above = len(state.above(threshold))
        message = (
            f"{state.name}, {width} x {height} pixels: {_count(above, 'detection', 'detections')} above "
            f"{threshold:.2f}, {len(state.detections) - above} below; {1000 * state.seconds:.0f} ms"
        )
        name = Path(folder, Path(state.name).stem)
        files = (
            self.viewer.save_coco(state, threshold, Path(f"{name}.coco.json")),
            self.viewer.save_label_studio(state, threshold, Path(f"{name}.label-studio.json")),
        )
        downloads = [gr.DownloadButton(value=str(file), interactive=True) for file in files]
        return self.viewer.draw(state, threshold), message, state.rows(threshold), *downloads

    def draw_video_again(self, state: Any, threshold: float, folder: str) -> tuple[Any, Any]:
        if not isinstance(state, FoundVideo):
            return gr.skip(), gr.skip()
        try:
            return self._draw_video(state, threshold, folder)
        except (ValueError, OSError) as error:
            return gr.skip(), f"⚠ {error}"

    def _draw_video(self, found: FoundVideo, threshold: float, folder: str) -> tuple[str, str]:
        target = Path(folder, f"{found.file.stem}.mp4")
        problems = draw_video(self.viewer, found, threshold, target)
        above = sum(d["score"] > threshold for objects in found.objects for d in objects)
        counted = _count(above, "detection", "detections"), _count(len(found.objects), "frame", "frames")
        message = f"{found.name}: {counted[0]} above {threshold:.2f} in {counted[1]}"
        return str(target), "; ".join([message, *problems])

    # -- why -------------------------------------------------------------------------------------------------------

    def forget(self, mode: str) -> tuple[Any, ...]:
        """Nothing is chosen."""
        return self._explain(HINTS[mode])

    def _explain(self, hint: str, why: Any = None, chosen: int | None = None) -> tuple[Any, ...]:
        return (
            chosen,
            hint,
            gr.Image(why, visible=why is not None),
            gr.Button(visible=chosen is not None),
            gr.Plot(None, visible=False),
        )

    def click(self, state: Any, threshold: float, mode: str, event: gr.SelectData) -> tuple[Any, ...]:
        if not isinstance(state, Viewed):
            return self.forget(mode)
        x, y = (
            min(position / state.scale, side - 1)
            for position, side in zip(event.index, state.picture.size, strict=True)
        )
        if mode == BOX:
            index = state.at(x, y, threshold)
            return self._explain("There is no box at this point.") if index is None else self._box(state, index)
        try:
            picture = self.viewer.attention(state).draw_points([(x, y)], 1)
        except ValueError as error:
            return self._explain(f"⚠ {error}")
        return self._explain(f"Encoder self-attention from ({x:.0f}, {y:.0f}), mean of all heads.", picture)

    def select_row(self, state: Any, threshold: float, event: gr.SelectData) -> tuple[Any, ...]:
        row = event.index[0]
        if not isinstance(state, Viewed) or row >= len(state.above(threshold)):
            return self.forget(BOX)
        return self._box(state, row)

    def _box(self, viewed: Viewed, index: int) -> tuple[Any, ...]:
        detection = viewed.detections[index]
        text = f"{detection['label']} {detection['score']:.2f}: cross-attention of the last decoder layer, per head."
        try:
            return self._explain(text, self.viewer.attention_of(viewed, index), index)
        except ValueError as error:
            return self._explain(f"⚠ {error}")

    def test(self, state: Any, chosen: int | None, progress: gr.Progress = gr.Progress()) -> tuple[Any, str]:  # noqa: B008
        """Deletion and insertion curves."""
        if not isinstance(state, Viewed) or chosen is None:
            return gr.skip(), gr.skip()
        progress(0, desc="Blurred images")
        try:
            explanation = self.viewer.test(state, chosen)
        except (ValueError, ImportError) as error:
            return gr.skip(), f"⚠ {error}"
        return gr.Plot(explanation.figure(), visible=True), explanation.describe()

    # -- correct and learn -----------------------------------------------------------------------------------------

    def edit(self, state: Any, threshold: float, folder: str) -> tuple[Any, Any, str]:
        """The image that is edited from now on, also when another one is looked at, and its boxes for the editor."""
        if not isinstance(state, Viewed):
            return None, None, "Choose an image first."
        if not state.file.is_file():
            return None, None, f"⚠ {gone(state.name)}"
        try:
            saved = self._corrections_of(folder).boxes_of(state.file)
        except ValueError as error:
            return None, None, f"⚠ {error}"
        message = "" if saved is None else f"{state.name} was saved before; these are its saved boxes."
        names = set(self.viewer.names_to_correct.values())
        found = (
            CorrectedBox(detection["label"], tuple(detection["box"][corner] for corner in CORNERS))
            for detection in state.above(threshold)
        )
        boxes = [
            dict(zip(CORNERS, (round(value * state.scale) for value in box.corners), strict=True))
            | {"label": box.label, "color": self.viewer.colours[box.label]}
            for box in (found if saved is None else saved)
            if box.label in names
        ]
        size = [round(side * state.scale) for side in state.picture.size]
        return replace(state, maps=None, masks=None), {"image": state.picture.resize(size), "boxes": boxes}, message

    def save(self, edited: Any, drawn: Any, folder: str) -> tuple[str, Any]:
        if not isinstance(edited, Viewed) or drawn is None:
            return f"Press “{EDIT}” first.", gr.skip()
        if drawn.get("orientation"):
            return "⚠ Rotate the image back to its original orientation before saving.", gr.skip()
        corrections = self._corrections_of(folder)
        try:
            if not edited.file.is_file():
                raise ValueError(gone(edited.name))
            boxes = [
                CorrectedBox(box.get("label") or "", tuple(box[corner] / edited.scale for corner in CORNERS))
                for box in drawn["boxes"]
            ]
            again = corrections.save(edited.file, edited.name, boxes)
        except (ValueError, OSError) as error:
            return f"⚠ {error}", gr.skip()
        number, shared = corrections.num_images, self.corrections is not None
        replaced = " (its earlier boxes were replaced)" if again else ""
        place = f"`{corrections.folder}`" if shared else f"the data set below; unpack it as `{ARCHIVE}`"
        masks = (
            " The model has masks, and corrections have none: this trains its boxes." if self.viewer.has_masks else ""
        )
        message = (
            f"Saved {edited.name} with {_count(len(boxes), 'box', 'boxes')}{replaced}. There "
            f"{'is' if number == 1 else 'are'} {_count(number, 'image', 'images')} in {place}. To train on them (at "
            f"least 2; 15 % are used for validation):{masks}\n\n```bash\n"
            f"{corrections.command(self.viewer.source, None if shared else ARCHIVE)}\n```"
        )
        if shared:
            return message, gr.skip()
        archive = corrections.zip(Path(folder, f"{ARCHIVE}.zip"))
        return message, gr.DownloadButton(value=str(archive), visible=True)

    def _corrections_of(self, folder: str) -> Corrections:
        if self.corrections is not None:
            return self.corrections
        return Corrections(Path(folder, ARCHIVE), self.viewer.names_to_correct)


def forget_folder(folder: str | None) -> None:
    """Delete the folder of a visitor who has left."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"
