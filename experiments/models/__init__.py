"""Parameters and functions of arrays, whatever the data."""
