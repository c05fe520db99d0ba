"""Encoded bytes to equally sized uint8 batches: one DALI decode and one DALI resize that also crops and flips.

Cropping is folded into the resize as a region of interest in source pixels. DALI samples beyond the region's
edge, so this equals resizing the whole image and cropping afterwards, for a fraction of the work. The region
may reach outside the image; those pixels are replaced by reflection later, on the device.

The geometry needs the image's shape before the decode. It is computed in numpy between two pipelines (peek,
decode) rather than in DALI arithmetic, which works in float32, has no round-half-even and would need some
hundred operators for the ten tries of a random resized crop; peeking costs 15 us an image, in C++.
"""

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from fastalign.data.headers import MAX_PIXELS, without_exif
from fastalign.data.transforms import BICUBIC, BILINEAR, Geometry
from fastalign.utils.errors import UserError


class DecodeError(Exception):
    """DALI could not decode some sample of a batch; `Examiner` says which."""


def load_dali() -> SimpleNamespace:
    """NVIDIA DALI's parts: `fn`, `types`, `Pipeline`.

    Raises:
        UserError: it is missing, or another project's package of that name is installed.
    """
    remedy = "pip install nvidia-dali-cuda130 (CUDA 12: nvidia-dali-cuda120), or train on `synthetic` data"
    try:
        import nvidia.dali
    except ImportError as error:
        raise UserError(f"NVIDIA DALI is not installed: {remedy} ({error})") from error
    try:
        import nvidia.dali.fn as fn
        from nvidia.dali import Pipeline, types

        fn.decoders.image  # noqa: B018
    except (ImportError, AttributeError) as error:
        place = getattr(nvidia.dali, "__file__", None)
        raise UserError(
            f"NVIDIA DALI is not installed: {place} is another package; remove it, {remedy}"
        ) from error
    return SimpleNamespace(fn=fn, types=types, Pipeline=Pipeline)


