"""Adapters merged into their base, in a stream."""
