"""List the parts of a model in the order of the paper's figure 2: what they return, parameters, FLOPs and times.

    python examples/describe.py CHECKPOINT
    python examples/describe.py CHECKPOINT --height 640 --width 480 --batch_size 4

CHECKPOINT is a folder or a Hub id. A multiplication with an addition counts as two operations; papers usually
count one. Times are measured on this machine, in the dtype of the weights or --dtype, without `prepare_for_inference`.
"""

import argparse

import torch

from hf_detr import DetrImageProcessor
from hf_detr.interop import load_model
from hf_detr.runtime import exit_on_error, require_source
from hf_detr.training import use_all_cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint, a folder or a Hub id")
    parser.add_argument(
        "--height", type=int, help="of the images, in pixels; default: as the processor resizes 480 x 640"
    )
    parser.add_argument("--width", type=int, help="the same for the width")
    parser.add_argument("--batch_size", type=int, default=1, help="number of images, default 1")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: that of the weights")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    require_source(args.model)
    model = load_model(args.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        use_all_cores()
    model = model.to(device, getattr(torch, args.dtype) if args.dtype else model.dtype)
    processor = DetrImageProcessor.from_pretrained(args.model)
    like = torch.zeros(model.config.num_channels, 480, 640, dtype=torch.uint8)
    resized = processor(like, do_pad=False, input_data_format="channels_first")["pixel_values"][0].shape[-2:]
    height, width = args.height or resized[0], args.width or resized[1]
    images = torch.zeros(args.batch_size, model.config.num_channels, height, width, device=device, dtype=model.dtype)
    print(model.describe(images))


if __name__ == "__main__":
    with exit_on_error():
        main()
