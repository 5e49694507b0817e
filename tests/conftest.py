"""Puts the shared makers of `tiny.py` on the path, and keeps every test off the network."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = (
    "1"  # tests and the processes they start run side by side; threads that spin starve them
)
sys.path.insert(0, str(Path(__file__).parent))
