"""Patch-level probes: what a backbone's patch embeddings say about the classes in each patch."""
