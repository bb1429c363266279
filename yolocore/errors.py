"""Every exception that `yolocore` raises on purpose."""

WEIGHTS_SOURCE = (
    "nothing is downloaded: take it from the official YOLOv5 releases on GitHub "
    "(https://github.com/ultralytics/yolov5/releases), or the file that your YOLOv5 checkout downloaded"
)
"""What an error about a missing weights file says."""


class YolocoreError(Exception):
    """Root of the tree."""


class InputError(YolocoreError):
    """Something the user can fix. The message is one line naming file, key or line, value and what is allowed."""


class HyperparameterError(InputError):
    """A hyp file or mapping with an unknown key or an impossible value."""


class DatasetError(InputError):
    """A data set YAML, image or label file that cannot be used."""


class WeightsError(InputError):
    """A weights file that is missing, damaged or does not fit."""


class DeviceError(InputError):
    """A device or precision that this machine does not have."""


class CheckpointError(YolocoreError):
    """A checkpoint of our own that is damaged or belongs to another run."""


class TrainingError(YolocoreError):
    """Training could not go on."""