class Decoder:
    """Two DALI pipelines: image shapes, and decode + resize.

    At most one batch is in flight: `submit`, then `collect`. Use from one thread. A sample that DALI cannot decode
    ends its pipeline for good; the next batch gets a new one, which takes some ten milliseconds.

    Args:
        size: output (height, width).
        batch_size: largest batch.
        device: where the images come out, with its index; on CUDA, JPEG is decoded by the GPU too.
        threads: DALI's worker threads.
        hw_decoder_load: share of a batch's JPEGs for the GPU's hardware decoder. Between 0 and 1 the two GPU
            decoders share a batch, and their pixels may differ by a level; 0 or 1 rules that out.

    Raises:
        UserError: DALI is not installed.
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        batch_size: int,
        device: torch.device,
        threads: int = 4,
        hw_decoder_load: float = 0.9,
    ):
        self._dali = load_dali()
        self._size, self._batch_size, self._device = size, batch_size, device
        self._threads, self._hw_decoder_load = threads, hw_decoder_load
        self._interpolations = np.zeros(2, dtype=np.int32)
        self._interpolations[BILINEAR] = int(self._dali.types.INTERP_LINEAR)
        self._interpolations[BICUBIC] = int(self._dali.types.INTERP_CUBIC)
        self._peek, self._decode = self._open_peek(), self._open_decode()
        self._in_flight: tuple | None = None

    def _options(self) -> dict:
        # Depth 1: the caller schedules the next batch while it finishes this one, and the host's buffers, which
        # are fed without a copy, need not outlive more than one batch.
        return {"batch_size": self._batch_size, "prefetch_queue_depth": 1, "exec_dynamic": True}

    def _open_peek(self):
        fn, types = self._dali.fn, self._dali.types
        pipeline = self._dali.Pipeline(device_id=None, num_threads=1, **self._options())
        with pipeline:
            encoded = fn.external_source(name="encoded", ndim=1, dtype=types.UINT8, no_copy=True)
            pipeline.set_outputs(fn.peek_image_shape(encoded, adjust_orientation=False))
        pipeline.build()
        return pipeline

    def _open_decode(self):
        gpu = self._device.type == "cuda"
        index = self._device.index if gpu else None
        pipeline = self._dali.Pipeline(device_id=index, num_threads=self._threads, **self._options())
        with pipeline:
            pipeline.set_outputs(self._graph(self._dali, self._size, gpu, self._hw_decoder_load))
        pipeline.build()
        return pipeline

    @staticmethod
    def _graph(dali: SimpleNamespace, size: tuple[int, int], gpu: bool, hw_decoder_load: float):
        fn, types = dali.fn, dali.types
        encoded = fn.external_source(name="encoded", ndim=1, dtype=types.UINT8, no_copy=True)
        start = fn.external_source(name="roi_start", ndim=1, dtype=types.FLOAT)
        end = fn.external_source(name="roi_end", ndim=1, dtype=types.FLOAT)
        kind = fn.external_source(name="interpolation", ndim=0, dtype=types.INT32)
        images = fn.decoders.image(
            encoded,
            device="mixed" if gpu else "cpu",
            output_type=types.RGB,
            # libjpeg's (and so PIL's) chroma upsampling; the GPU decoders' own differs by tens of levels.
            jpeg_fancy_upsampling=True,
            # timm does not apply the EXIF orientation, so the backbones have not seen it applied.
            adjust_orientation=False,
            **({"hw_decoder_load": hw_decoder_load} if gpu else {}),
        )
        return fn.resize(
            images,
            roi_start=start,
            roi_end=end,
            size=list(size),
            interp_type=fn.cast(kind, dtype=types.INTERP_TYPE),
            antialias=True,
        )

    def shapes(self, encoded: list[np.ndarray]) -> np.ndarray:
        """Heights and widths, read from the headers.

        Args:
            encoded: B arrays of [bytes] uint8.

        Returns:
            [B, 2] int64.

        Raises:
            DecodeError: DALI does not understand some header, or reads more than 100 million pixels in it.
        """
        try:
            self._peek = self._peek or self._open_peek()
            encoded = [without_exif(each) for each in encoded]
            self._peek.feed_input("encoded", encoded)
            shapes = np.array(self._peek.run()[0].as_array())[:, :2]
        except RuntimeError as error:
            self._peek = None
            raise DecodeError(str(error)) from error
        if (shapes.prod(axis=1) > MAX_PIXELS).any():
            raise DecodeError(f"an image has more than {MAX_PIXELS} pixels")
        return shapes

    def submit(self, encoded: list[np.ndarray], sampling: Geometry) -> None:
        """Starts decoding a batch.

        Args:
            encoded: B arrays of [bytes] uint8; what DALI reads is kept alive until `collect`.
            sampling: the batch's geometry.
        """
        self._decode = self._decode or self._open_decode()
        encoded = [without_exif(each) for each in encoded]
        self._decode.feed_input("encoded", encoded)
        self._decode.feed_input("roi_start", sampling.roi_start)
        self._decode.feed_input("roi_end", sampling.roi_end)
        self._decode.feed_input("interpolation", self._interpolations[sampling.interpolation])
        self._decode.schedule_run()
        self._in_flight = (encoded, sampling)

    def collect(self) -> Tensor:
        """The submitted batch: [B, h, w, 3] uint8 on the device.

        On CUDA the memory is DALI's and the current stream waits for it; synchronise that stream before letting
        the tensor go, because DALI reuses it at once.

        Raises:
            DecodeError: some sample cannot be decoded.
        """
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            (images,) = self._decode.share_outputs(cuda_stream=stream)
        except RuntimeError as error:
            self._decode = None
            raise DecodeError(str(error)) from error
        finally:
            self._in_flight = None
        tensor = torch.from_dlpack(images.as_tensor())
        self._decode.release_outputs()
        return tensor

    def drain(self) -> None:
        """Waits for a submitted batch, if there is one, and drops it; until then DALI reads its bytes."""
        if self._in_flight is None:
            return
        try:
            # Without a stream the host itself waits, and only then are the bytes let go.
            self._decode.share_outputs()
            self._decode.release_outputs()
        except RuntimeError:
            self._decode = None
        finally:
            self._in_flight = None


class Examiner:
    """Tells whether DALI can decode an image, by decoding it alone. Use from one thread.

    Args:
        device: as for `Decoder`, and `hw_decoder_load` likewise: another decoder may judge otherwise.
        hw_decoder_load: see `Decoder`.

    Raises:
        UserError: DALI is not installed.
    """

    def __init__(self, device: torch.device, hw_decoder_load: float = 0.9):
        self._decoder = Decoder(
            (1, 1), batch_size=1, device=device, threads=1, hw_decoder_load=hw_decoder_load
        )

    def reason(self, encoded: np.ndarray) -> str | None:
        """Why DALI cannot decode an image; None if it can.

        Args:
            encoded: [bytes] uint8.
        """
        try:
            shape = self._decoder.shapes([encoded]).astype(np.float32)
        except DecodeError:
            return "DALI does not understand its header"
        none = np.zeros((0, 1), dtype=np.int64)
        whole = Geometry(np.zeros((1, 2), np.float32), shape, np.zeros(1, np.int64), none[:, 0], none, none)
        self._decoder.submit([encoded], whole)
        try:
            self._decoder.collect()
        except DecodeError:
            return "damaged: DALI cannot decode it"
        return None
