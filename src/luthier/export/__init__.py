"""One door out: merging, casting and re-sharding in a stream, and the proof of what was written.

The package bears the name of the library's function: ``luthier.export(src, dst, to="merged")`` is this module, called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Door(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from luthier.api import export

        return export(*arguments, **options)


sys.modules[__name__].__class__ = _Door
