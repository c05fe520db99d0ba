"""Importing this registers the `svit_*` models and MoCo-v3's in timm."""

from fastalign.compat.locality_alignment.backbones import moco, svit  # noqa: F401
