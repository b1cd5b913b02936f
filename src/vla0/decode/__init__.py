"""Batch → levels. Every decoder returns exactly (H, D) levels, the ones that `reference.decode` returns."""

from vla0.decode.reference import decode

__all__ = ["decode"]
