"""Run a Space's app without network access beyond this machine.

`check_space` in publish.py starts `offline.py PARENT` in the Space's folder; the app ends when the
process PARENT does.
"""

import os
import runpy
import socket
import sys
import threading
import time

LOCAL = ("127.0.0.1", "::1", "localhost")


def end_with(parent: int) -> None:
    """End this process as soon as `parent` is no longer its parent."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def connect(sock, address, real=socket.socket.connect):
    """Connect to this machine only."""
    if isinstance(address, tuple) and address[0] not in LOCAL:
        raise OSError(f"A Space must start without the network, but this one asked for {address}")
    return real(sock, address)


if __name__ == "__main__":
    threading.Thread(target=end_with, args=[int(sys.argv[1])], daemon=True).start()
    socket.socket.connect = connect
    sys.path[0] = os.getcwd()  # as `python app.py` would have it
    runpy.run_path("app.py", run_name="__main__")
