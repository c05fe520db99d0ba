"""Evaluation of backbones: probes of patches (docs/probe.md) and image classification (docs/classify.md)."""
