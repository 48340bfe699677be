"""Data sets: arrays, and nothing of what is done with them."""
