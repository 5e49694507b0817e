"""Data: from the run file's sources to the batches of any step.

``prepare`` reads, recognises, renders and tokenises what the run file names, once, into a cache; ``batches`` makes the
steps of a run from it.
"""

from luthier.data.prepare import Prepared, prepare

__all__ = ["Prepared", "prepare"]
