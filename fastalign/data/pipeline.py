"""From a source to equally sized uint8 batches: reading, replacing what is bad, and a DALI pipeline.

The pipeline decodes, then resizes, crops and flips at once. Cropping is a region of interest of the resize, in source
pixels. DALI samples beyond its edge, so this equals resizing the whole image and cropping afterwards. The region may
reach outside the image; `transforms.reflect` fills those pixels later, on the device.
"""

import time
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from fastalign.data.bad_samples import BadSample, BadSamples, check_in_a_row
from fastalign.data.headers import read_size, without_exif
from fastalign.data.sources import Source, Unreadable
from fastalign.data.transforms import Geometry, Transform, geometry
from fastalign.utils.errors import UserError

_RETRY_AFTER = (0.1, 0.4)

Decoded = tuple[Tensor, Geometry]
"""A batch for `reflect`: [B, h, w, 3] uint8 on the device"""


@dataclass
class Sample:
    """The sample that is used in place of `wanted`: [bytes] uint8, None if it is left out, and (height, width).

    `bad`: samples met while looking for it, without quarantined ones.
    """

    wanted: int
    id: int
    encoded: np.ndarray | None = None
    size: tuple[int, int] | None = None
    bad: list[BadSample] = field(default_factory=list)


class SampleReader:
    """Reads samples and checks their headers. Thread-safe.

    Bad samples are added to `bad` and left out, or replaced if `replace`; with `bad` None the first one raises.
    """

    def __init__(self, source: Source, bad: BadSamples | None, *, replace: bool):
        self.source, self._replace, self._strict = source, replace, bad is None
        self._bad = bad or BadSamples()

    def read(self, wanted: int) -> Sample:
        """A sample or its replacement; raises a UserError if 100 in a row are bad, or all."""
        sample, total = Sample(wanted, wanted), len(self.source)
        for step in range(total if self._replace else 1):
            sample.id = (wanted + step) % total
            if sample.id in self._bad.quarantined:
                continue
            bad = self._bad.found.get(sample.id) or self._load(sample)
            if bad is None:
                return sample
            sample.bad.append(bad)
            check_in_a_row(sample.bad)
        if self._replace:
            where = self.source.root or "the data"
            raise UserError(f"none of the {total} images can be used; is {where} available?")
        return sample

    def _load(self, sample: Sample) -> BadSample | None:
        """Reads the bytes of a sample, or returns why it is bad."""
        for wait in (*_RETRY_AFTER, None):
            try:
                encoded = self.source.read(sample.id)
                break
            except Unreadable as error:
                # A network disk may fail for a moment; an empty file stays empty.
                if wait is None or not isinstance(error.__cause__, OSError):
                    return self._record(sample.id, error.reason)
                time.sleep(wait)
        size = read_size(encoded)
        if isinstance(size, str):
            return self._record(sample.id, size)
        sample.encoded, sample.size = encoded, size
        return None

    def _record(self, index: int, reason: str) -> BadSample:
        if self._strict:
            raise UserError(
                f"cannot use {self.source.location(index)}: {reason}; repair, replace or remove it"
            )
        self._bad.add([BadSample(index, self.source.name(index), reason)])
        return self._bad.found[index]

    def decode(self, sample: Sample, decoder: "Decoder", **draws: int) -> tuple[Sample, list[Decoded]]:
        """Decodes one sample, or its replacement if DALI cannot: the sample, and what `collect` returns for it."""
        while True:
            try:
                decoder.submit([sample], **draws)
                return sample, decoder.collect()
            except DecodeError:
                self._record(sample.id, "damaged: DALI cannot decode it")
                sample = self.read(sample.wanted)


class DecodeError(UserError):
    """DALI cannot decode some sample of a batch."""


def load_dali() -> ModuleType:
    """NVIDIA DALI, with `fn`, `types` and `Pipeline`; a UserError if it is missing."""
    try:
        import nvidia.dali.fn
    except ImportError as error:
        raise UserError(
            f"NVIDIA DALI is not installed ({error}): pip install nvidia-dali-cuda130 (CUDA 12: "
            "nvidia-dali-cuda120), or train on `synthetic` data"
        ) from error
    return nvidia.dali


