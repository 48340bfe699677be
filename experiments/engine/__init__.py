"""What runs any experiment, and imports none: no model, no data, no claim."""
