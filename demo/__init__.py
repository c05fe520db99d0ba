"""The demo: mosaics of ten photographs, a small teacher trained on them, and probes of both models."""
