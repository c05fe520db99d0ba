"""A background thread that makes batches ahead of time."""

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
    """One micro-batch: images [b, 3, h, w], normalised, and sample ids [b] int64, on the loader's device.

    `weight`: share of the batch's own images in mixup or cutmix; the rest is the batch reversed. `bad`: bad samples
    met in making it, also if an earlier batch met them, without quarantined ones.
    """

    images: Tensor
    ids: Tensor
    ids_host: np.ndarray
    wait: float = 0.0
    "Seconds that the consumer waited for it."
    weight: float = 1.0
    bad: tuple[BadSample, ...] = ()


def _produce(
    batches: Iterator[Batch], device: torch.device, ready: queue.Queue, stop: threading.Event
) -> None:
    """The background thread. Puts batches, then None, or the exception that ended it."""

    def put(item) -> bool:
        # An interpreter that exits waits for this thread, while nobody takes from the queue any more.
        while not stop.is_set() and threading.main_thread().is_alive():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=_POLL_SECONDS)
                return True
        return False

    try:
        on_gpu = device.type == "cuda"
        stream = torch.cuda.stream(torch.cuda.Stream(device)) if on_gpu else contextlib.nullcontext()
        with stream, contextlib.closing(batches):
            for batch in batches:
                if not put(batch):
                    return
        put(None)
    except BaseException as error:
        put(error)


class Prefetcher:
    """Iterates over batches that a background thread makes, on CUDA on a side stream, `depth` ahead."""

    def __init__(self, batches: Iterator[Batch], device: torch.device, depth: int):
        self._device, self._ready, self._stop = device, queue.Queue(depth), threading.Event()
        arguments = (batches, device, self._ready, self._stop)  # without `self`, which may be dropped
        self._thread = threading.Thread(target=_produce, args=arguments, name="fastalign-loader")
        self._thread.start()

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Batch:
        begin = time.perf_counter()
        item = None if self._stop.is_set() else self._ready.get()
        if not isinstance(item, Batch):
            self.close()
            raise StopIteration if item is None else item
        if self._device.type == "cuda":
            # The allocator must not give this memory to the side stream before the consumer's work on it is done.
            for tensor in (item.images, item.ids):
                tensor.record_stream(torch.cuda.current_stream(self._device))
        return replace(item, wait=time.perf_counter() - begin)

    def close(self) -> None:
        """Stops the background thread and waits for it."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __del__(self):
        self.close()
