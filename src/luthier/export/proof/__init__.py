"""Proof that an artefact answers as the live model did, in plain libraries and a process of its own."""
