"""Patch-level probing: what a small head can read off a frozen backbone's tokens (docs/probe.md)."""
