"""``python -m luthier.data.worker``: a process that tokenises for another one, through its standard input and output.

The first frame it reads makes its encoder, every further one is a list of samples; it answers each with one frame. It
ends when its input does, so it never outlives the process that started it.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence

from luthier.data.encode import Encoder
from luthier.data.formats import Conversation, Text
from luthier.data.frames import READY, Failed, receive, send
from luthier.data.offenders import SampleError
from luthier.data.template import Encoded
from luthier.errors import LuthierError


def main() -> None:
    """Answer frames until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the other end decides what it means
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not get between the frames
    try:
        encoder = Encoder(*receive(requests))
        send(answers, READY)
        while True:
            send(answers, _result(encoder, receive(requests)))
    except (EOFError, BrokenPipeError):
        return


def _result(encoder: Encoder, contents: Sequence[Conversation | Text]) -> Sequence[Encoded | SampleError] | Failed:
    try:
        return encoder.encode(contents)
    except LuthierError as error:
        return Failed(error)
    except Exception:  # its own class need not exist, or unpickle, at the other end
        return Failed(RuntimeError(traceback.format_exc()))


if __name__ == "__main__":
    main()
