"""Claims of the notes, put to the test: an experiment a file or folder."""
