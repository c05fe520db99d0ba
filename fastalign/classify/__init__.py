"""How well a backbone's features classify images: ``python -m fastalign.classify``, or `classify` from Python."""

from fastalign.classify.evaluate import classify

__all__ = ["classify"]
