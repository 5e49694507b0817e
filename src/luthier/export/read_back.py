"""Reading an export back before it gets its name: what is on the device is what was meant to be written."""

from __future__ import annotations

import time
from pathlib import Path

from luthier.artifacts import manifest as manifests
from luthier.artifacts.files import readable_size
from luthier.artifacts.manifest import Manifest


def check_written(folder: Path, manifest: Manifest) -> str:
    """Compare every byte with the digests made while writing, from the device where the system lets the cache be dropped.

    Returns a sentence with the time it took.

    Raises:
        ArtifactError: bytes differ; file, range and tensor are named.
    """
    begun = time.perf_counter()
    manifests.forget(folder)
    manifests.raise_problems(folder, manifests.read_back(folder, manifest))
    return (
        f"{readable_size(manifest.size)} read back and equal to their digests, in {time.perf_counter() - begun:.1f} s"
    )
