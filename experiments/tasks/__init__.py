"""Models that are trained to do something: an experiment a file."""
