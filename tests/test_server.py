"""The HTTP server: detections, limits, load, and its end."""

import asyncio
import io
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import save_tiny_checkpoint
from PIL import Image
from transformers import pipeline

from hf_detr.server.request_batches import QueueIsFullError, RequestBatches

ROOT = Path(__file__).parents[1]
NAMES = dict(enumerate(["cat", "dog", "cow"]))
pytestmark = pytest.mark.xdist_group("server")


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def start(model, *arguments):
    """The server as a process of its own, as its user starts it, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "examples" / "serve.py"), "--model", str(model), "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--threshold", "0.2", *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    address = f"http://127.0.0.1:{port}"
    until = time.monotonic() + 120
    while True:
        try:
            httpx.get(f"{address}/health")
            return process, address
        except httpx.ConnectError:
            assert process.poll() is None, process.stdout.read().decode()
            assert time.monotonic() < until
            time.sleep(0.1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), NAMES)


@pytest.fixture(scope="module")
def server(checkpoint):
    process, address = start(checkpoint, "--max_bytes", "200000", "--max_pixels", "20000", "--batch_size", "4")
    yield address
    process.terminate()
    assert process.wait(20) == 0 or process.returncode == -signal.SIGTERM


def test_answers_are_those_of_the_pipeline(server, checkpoint):
    detector = pipeline("object-detection", model=str(checkpoint), device="cpu")
    image = picture(80, 60)
    expected = detector(image, threshold=0.2, round_boxes=False)
    assert expected
    answers = [
        httpx.post(f"{server}/predict", content=encoded(image)),
        httpx.post(f"{server}/predict", files={"file": ("a.png", encoded(image), "image/png")}),
    ]
    for answer in answers:
        assert answer.status_code == 200
        for mine, theirs in zip(answer.json(), expected, strict=True):
            assert mine["label"] == theirs["label"]
            assert mine["score"] == pytest.approx(theirs["score"], abs=1e-5)
            assert mine["box"] == pytest.approx(theirs["box"], abs=1e-2)
    middle = sorted(entry["score"] for entry in expected)[len(expected) // 2]
    raised = httpx.post(f"{server}/predict", params={"threshold": middle}, content=encoded(image)).json()
    assert raised == [entry for entry in answers[0].json() if entry["score"] > middle]
    health = httpx.get(f"{server}/health").json()
    assert health["status"] == "ok"
    assert (health["device"], health["classes"]) == ("cpu", 3)


@pytest.mark.parametrize(
    ("request_of", "status", "reason"),
    [
        ({"content": b""}, 400, "cannot be read"),
        ({"content": b"GIF89a but not really"}, 400, "cannot be read"),
        ({"content": encoded(picture(100, 100), "JPEG")[:900]}, 400, "cannot be read"),
        ({"content": b"x" * 300_000}, 413, "more than 200,000 bytes"),
        ({"content": encoded(Image.new("L", (200, 200)))}, 413, "200 x 200 pixels"),
        ({"content": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"}, 400, "JPEG, PNG"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "boundary"),
        ({"files": {"other": b"x"}}, 400, 'no file in the field "file"'),
        ({"content": b"x", "params": {"threshold": "high"}}, 400, "must be a number"),
        ({"content": b"x", "params": {"threshold": "0.1"}}, 400, "server's 0.2 and 1"),
        ({"content": b"x", "params": {"threshold": "nan"}}, 400, "server's 0.2 and 1"),
        ({"content": b"--x", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400, ""),
    ],
)
def test_what_cannot_be_served_gets_a_status_and_a_sentence(server, request_of, status, reason):
    answer = httpx.post(f"{server}/predict", **request_of)
    assert answer.status_code == status, answer.text
    assert reason in answer.json()["error"]


def test_a_thousand_malformed_requests_leave_it_as_it_was(server):
    generator = np.random.default_rng(0)
    image = encoded(picture(60, 50))
    with httpx.Client(base_url=server) as client:
        for number in range(1000):
            damaged = bytearray(image[: generator.integers(1, len(image))])
            damaged[generator.integers(0, min(8, len(damaged)))] ^= 255
            answer = client.post("/predict", content=bytes(damaged))
            assert 400 <= answer.status_code < 500, (number, answer.text)
        assert client.post("/predict", content=image).status_code == 200
        figures = client.get("/metrics").text
    assert int(figures.split('requests_total{status="400"} ')[1].split()[0]) >= 1000


def test_requests_that_arrive_together_share_forward_passes_and_get_their_own_answers(server):
    images = [encoded(picture(60 + 4 * (number % 3), 50, number)) for number in range(48)]
    with httpx.Client(base_url=server, timeout=60) as client:
        alone = [client.post("/predict", content=image).json() for image in images]
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda image: client.post("/predict", content=image), images))
        figures = client.get("/metrics").text
    assert {answer.status_code for answer in answers} == {200}
    for answer, expected in zip(answers, alone, strict=True):
        assert [entry["label"] for entry in answer.json()] == [entry["label"] for entry in expected]
        for mine, other in zip(answer.json(), expected, strict=True):
            assert mine["score"] == pytest.approx(other["score"], abs=1e-4)
    sizes = [line for line in figures.splitlines() if line.startswith("hf_detr_batches_total")]
    assert any('size="1"' not in line for line in sizes), sizes


def test_nothing_is_lost_when_it_is_killed_and_started_again_under_load(checkpoint):
    """A client that asks again until it is answered gets every answer once."""
    first, address = start(checkpoint)
    images = [encoded(picture(60, 50, number)) for number in range(40)]
    answers = {}

    def ask(number):
        while True:
            try:
                answer = httpx.post(f"{address}/predict", content=images[number], timeout=30)
            except httpx.TransportError:
                time.sleep(0.05)
                continue
            assert answer.status_code == 200
            answers[number] = answer.json()
            return

    with ThreadPoolExecutor(4) as pool:
        work = [pool.submit(ask, number) for number in range(len(images))]
        while len(answers) < 5:
            time.sleep(0.01)
        first.kill()
        first.wait()
        port = address.rpartition(":")[2]
        again = subprocess.Popen(
            [sys.executable, str(ROOT / "examples" / "serve.py"), "--model", str(checkpoint), "--port", port,
             "--threshold", "0.2"],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        for future in work:
            future.result(120)
    assert sorted(answers) == list(range(40))
    again.send_signal(signal.SIGTERM)
    assert again.wait(20) in (0, -signal.SIGTERM)


def test_batches_fill_while_one_runs_and_those_who_give_up_are_not_run():
    seen = []

    def run(items):
        time.sleep(0.05)
        seen.append(list(items))
        if "bad" in items:
            raise RuntimeError("of the model")
        return [item * 2 for item in items]

    async def main():
        batches = RequestBatches(run, batch_size=3, capacity=4)
        await batches.start()
        first = asyncio.create_task(batches.submit("a"))
        await asyncio.sleep(0.01)
        others = [asyncio.create_task(batches.submit(name)) for name in ("b", "c", "d", "e")]
        await asyncio.sleep(0)
        with pytest.raises(QueueIsFullError):
            await batches.submit("f")
        others[1].cancel()
        results = await asyncio.gather(first, others[0], others[2], others[3])
        with pytest.raises(RuntimeError, match="of the model"):
            await batches.submit("bad")
        assert await batches.submit("z") == "zz", "it goes on"
        last = asyncio.create_task(batches.submit("y"))
        await asyncio.sleep(0.01)
        await batches.stop()
        with pytest.raises(asyncio.CancelledError):
            await last
        with pytest.raises(RuntimeError, match="not running"):
            await batches.submit("x")
        return results

    assert asyncio.run(main()) == ["aa", "bb", "dd", "ee"]
    assert seen[0] == ["a"]
    assert "c" not in [item for batch in seen for item in batch]
    assert max(map(len, seen)) >= 2


def test_a_model_that_fails_is_told_and_makes_the_server_unhealthy(checkpoint):
    from starlette.testclient import TestClient

    from hf_detr.prediction import Predictor
    from hf_detr.server import build_server

    predictor = Predictor(checkpoint, device="cpu")
    work = predictor.predict_loaded
    predictor.predict_loaded = lambda loaded: 1 / 0
    with TestClient(build_server(predictor, waiting=2)) as client:
        image = encoded(picture(40, 40))
        for _ in range(3):
            answer = client.post("/predict", content=image)
            assert answer.status_code == 500
            assert "failed on this image" in answer.json()["error"]
        assert client.get("/health").status_code == 503
        assert 'requests_total{status="500"} 3' in client.get("/metrics").text
    predictor.predict_loaded = work
    for limits in ({"waiting": 0}, {"timeout": float("nan")}, {"max_bytes": -1}):
        with pytest.raises(ValueError, match="must be above 0"):
            build_server(predictor, **limits)


def test_a_missing_model_is_a_sentence(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "serve.py"), "--model", str(tmp_path / "none")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
