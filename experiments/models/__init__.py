"""Parameters and functions of arrays: no data, and no optimiser."""
