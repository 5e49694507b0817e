"""Puts the shared makers of `tiny.py` on the path, and keeps every test off the network."""

import os
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = (
    "1"  # tests and the processes they start run side by side; threads that spin starve them
)
sys.path.insert(0, str(Path(__file__).parent))
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell starts jobs in the background so, and children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
