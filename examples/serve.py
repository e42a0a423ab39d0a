"""Serve a model over HTTP: requests that arrive together run in one forward pass.

    python examples/serve.py --model CHECKPOINT
    curl --data-binary @image.jpg http://127.0.0.1:8000/predict

`POST /predict` takes an image file as the body, or a form with the field `file`, and answers with a list of `score`,
`label` and `box`, as `pipeline("object-detection")`; `?threshold=0.7` raises the threshold. `GET /health` returns model
and device, `GET /metrics` counts requests, times and batches for Prometheus. It has no authentication and no
encryption: put a proxy in front of it that has them. After SIGTERM it answers the open requests and exits.
"""

import argparse

from hf_detr.prediction import Predictor
from hf_detr.runtime import exit_on_error, import_extra, require_source
from hf_detr.server import build_server
from hf_detr.training import use_all_cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint (folder or Hub id), or a folder of export.py")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all; default 127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="default 8000")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score of a detection, default 0.5")
    parser.add_argument("--batch_size", type=int, default=8, help="images per forward pass at most, default 8")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: that of the weights")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: an accelerator if available")
    parser.add_argument("--max_bytes", type=int, default=20_000_000, help="of a request, default 20 million")
    parser.add_argument("--max_pixels", type=int, default=50_000_000, help="of an image, default 50 million")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds until a request is given up, default 30")
    parser.add_argument("--waiting", type=int, default=64, help="requests that may wait; more get 503; default 64")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    require_source(args.model)
    uvicorn = import_extra("uvicorn", "serve")
    use_all_cores()
    predictor = Predictor(
        args.model, threshold=args.threshold, batch_size=args.batch_size, dtype=args.dtype, device=args.device
    )
    _ = predictor.detector  # a model that cannot be loaded is an error here, before the port is open
    server = build_server(
        predictor,
        max_bytes=args.max_bytes,
        max_pixels=args.max_pixels,
        timeout=args.timeout,
        waiting=args.waiting,
    )
    uvicorn.run(server, host=args.host, port=args.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    with exit_on_error():
        main()
