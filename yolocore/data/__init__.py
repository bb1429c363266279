"""Data sets, augmentation and batches."""

from yolocore.data.dataset import (
    DatasetConfig,
    LabelledImage,
    Split,
    fingerprint,
    load_dataset_config,
    scan_split,
)
from yolocore.data.loader import Batch, ImageInfo, TrainLoader, ValLoader

__all__ = [
    "Batch",
    "DatasetConfig",
    "ImageInfo",
    "LabelledImage",
    "Split",
    "TrainLoader",
    "ValLoader",
    "fingerprint",
    "load_dataset_config",
    "scan_split",
]
