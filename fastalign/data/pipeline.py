"""From a source to equally sized uint8 batches: reading, replacing bad samples, and a DALI pipeline.

The pipeline decodes, then resizes, crops and flips at once. Cropping is a region of interest of the resize, in source
pixels. DALI samples beyond its edge, so this equals resizing the whole image and cropping afterwards. The region may
reach outside the image; `transforms.reflect` fills those pixels later, on the device.

In training the next good sample in source order replaces a bad one. That depends on the files alone: not on ranks,
resuming, a quarantine list, or when a sample was found to be bad. Evaluation leaves bad samples out. A list of them
has one JSON object per line: `id` (null for a tar shard), `name` and `reason`.
"""

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from fastalign.data.headers import read_size, without_exif
from fastalign.data.sources import Source, Unreadable
from fastalign.data.transforms import Geometry, Transform, geometry
from fastalign.utils.errors import UserError

FILE = "bad_samples.jsonl"
ALWAYS_ALLOWED = 10
MAX_IN_A_ROW = 100
_RETRY_AFTER = (0.1, 0.4)

Decoded = list[tuple[Tensor, Geometry]]
"""A batch as arguments of `reflect`: [B, h, w, 3] uint8 on the device, and its geometry. [] = no batch."""


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used, by index (None for an entry of `Source.damaged`) and name."""

    id: int | None
    name: str
    reason: str = ""


class BadSamples:
    """The known bad samples of one source: `quarantined` ids are skipped, `found` ones also reported. Thread-safe."""

    def __init__(self, quarantined: Iterable[int] = ()):
        self.quarantined = frozenset(quarantined)
        self.found: dict[int, BadSample] = {}


def check_in_a_row(bad: list[BadSample]) -> None:
    """Raises a UserError if 100 bad samples follow one another."""
    if len(bad) >= MAX_IN_A_ROW:
        raise UserError(
            f"{len(bad)} images in a row cannot be used, the last one is {bad[-1].name!r}: {bad[-1].reason}; is the "
            "disk available, and is this a data set of images? fastalign scan lists the bad ones"
        )


def too_many(bad: int, drawn: int, share: float) -> bool:
    """Whether a run must stop: more than 10 bad samples and `share` of the drawn images; with 0 at the first."""
    return bad > ALWAYS_ALLOWED * (share > 0) and bad > share * drawn


def to_line(sample: BadSample) -> bytes:
    """A line of a list of bad samples, in ASCII."""
    return json.dumps(asdict(sample)).encode() + b"\n"


def read_list(path: Path) -> list[BadSample]:
    """The samples of a list. An incomplete last line, from a process that was killed, is skipped."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    samples = []
    for number, line in enumerate(lines, 1):
        try:
            sample = BadSample(**json.loads(line or b"{}"))
            if not isinstance(sample.name, str):
                raise TypeError(sample.name)
            samples.append(sample)
        except (ValueError, TypeError) as error:
            if line.strip() and number < len(lines):
                wanted = '{"id": ..., "name": ..., "reason": ...}'
                raise UserError(f"{path} line {number} is not {wanted}; remove that line") from error
    return samples


def append_to_list(path: Path, samples: Iterable[BadSample]) -> None:
    """Appends samples to a list and flushes it to the disk; an incomplete last line is removed first."""
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.writelines(map(to_line, samples))
        file.flush()
        os.fsync(file.fileno())


def read_quarantine(path: str | Path, source: Source) -> set[int]:
    """The ids of the samples of a source that a quarantine list names; ids may have shifted since."""
    names = {sample.name for sample in read_list(Path(path)) if sample.id is not None}
    ids = {index for index in range(len(source)) if source.name(index) in names} if names else set()
    if names and not ids:
        raise UserError(
            f"faults.quarantine={path}: none of its {len(names)} names, such as {min(names)!r}, is in the "
            "data set: make the list with fastalign scan, or leave the key out"
        )
    return ids


@dataclass
class Sample:
    """The sample that is used in place of `wanted`."""

    wanted: int
    id: int
    encoded: np.ndarray | None = None  # [bytes] uint8; None if it is left out
    size: tuple[int, int] | None = None  # (height, width)
    bad: list[BadSample] = field(default_factory=list)  # met while looking for it, without quarantined ones


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
            raise UserError(f"none of the {total} images can be used; is {self.source.root} available?")
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
            raise Unreadable(self.source.location(index), reason)
        return self._bad.found.setdefault(index, BadSample(index, self.source.name(index), reason))

    def decode(self, sample: Sample, decoder: "Decoder", **draws: int) -> tuple[Sample, Decoded]:
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
        self._mixed = {"device": "mixed", "hw_decoder_load": hw_decoder_load} if device.type == "cuda" else {}
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
        """Start decoding the samples that have bytes; `seed` and `epoch` determine their crops."""
        samples = [sample for sample in samples if sample.encoded is not None]
        if not samples:
            return
        self._pipeline = self._pipeline or self._build()  # a DALI pipeline cannot be used after a failure
        ids, shapes = np.array([sample.id for sample in samples]), np.array([s.size for s in samples])
        sampling = geometry(self._transform, shapes, ids, seed=seed, epoch=epoch)
        encoded, types = [without_exif(sample.encoded) for sample in samples], self._dali.types
        kinds = np.where(sampling.bicubic, types.INTERP_CUBIC, types.INTERP_LINEAR)
        self._pipeline.feed_input("encoded", encoded)
        self._pipeline.feed_input("roi_start", sampling.roi_start)
        self._pipeline.feed_input("roi_end", sampling.roi_end)
        self._pipeline.feed_input("interpolation", kinds.astype(np.int32))
        self._pipeline.schedule_run()
        self._in_flight = (encoded, sampling)  # DALI reads the bytes without copying them

    def collect(self) -> Decoded:
        """The submitted batch; raises a DecodeError if some sample of it cannot be decoded.

        On CUDA the memory is DALI's, which reuses it: synchronize the current stream before dropping the tensor.
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
