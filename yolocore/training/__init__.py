"""The pack of K slots and its trainer."""

from yolocore.training.config import TrainConfig
from yolocore.training.trainer import EpochReport, PackTrainer, SlotStart, TrainingData

__all__ = ["EpochReport", "PackTrainer", "SlotStart", "TrainConfig", "TrainingData"]
