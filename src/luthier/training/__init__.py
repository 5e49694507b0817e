"""Training: what happens between a run file and a proven final folder."""
