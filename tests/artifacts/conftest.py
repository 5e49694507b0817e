"""Puts the makers of folders on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
