"""The detector: one network that carries K YOLOv5 models."""

from yolocore.model.anchors import DEFAULT_ANCHORS, STRIDES, default_anchors
from yolocore.model.yolov5 import ANCHORS_KEY, ModelSize, YOLOv5, initial_state

__all__ = ["ANCHORS_KEY", "DEFAULT_ANCHORS", "STRIDES", "ModelSize", "YOLOv5", "default_anchors", "initial_state"]
