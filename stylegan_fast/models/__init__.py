"""Whole networks, one module per paper."""