class Decoder:
    """A DALI pipeline with at most one batch in flight: `submit`, then `collect`. Use it from one thread.

    `device`: of the images, with its index; a GPU decodes JPEGs too. `options`: DALI's batch_size and num_threads.
    """

    def __init__(
        self, transform: Transform, device: torch.device, hw_decoder_load: float = 0.9, **options: int
    ):
        self._dali, self._transform, self._device = load_dali(), transform, device
        self._options = {"device_id": device.index, **options}
        mixed = {"device": "mixed", "hw_decoder_load": hw_decoder_load}
        self._mixed = mixed if device.type == "cuda" else {}
        self._pipeline = self._in_flight = None

    def _build(self):
        # Depth 1: the host's buffers, which are fed without a copy, need not outlive more than one batch.
        pipeline = self._dali.Pipeline(prefetch_queue_depth=1, exec_dynamic=True, **self._options)
        fn, types = self._dali.fn, self._dali.types
        with pipeline:
            images = fn.decoders.image(
                fn.external_source(name="encoded", ndim=1, dtype=types.UINT8, no_copy=True),
                output_type=types.RGB,
                # libjpeg's (and so PIL's) chroma upsampling; the GPU decoders' own differs by tens of levels.
                jpeg_fancy_upsampling=True,
                # As in timm: backbones were trained without the EXIF orientation.
                adjust_orientation=False,
                **self._mixed,
            )
            kind = fn.external_source(name="interpolation", ndim=0, dtype=types.INT32)
            resized = fn.resize(
                images,
                roi_start=fn.external_source(name="roi_start", ndim=1, dtype=types.FLOAT),
                roi_end=fn.external_source(name="roi_end", ndim=1, dtype=types.FLOAT),
                size=list(self._transform.size),
                interp_type=fn.cast(kind, dtype=types.INTERP_TYPE),
                antialias=True,
            )
            pipeline.set_outputs(resized)
        pipeline.build()
        return pipeline

    def submit(self, samples: list[Sample], *, seed: int = 0, epoch: int = 0) -> None:
        """Starts decoding those of the samples that have bytes; `seed` and `epoch` are those of their crops."""
        samples = [sample for sample in samples if sample.encoded is not None]
        if not samples:
            return
        self._pipeline = self._pipeline or self._build()  # a failure ends a DALI pipeline for good
        ids, shapes = np.array([sample.id for sample in samples]), np.array([s.size for s in samples])
        sampling = geometry(self._transform, shapes, ids, seed=seed, epoch=epoch)
        encoded, types = [without_exif(sample.encoded) for sample in samples], self._dali.types
        kinds = np.where(sampling.bicubic, types.INTERP_CUBIC, types.INTERP_LINEAR)
        self._pipeline.feed_input("encoded", encoded)
        self._pipeline.feed_input("roi_start", sampling.roi_start)
        self._pipeline.feed_input("roi_end", sampling.roi_end)
        self._pipeline.feed_input("interpolation", kinds.astype(np.int32))
        self._pipeline.schedule_run()
        self._in_flight = (encoded, sampling)  # DALI reads them

    def collect(self) -> list[Decoded]:
        """The submitted batch, [] if there is none; raises a DecodeError if some sample cannot be decoded.

        On CUDA the memory is DALI's, which reuses it: synchronise the current stream before dropping the tensor.
        """
        if self._in_flight is None:
            return []
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            (images,) = self._pipeline.share_outputs(cuda_stream=stream)
        except RuntimeError as error:
            self._pipeline = None
            reason = " ".join(str(error).split())[:200]
            raise DecodeError(
                f"DALI cannot decode a batch ({reason}): is there enough memory? try smaller batches"
            ) from error
        finally:
            (_, sampling), self._in_flight = self._in_flight, None
        tensor = torch.from_dlpack(images.as_tensor())
        self._pipeline.release_outputs()
        return [(tensor, sampling)]
