"""YOLOv5 to the numbers: model, shared loss core, trainer, data and metrics, for a pack of K trials at once."""
