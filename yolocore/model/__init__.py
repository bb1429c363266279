"""The stacked YOLOv5 network."""
