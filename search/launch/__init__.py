"""Starts workers and watches over them."""
