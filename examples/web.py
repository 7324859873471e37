"""Whether the web answers, found out in seconds."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import urllib.request
from collections.abc import Iterator, Sequence

# Seconds that a server gets to answer.
TIMEOUT = 3.0


def check(urls: Sequence[str]) -> None:
    """Raise OSError unless one of the ``urls`` answers within twice `TIMEOUT`."""
    answers: queue.Queue[OSError | None] = queue.Queue()

    def ask() -> None:
        failure = OSError("there is no server")
        for url in urls:
            request = urllib.request.Request(url, method="HEAD")
            try:
                urllib.request.urlopen(request, timeout=TIMEOUT).close()
            except OSError as error:
                failure = error
            else:
                answers.put(None)
                return
        answers.put(failure)

    # A thread, because looking a name up obeys no timeout; a daemon, because nobody waits for it.
    threading.Thread(target=ask, daemon=True).start()
    try:
        failure = answers.get(timeout=2 * TIMEOUT)
    except queue.Empty:
        raise TimeoutError(f"no server answered within {2 * TIMEOUT:.0f} s") from None
    if failure is not None:
        raise failure


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """Within it every connection that names no timeout of its own has `TIMEOUT`."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def first_line(error: Exception) -> str:
    """What went wrong, without the list of servers that torchvision adds."""
    return str(error).strip().splitlines()[0].rstrip(":") if str(error) else type(error).__name__
