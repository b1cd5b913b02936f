"""Measure how fast and how exactly this machine decodes."""
