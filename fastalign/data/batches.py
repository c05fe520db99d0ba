"""One batch from fetched samples to pixels: DALI's pipelines, and what is done where DALI fails on one."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastalign.data.fetch import Fetched, Fetcher
from fastalign.data.pipeline import DecodeError, Decoder, Examiner
from fastalign.data.transforms import Geometry, Transform, geometry
from fastalign.utils.errors import UserError

_NAMED_AT_MOST = 5


@dataclass(frozen=True, eq=False)
class Work:
    """A batch on its way through the decoder. Without a good sample `encoded` is empty."""

    fetched: list[Fetched]
    "as in the order of the epoch"
    epoch: int
    ids: np.ndarray
    "[B] int64, of the good ones"
    encoded: list[np.ndarray]
    sampling: Geometry


class BatchDecoder:
    """Decodes batches; where DALI cannot, finds out the samples that are to blame and goes on without them.

    DALI says only that a batch failed. Then each of its images is decoded alone, bad ones are replaced or left out as
    the fetcher does it, and the batch is decoded again; where DALI fails once more, image by image.
    Use from one thread.

    Args:
        transform: image to input.
        fetcher: for replacements.
        seed: of the run.
        tolerant: bad samples are no error.
        batch_size: largest batch.
        device: see `Decoder`, as are threads and hw_decoder_load.
        threads: DALI's.
        hw_decoder_load: share of the hardware decoder.

    Raises:
        UserError: DALI is not installed.
    """

    def __init__(
        self,
        transform: Transform,
        fetcher: Fetcher,
        *,
        seed: int,
        tolerant: bool,
        batch_size: int,
        device: torch.device,
        threads: int,
        hw_decoder_load: float,
    ):
        options = {"device": device, "hw_decoder_load": hw_decoder_load}
        self._decoder = Decoder(transform.size, batch_size=batch_size, threads=threads, **options)
        self._examiner: Examiner | None = None
        self._options = options
        self._transform, self._fetcher, self._seed, self._tolerant = transform, fetcher, seed, tolerant
        self.drain = self._decoder.drain

    def prepare(self, fetched: list[Fetched], epoch: int) -> Work:
        """Sizes and geometry of a batch.

        Args:
            fetched: its samples.
            epoch: 0..2^32-1.

        Raises:
            UserError: a bad sample without tolerance, 100 in a row, or DALI fails on images each of which it reads.
        """
        try:
            return self._plan(fetched, epoch)
        except DecodeError:
            fetched = self._settled(fetched)
        try:
            return self._plan(fetched, epoch)
        except DecodeError as error:
            raise self._no_culprit(fetched, error) from error

    def submit(self, work: Work) -> None:
        """Starts decoding, if there is anything."""
        if work.encoded:
            self._decoder.submit(work.encoded, work.sampling)

    def collect(self, work: Work) -> tuple[Work, Tensor | None]:
        """The submitted batch, as it came out.

        Args:
            work: that was submitted.

        Returns:
            The batch with the samples that were decoded, and their pixels, see `Decoder.collect`; None if there is
            no good one.

        Raises:
            UserError: as for `prepare`.
        """
        try:
            return work, self._decoder.collect() if work.encoded else None
        except DecodeError:
            work = self.prepare(self._settled(work.fetched), work.epoch)
        try:
            self.submit(work)
            return work, self._decoder.collect() if work.encoded else None
        except DecodeError:
            return work, self._one_by_one(work)

    def _one_by_one(self, work: Work) -> Tensor:
        """The pixels of a batch on which DALI fails although it decodes each image, for want of memory perhaps."""
        pixels = []
        try:
            for made in work.fetched:
                if made.encoded is not None:
                    self.submit(self._plan([made], work.epoch))
                    pixels.append(self._decoder.collect().clone())
                    if pixels[-1].is_cuda:
                        torch.cuda.current_stream(pixels[-1].device).synchronize()  # DALI reuses its memory
        except DecodeError as error:
            raise self._no_culprit(work.fetched, error) from error
        return torch.cat(pixels)

    def _no_culprit(self, fetched: list[Fetched], error: DecodeError) -> UserError:
        names = [self._fetcher.source.name(made.id) for made in (fetched[0], fetched[-1])]
        reason = " ".join(str(error).split())[:200]
        return UserError(
            f"DALI fails on the batch from {names[0]} to {names[1]}, but on none of its images alone ({reason}): "
            "is there enough memory? try smaller batches, or fewer data.threads"
        )

    def _plan(self, fetched: list[Fetched], epoch: int) -> Work:
        if not self._tolerant and any(made.bad for made in fetched):
            raise self._refusal(fetched)
        good = [made for made in fetched if made.encoded is not None]
        ids = np.array([made.id for made in good], dtype=np.int64)
        encoded = [made.encoded for made in good]
        shapes = self._decoder.shapes(encoded) if good else np.ones((0, 2), dtype=np.int64)
        sampling = geometry(self._transform, shapes, ids, seed=self._seed, epoch=epoch)
        return Work(fetched, epoch, ids, encoded, sampling)

    def _settled(self, fetched: list[Fetched]) -> list[Fetched]:
        self._examiner = self._examiner or Examiner(**self._options)
        return [self._fetcher.settle(made, self._examiner.reason) for made in fetched]

    def _refusal(self, fetched: list[Fetched]) -> UserError:
        bad = [sample for made in fetched for sample in made.bad]
        more = f" and {len(bad) - _NAMED_AT_MOST} more" if len(bad) > _NAMED_AT_MOST else ""
        names = ", ".join(
            f"{self._fetcher.source.name(sample.id)} ({sample.reason})" for sample in bad[:_NAMED_AT_MOST]
        )
        root = self._fetcher.source.root
        return UserError(
            f"cannot decode {names}{more}{f' in {root}' if root else ''}: {len(bad)} of a batch of {len(fetched)}; "
            "remove or replace them"
        )
