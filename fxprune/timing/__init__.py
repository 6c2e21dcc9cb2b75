"""Seconds in a runtime: networks timed against each other, layers in tables, and what a candidate will take before it is made."""
