"""Data: sources of encoded images, DALI decoding and resizing, augmentation on the device, batches for a rank."""
