"""The embedded default: a small real model and a small real data set, end to end."""
