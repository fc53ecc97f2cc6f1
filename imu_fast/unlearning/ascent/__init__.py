"""Reweighted gradient ascent."""
