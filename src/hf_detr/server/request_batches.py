"""Requests that arrive together run together."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class QueueIsFullError(Exception):
    """There are as many waiting requests as are allowed."""


class RequestBatches:
    """Collects what is submitted into batches, which one thread runs in turn. While a batch runs, the next one fills;
    so a batch is large when the load is high, and a single request does not wait.

    Args:
        run: a list of items to a result for each, in their order.
        batch_size: the most items of a batch.
        capacity: the most items that wait.

    Attributes:
        sizes: number of batches by their size.
        failures: batches in a row on which `run` raised.
    """

    def __init__(self, run: Callable[[Sequence[Any]], Sequence[Any]], *, batch_size: int, capacity: int) -> None:
        self.run, self.batch_size = run, batch_size
        self.sizes: dict[int, int] = {}
        self.failures = 0
        self._waiting: asyncio.Queue[tuple[Any, asyncio.Future[Any]]] = asyncio.Queue(capacity)
        self._thread = ThreadPoolExecutor(1, "model")
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        return self._waiting.qsize()

    async def start(self) -> None:
        self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Cancel what waits, and end the thread after the batch that runs. For when no request is open."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        while not self._waiting.empty():
            self._waiting.get_nowait()[1].cancel()
        self._thread.shutdown()

    async def submit(self, item: Any) -> Any:
        """The result of an item. If the caller gives up, the item is not run.

        Raises:
            QueueIsFullError: too many are waiting.
            RuntimeError: it is not running.
        """
        if self._task is None or self._task.done():
            raise RuntimeError("The batches are not running.")
        result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        try:
            self._waiting.put_nowait((item, result))
        except asyncio.QueueFull:
            raise QueueIsFullError from None
        return await result

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < self.batch_size and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            batch = [(item, result) for item, result in batch if not result.done()]
            if not batch:
                continue
            self.sizes[len(batch)] = self.sizes.get(len(batch), 0) + 1
            try:
                items = [item for item, _ in batch]
                outcomes: Sequence[Any] = await loop.run_in_executor(self._thread, self.run, items)
                if len(outcomes) != len(items):
                    raise RuntimeError(f"{len(items)} images gave {len(outcomes)} results.")
                self.failures = 0
            except asyncio.CancelledError:  # the end of the server
                for _, result in batch:
                    result.cancel()
                raise
            except Exception as error:  # of the model: these requests fail, and the server goes on
                self.failures += 1
                outcomes = [error] * len(batch)
            for (_, result), outcome in zip(batch, outcomes, strict=True):
                if result.done():
                    continue
                if isinstance(outcome, Exception):
                    result.set_exception(outcome)
                else:
                    result.set_result(outcome)
