"""Data: sources of encoded images, DALI decoding and resizing, augmentation on the device, batches for a rank."""

from fastalign.data.loader import Batch, Loader
from fastalign.data.sources import open_source
from fastalign.data.transforms import Transform

__all__ = ["Batch", "Loader", "Transform", "open_source"]
