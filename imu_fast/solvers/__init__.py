"""Damped linear solves."""
