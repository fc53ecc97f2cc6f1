"""Data sets that the command line and the demo read."""
