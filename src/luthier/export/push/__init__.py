"""Pushing: which files of a folder go to the hub, how they go, and what the hub then holds."""
