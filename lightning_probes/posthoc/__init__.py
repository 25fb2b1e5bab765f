"""Probe networks that are not being trained, and checkpoints."""
