"""A worker: claims tickets, trains a pack, reports."""
