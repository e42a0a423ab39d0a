"""The HTTP interface: `POST /predict`, `GET /health`, `GET /metrics`."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from io import BytesIO
from typing import Any

import PIL.Image
from transformers.utils import logging

from ..prediction.predictor import Predictor
from ..runtime.extras import import_extra
from .request_batches import QueueIsFullError, RequestBatches

logger = logging.get_logger(__name__)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # decoded here; others run programs, or are rarely images
MAX_FAILURES = 3  # batches in a row on which the model fails, from which the server is not healthy
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds, of the histogram of times


class Figures:
    """What `/metrics` shows, in the text format of Prometheus."""

    def __init__(self) -> None:
        self.answers: Counter[int] = Counter()
        self.seconds: Counter[float] = Counter()
        self.total = 0.0

    def add(self, status: int, seconds: float) -> None:
        self.answers[status] += 1
        if status == 200:
            self.total += seconds
            for limit in BUCKETS:
                self.seconds[limit] += seconds <= limit

    def text(self, batches: RequestBatches) -> str:
        lines = ["# TYPE hf_detr_requests_total counter"]
        lines += [f'hf_detr_requests_total{{status="{code}"}} {n}' for code, n in sorted(self.answers.items())]
        lines += ["# TYPE hf_detr_seconds histogram"]
        lines += [f'hf_detr_seconds_bucket{{le="{limit}"}} {self.seconds[limit]}' for limit in BUCKETS]
        lines += [f'hf_detr_seconds_bucket{{le="+Inf"}} {self.answers[200]}', f"hf_detr_seconds_sum {self.total:.6f}"]
        lines += [f"hf_detr_seconds_count {self.answers[200]}", "# TYPE hf_detr_batches_total counter"]
        lines += [f'hf_detr_batches_total{{size="{size}"}} {n}' for size, n in sorted(batches.sizes.items())]
        lines += ["# TYPE hf_detr_waiting gauge", f"hf_detr_waiting {batches.waiting}"]
        return "\n".join(lines) + "\n"


class RequestError(Exception):
    """A request that cannot be served, with the status and the sentence of its answer."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def build_server(
    predictor: Predictor,
    *,
    max_bytes: int = 20_000_000,
    max_pixels: int = 50_000_000,
    timeout: float = 30.0,
    waiting: int = 64,
) -> Any:
    """A Starlette application. The body of `POST /predict` is an image file, or a form with the field `file`; the
    answer has the format of `pipeline("object-detection")`, with unrounded boxes.

    Answers with other statuses are `{"error": sentence}`: 400: the image cannot be read or the threshold is invalid;
    413: too many bytes or pixels; 500: the model failed; 503: too many requests wait (with `Retry-After`); 504: it took
    too long.

    Args:
        predictor: loaded before the first request; its `batch_size` is the most images of a forward pass, and its
            threshold the default of the query parameter `threshold`, which may be higher.
        max_bytes: of a request; max_pixels: of an image, as its header says, before it is decoded.
        timeout: seconds from the arrival of a request to its answer.
        waiting: requests that may wait for the model, uploads and decoding included.

    Raises:
        ImportError: Starlette is not installed.
        ValueError: a limit is not above 0.
    """
    for name, value in (
        ("max_bytes", max_bytes),
        ("max_pixels", max_pixels),
        ("timeout", timeout),
        ("waiting", waiting),
    ):
        if not value > 0:
            raise ValueError(f"`{name}` must be above 0, got {value}.")
    applications, exceptions, responses, routing = (
        import_extra(f"starlette.{part}", "serve") for part in ("applications", "exceptions", "responses", "routing")
    )
    busy = f"The server is busy: {waiting} requests are waiting. Try again later."
    open_requests, max_open = 0, waiting + predictor.batch_size
    figures, started = Figures(), time.time()
    batches = RequestBatches(predictor.predict_loaded, batch_size=predictor.batch_size, capacity=waiting)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        await asyncio.to_thread(lambda: predictor.detector)
        await batches.start()
        yield
        await batches.stop()

    async def body_of(request: Any) -> bytes:
        """The image file in a request.

        Raises:
            RequestError: it has too many bytes, or a form has no file.
        """
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > max_bytes:
                raise RequestError(413, f"The request has more than {max_bytes:,} bytes.")
            parts.append(part)
        body = b"".join(parts)
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            return body
        request._body = body  # already read; the parser reads it from here
        form = await request.form()
        if not hasattr(form.get("file"), "read"):
            raise RequestError(400, 'The form has no file in the field "file".')
        content: bytes = await form["file"].read()
        return content

    async def detect(request: Any) -> list[dict[str, Any]]:
        threshold = _threshold(request.query_params.get("threshold"), predictor.threshold)
        loaded = await asyncio.to_thread(decode, await body_of(request))
        row = await batches.submit(loaded)
        found = zip(row["scores"], row["labels"], row["boxes"], strict=True)
        return [
            {"score": score, "label": label, "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))}
            for score, label, box in found
            if threshold is None or score > threshold
        ]

    def decode(body: bytes) -> Any:
        """The image, ready for the model. Its size is checked before it is decoded.

        Raises:
            RequestError: it has too many pixels, or is no image of these formats.
        """
        try:
            with PIL.Image.open(BytesIO(body), formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise RequestError(
                        413, f"The image has {width} x {height} pixels; at most {max_pixels:,} are read."
                    )
                image.load()
                loaded = predictor.load(image)
        except RequestError:
            raise
        except Exception as error:  # decoders raise errors of any kind on damaged files
            reason = "not an image file of these formats" if isinstance(error, PIL.UnidentifiedImageError) else error
            raise RequestError(400, f"The image cannot be read: {reason} ({', '.join(FORMATS)}).") from error
        if loaded.error is not None:
            raise RequestError(400, f"The image cannot be read: {loaded.error}")
        return loaded

    async def answer(work: Callable[[], Awaitable[Any]]) -> Any:
        nonlocal open_requests
        began, headers = time.perf_counter(), {}
        if open_requests >= max_open:  # bodies and decoded images take memory, too
            figures.add(503, 0.0)
            return responses.JSONResponse({"error": busy}, 503, headers={"Retry-After": "1"})
        open_requests += 1
        try:
            status, content = 200, await asyncio.wait_for(work(), timeout)
        except RequestError as error:
            status, content = error.status, {"error": str(error)}
        except QueueIsFullError:
            status, content, headers = 503, {"error": busy}, {"Retry-After": "1"}
        except TimeoutError:
            status, content = 504, {"error": f"There was no result within {timeout:g} seconds."}
        except exceptions.HTTPException as error:  # of a form that cannot be read
            status, content = error.status_code, {"error": str(error.detail)}
        except Exception:
            logger.exception("A request failed.")
            status, content = 500, {"error": "The model failed on this image; see the log of the server."}
        finally:
            open_requests -= 1
        figures.add(status, time.perf_counter() - began)
        return responses.JSONResponse(content, status, headers=headers)

    async def predict(request: Any) -> Any:
        return await answer(lambda: detect(request))

    async def health(request: Any) -> Any:
        model = predictor.detector.model
        content = {
            "status": "ok" if batches.failures < MAX_FAILURES else "failing", "model": predictor.source,
            "device": str(predictor.detector.device), "classes": len(model.config.id2label),
            "seconds": round(time.time() - started, 1),
        }  # fmt: skip
        return responses.JSONResponse(content, 200 if content["status"] == "ok" else 503)

    async def metrics(request: Any) -> Any:
        return responses.PlainTextResponse(figures.text(batches), media_type="text/plain; version=0.0.4")

    routes = [
        routing.Route("/predict", predict, methods=["POST"]),
        routing.Route("/health", health),
        routing.Route("/metrics", metrics),
    ]
    return applications.Starlette(routes=routes, lifespan=lifespan)


def _threshold(given: str | None, lowest: float | str) -> float | None:
    """The threshold that a request asks for.

    Raises:
        RequestError: it is not a number between the threshold of the server and 1.
    """
    if given is None:
        return None
    try:
        value = float(given)
    except ValueError:
        raise RequestError(400, f"threshold must be a number, got {given[:20]!r}.") from None
    least = lowest if isinstance(lowest, float | int) else 0.0
    if not least <= value <= 1:
        raise RequestError(400, f"threshold must be between the server's {least:g} and 1, got {value:g}.")
    return value
