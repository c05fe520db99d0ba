"""Images with label maps: COCO, ADE20K, folders, tar shards (docs/probe.md)."""
