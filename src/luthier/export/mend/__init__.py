"""Folders that open nowhere, mended or recovered from what is left of them."""
