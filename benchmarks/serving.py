"""Requests per second and times of the server at several numbers of clients, against the pipeline called one by one.

python benchmarks/serving.py --model runs/shapes-1 --side 800
"""

import argparse
import io
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from engines import checkpoint_of_side
from PIL import Image
from transformers import pipeline

from hf_detr.data import draw_shapes_dataset
from hf_detr.training import use_all_cores

SERVE = Path(__file__).parents[1] / "examples" / "serve.py"
CLIENTS = (1, 8, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--side", type=int, default=800, help="shortest side that images are enlarged to")
    parser.add_argument("--requests", type=int, default=96)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = draw_shapes_dataset(folder / "images", num_train=args.requests, num_val=1, progress=False)
        images = [path.read_bytes() for path in sorted((data / "train").iterdir())]
        model = checkpoint_of_side(args.model, args.side, folder / "model")
        use_all_cores()
        detector = pipeline("object-detection", model=str(model), device="cpu")
        detector(Image.open(io.BytesIO(images[0])))
        began = time.perf_counter()
        for image in images:
            detector(Image.open(io.BytesIO(image)))
        print("| | requests/s | p50, ms | p99, ms |\n|---|---|---|---|")
        print(f"| pipeline, one by one | {len(images) / (time.perf_counter() - began):.2f} | | |", flush=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = subprocess.Popen([sys.executable, str(SERVE), "--model", str(model), "--port", str(port)])
        try:
            measure(f"http://127.0.0.1:{port}", images)
        finally:
            server.terminate()
            server.wait()


def measure(address: str, images: list[bytes]) -> None:
    while True:
        try:
            httpx.get(f"{address}/health").raise_for_status()
            break
        except httpx.ConnectError:
            time.sleep(0.2)
    with httpx.Client(base_url=address, timeout=120, limits=httpx.Limits(max_connections=max(CLIENTS))) as client:

        def ask(image: bytes) -> float:
            began = time.perf_counter()
            client.post("/predict", content=image).raise_for_status()
            return 1000 * (time.perf_counter() - began)

        ask(images[0])
        for clients in CLIENTS:
            began = time.perf_counter()
            with ThreadPoolExecutor(clients) as pool:
                times = sorted(pool.map(ask, images))
            rate = len(images) / (time.perf_counter() - began)
            p99 = times[min(len(times) - 1, round(0.99 * len(times)))]
            print(f"| {clients} clients | {rate:.2f} | {statistics.median(times):.0f} | {p99:.0f} |", flush=True)


if __name__ == "__main__":
    main()
