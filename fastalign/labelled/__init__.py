"""Images with label maps: COCO, ADE20K, folders, tar shards, and their download (docs/probe.md)."""
