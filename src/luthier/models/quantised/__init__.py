"""Bases held in 4 or 8 bits: formats of one matrix, the layer that computes with them, adapters on it, and reading."""
