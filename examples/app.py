"""Look at a model in the browser: what it finds, where each query attends, and corrections to train on.

    python examples/app.py --model runs/shapes-1
    python examples/app.py --model CHECKPOINT --examples FOLDER --corrections my-corrections

CHECKPOINT is a folder or a Hub id. Drop an image or a short video, move the threshold, click a box for the attention of
its query, and test whether the detection depends on it. Corrected images are saved as a COCO data set with their files;
the page shows the command that trains on it. `push_to_hub.py --space` makes a Space of it.

Needs Gradio: pip install "hf_detr[app]"
"""

import argparse
import os
import tempfile
from pathlib import Path

from hf_detr.app import Viewer, example_images, serve_page
from hf_detr.runtime import exit_on_error, import_extra, prepare_output, require_source
from hf_detr.training import use_all_cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint, a folder or a Hub id")
    parser.add_argument(
        "--examples", type=Path, help="image or folder to start with; default: drawn ones if the model detects shapes"
    )
    parser.add_argument(
        "--corrections",
        type=Path,
        default=None if "SPACE_ID" in os.environ else Path("corrections"),
        help="folder of corrected images, default corrections; in a Space each visitor has one to download",
    )
    parser.add_argument("--threshold", type=float, default=0.5, help="of the scores at the start, default 0.5")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves other machines, too; default 127.0.0.1")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if not 0.05 <= args.threshold <= 0.99:
        parser.error("--threshold must be between 0.05 and 0.99.")
    if args.examples and not args.examples.exists():
        parser.error(f"There is no {args.examples}.")
    require_source(args.model)
    import_extra("gradio", "app")
    if args.corrections is not None:
        prepare_output(args.corrections, folder=True)
    use_all_cores()
    with tempfile.TemporaryDirectory() as drawn:
        viewer = Viewer(args.model, args.device)
        examples = example_images(viewer, args.examples, Path(drawn))
        host = None if "SPACE_ID" in os.environ else args.host
        serve_page(viewer, examples, args.corrections, args.threshold, server_name=host, server_port=args.port)


if __name__ == "__main__":
    with exit_on_error():
        main()
