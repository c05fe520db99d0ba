"""Encoded bytes to equally sized uint8 batches: a DALI pipeline that decodes, then resizes, crops and flips at once.

Cropping is a region of interest of the resize, in source pixels. DALI samples beyond its edge, so this equals
resizing the whole image and cropping afterwards. The region may reach outside the image; `transforms.reflect` fills
those pixels later, on the device.
"""

from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from fastalign.data.headers import without_exif
from fastalign.data.transforms import Geometry
from fastalign.utils.errors import UserError


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

    `size`: of the output, (height, width). `device`: of the images, with its index; a GPU decodes JPEGs too.
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
        types = self._dali.types
        # By BILINEAR and BICUBIC.
        self._interpolations = np.array([int(types.INTERP_LINEAR), int(types.INTERP_CUBIC)], dtype=np.int32)
        self._pipeline = None
        self._in_flight: tuple | None = None

    def _build(self):
        gpu = self._device.type == "cuda"
        pipeline = self._dali.Pipeline(
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=self._device.index if gpu else None,
            # Depth 1: the host's buffers, which are fed without a copy, need not outlive more than one batch.
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        fn, types = self._dali.fn, self._dali.types
        with pipeline:
            encoded = fn.external_source(name="encoded", ndim=1, dtype=types.UINT8, no_copy=True)
            images = fn.decoders.image(
                encoded,
                device="mixed" if gpu else "cpu",
                output_type=types.RGB,
                # libjpeg's (and so PIL's) chroma upsampling; the GPU decoders' own differs by tens of levels.
                jpeg_fancy_upsampling=True,
                # As in timm: backbones were trained without the EXIF orientation.
                adjust_orientation=False,
                **({"hw_decoder_load": self._hw_decoder_load} if gpu else {}),
            )
            kind = fn.external_source(name="interpolation", ndim=0, dtype=types.INT32)
            resized = fn.resize(
                images,
                roi_start=fn.external_source(name="roi_start", ndim=1, dtype=types.FLOAT),
                roi_end=fn.external_source(name="roi_end", ndim=1, dtype=types.FLOAT),
                size=list(self._size),
                interp_type=fn.cast(kind, dtype=types.INTERP_TYPE),
                antialias=True,
            )
            pipeline.set_outputs(resized)
        pipeline.build()
        return pipeline

    def submit(self, encoded: list[np.ndarray], sampling: Geometry) -> None:
        """Starts decoding B images, [bytes] uint8 each."""
        self._pipeline = self._pipeline or self._build()  # a failure ends a DALI pipeline for good
        encoded = [without_exif(each) for each in encoded]
        self._pipeline.feed_input("encoded", encoded)
        self._pipeline.feed_input("roi_start", sampling.roi_start)
        self._pipeline.feed_input("roi_end", sampling.roi_end)
        self._pipeline.feed_input("interpolation", self._interpolations[sampling.interpolation])
        self._pipeline.schedule_run()
        self._in_flight = (encoded, sampling)  # DALI reads them

    def collect(self) -> Tensor:
        """The submitted batch: [B, h, w, 3] uint8 on the device.

        On CUDA the memory is DALI's, which reuses it: synchronise the current stream before dropping the tensor.

        Raises:
            DecodeError: some sample cannot be decoded.
        """
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
            self._in_flight = None
        tensor = torch.from_dlpack(images.as_tensor())
        self._pipeline.release_outputs()
        return tensor

    def drain(self) -> None:
        """Waits for a submitted batch, if there is one, and drops it."""
        if self._in_flight is not None:
            try:
                self._pipeline.share_outputs()  # without a stream, the host waits
                self._pipeline.release_outputs()
            except RuntimeError:
                self._pipeline = None
            self._in_flight = None

    def error_of(self, encoded: np.ndarray) -> str | None:
        """Why DALI cannot decode an image, [bytes] uint8; None if it can."""
        none, one = np.zeros((0, 1), np.int64), np.ones((1, 2), np.float32)
        self.submit([encoded], Geometry(0 * one, one, np.zeros(1, np.int64), none[:, 0], none, none))
        try:
            self.collect()
        except DecodeError:
            return "damaged: DALI cannot decode it"
        return None
