"""The page itself, in Gradio: its parts, and what leads to what."""

from typing import Any

import gradio as gr
from gradio_image_annotation import image_annotator

from .actions import BOX, EDIT, HINTS, POINT, Actions, forget_folder
from .viewer import MAX_THRESHOLD, MIN_SCORE, TABLE

MAX_FILE_SIZE = "200mb"
CACHE_SECONDS = 6 * 3600  # uploads and pictures are deleted after this time
STYLE = """
#picture img { cursor: crosshair }
#status, #hint { min-height: 1.5em }
footer { display: none !important }
"""


class Page(Actions):
    """See [`~hf_detr.app.serve_page`]."""

    def serve(self, **launch: Any) -> gr.Blocks:
        page = self.build()
        page.launch(
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # nothing is downloaded
            css=STYLE,
            allowed_paths=[str(file.resolve()) for file in self.examples],
            max_file_size=MAX_FILE_SIZE,
            show_error=True,
            **launch,
        )
        return page

    def build(self) -> gr.Blocks:
        with gr.Blocks(title="hf_detr", analytics_enabled=False, delete_cache=(3600, CACHE_SECONDS)) as page:
            state, chosen, edited = (gr.State(None) for _ in range(3))
            folder = gr.State(None, delete_callback=forget_folder)
            gr.Markdown(f"## hf_detr\n{self.viewer.describe()}")
            with gr.Row():
                with gr.Column(scale=3, min_width=320):
                    picture = gr.Image(
                        label="Detections", interactive=False, format="png", buttons=["fullscreen"], elem_id="picture"
                    )
                    video = gr.Video(label="Detections", interactive=False, visible=False, elem_id="video")
                    threshold = gr.Slider(
                        MIN_SCORE,
                        MAX_THRESHOLD,
                        self.threshold,
                        step=0.01,
                        label="Score threshold",
                        elem_id="threshold",
                    )
                    status = gr.Markdown(elem_id="status")
                with gr.Column(scale=2, min_width=300):
                    upload = gr.File(label="Drop an image or a short video", height=130, elem_id="upload")
                    examples = gr.Gallery(
                        [str(file) for file in self.examples],
                        label="Examples",
                        columns=4,
                        height=130,
                        allow_preview=False,
                        visible=bool(self.examples),
                        buttons=[],
                        elem_id="examples",
                    )
                    mode = gr.Radio([BOX, POINT], value=BOX, label="A click shows", elem_id="mode")
                    hint = gr.Markdown(HINTS[BOX], elem_id="hint")
                    why = gr.Image(
                        label="Attention", interactive=False, format="png", visible=False, buttons=[], elem_id="why"
                    )
                    test = gr.Button(
                        "Test whether the detection depends on these locations", visible=False, elem_id="test"
                    )
            curves = gr.Plot(show_label=False, visible=False, elem_id="curves")
            with gr.Tabs():
                with gr.Tab("Detections"):
                    table = gr.Dataframe(
                        headers=list(TABLE), interactive=False, show_label=False, max_height=320, elem_id="table"
                    )
                    with gr.Row():
                        coco = gr.DownloadButton("COCO JSON (also for CVAT)", interactive=False, elem_id="coco")
                        tasks = gr.DownloadButton("Label Studio JSON", interactive=False, elem_id="label-studio")
                with gr.Tab("Correct and learn"):
                    correct = gr.Button(EDIT, elem_id="correct")
                    names = list(self.viewer.names_to_correct.values())
                    editor = image_annotator(
                        label="Boxes: move, resize, delete, or draw new ones",
                        label_list=names,
                        label_colors=[self.viewer.colours[name] for name in names],
                        sources=[],
                        image_type="filepath",
                        boxes_alpha=0.1,
                        box_min_size=2,
                        show_download_button=False,
                        show_share_button=False,
                        show_clear_button=False,
                        show_remove_button=True,
                        elem_id="editor",
                    )
                    gr.Markdown(
                        "Save an image only if every object in it has a box: in training, the rest is background."
                    )
                    save = gr.Button("Save this image", variant="primary", elem_id="save")
                    saved = gr.Markdown(elem_id="saved")
                    archive = gr.DownloadButton("Download the data set", visible=False, elem_id="archive")

            shown = [state, picture, video, status, table, coco, tasks]
            explained = [chosen, hint, why, test, curves]
            arrival = page.load(self.arrive, None, [folder], show_progress="hidden")
            for event, action, given in (
                (arrival.then, self.open_first, [threshold, folder]),
                (examples.select, self.open_example, [threshold, folder]),
                (upload.upload, self.open_upload, [upload, threshold, folder]),
            ):
                event(action, given, shown).then(self.forget, [mode], explained, show_progress="hidden")
            threshold.input(
                self.draw_again,
                [state, threshold, folder],
                [picture, status, table, coco, tasks],
                show_progress="hidden",
                trigger_mode="always_last",
            )
            threshold.release(self.draw_video_again, [state, threshold, folder], [video, status])
            mode.change(self.forget, [mode], explained, show_progress="hidden")
            picture.select(self.click, [state, threshold, mode], explained)
            table.select(self.select_row, [state, threshold], explained)
            test.click(self.test, [state, chosen], [curves, hint])
            correct.click(self.edit, [state, threshold, folder], [edited, editor, saved])
            save.click(self.save, [edited, editor, folder], [saved, archive])
        return page
