"""A background thread that keeps a few finished batches ready."""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastalign.data.bad_samples import BadSample

_POLL_SECONDS = 0.1


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch."""

    images: Tensor
    "[b, 3, h, w] normalised, on the loader's device in its dtype."
    ids: Tensor
    "[b] int64, sample ids, on the loader's device."
    ids_host: np.ndarray
    "[b] int64, the same on the host."
    wait: float
    "Seconds that the consumer waited for it."
    weight: float = 1.0
    "What the batch's own images kept in mixup or cutmix; the rest is the batch reversed."
    bad: tuple[BadSample, ...] = ()
    "Bad samples met in making it, also where an earlier batch met them; quarantined ones are left aside."


def _produce(
    batches: Iterator[Batch], device: torch.device, ready: queue.Queue, stop: threading.Event
) -> None:
    """The background thread. Puts batches, then None, or the exception that ended it."""

    def put(item) -> bool:
        # An interpreter that exits waits for this thread, and nobody takes from the queue any more.
        while not stop.is_set() and threading.main_thread().is_alive():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=_POLL_SECONDS)
                return True
        return False

    try:
        on_gpu = device.type == "cuda"
        side = torch.cuda.stream(torch.cuda.Stream(device)) if on_gpu else contextlib.nullcontext()
        with side, contextlib.closing(batches):
            for batch in batches:
                if not put(batch):
                    return
        put(None)
    except BaseException as error:
        put(error)


class Prefetcher:
    """Iterates over `batches` from a thread of its own, which does not hold on to this object.

    Args:
        batches: made in the thread; its exceptions come out of `next` here. On CUDA its work runs on a side stream
            and must be finished there when it yields.
        device: of the batches.
        depth: finished batches kept ready.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device, depth: int):
        self._device = device
        self._ready: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        arguments = (batches, device, self._ready, self._stop)
        self._thread = threading.Thread(target=_produce, args=arguments, name="fastalign-loader")
        self._thread.start()

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Batch:
        begin = time.perf_counter()
        item = None if self._stop.is_set() else self._take()
        if item is None or isinstance(item, BaseException):
            self.close()
            if item is not None and not isinstance(item, Exception):
                # SystemExit of a thread would end the program in silence, as if it had been done.
                raise RuntimeError(f"a data worker ended with {type(item).__name__}: {item}") from item
            raise StopIteration if item is None else item
        if self._device.type == "cuda":
            # The allocator must not hand this memory to the side stream before the consumer's work on it is done.
            for tensor in (item.images, item.ids):
                tensor.record_stream(torch.cuda.current_stream(self._device))
        return replace(item, wait=time.perf_counter() - begin)

    def _take(self):
        while True:
            try:
                return self._ready.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if not self._thread.is_alive() and self._ready.empty():
                    raise RuntimeError("the loader's thread ended without a result") from None

    def close(self) -> None:
        """Stops the background thread and waits for it."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __del__(self):
        self.close()
