"""Data sets of the studies, and what is forgotten of them."""
