"""Export of aligned backbones to other libraries: ``fastalign export RUN --to TARGET``."""

from fastalign.export.run import load_decoder
from fastalign.export.write import export

__all__ = ["export", "load_decoder"]
