"""Unlearning: methods, depths, records, results."""
