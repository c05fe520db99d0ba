"""The demo: mosaics of ten photographs, a small teacher trained on them, and a summary of the run."""
