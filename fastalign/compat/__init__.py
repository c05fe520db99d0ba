"""The authors' package `locality_alignment` and their scripts on our parts."""
