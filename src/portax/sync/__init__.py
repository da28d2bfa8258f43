"""Weights into a live engine, in place."""
