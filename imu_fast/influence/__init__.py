"""Influence scores, and the weights made of them."""
