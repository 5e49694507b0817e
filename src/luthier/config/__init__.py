"""The run file: its types, reading and writing, hints for wrong keys, and what may change on resume."""
