"""Data sets, augmentation and the deterministic image stream."""
