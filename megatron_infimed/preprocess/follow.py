"""A process that ends, with its whole group, when the one that started it does.

It imports nothing, so that this holds from the first moment on, while the rest of the package is still being imported.
"""

from __future__ import annotations

import os
import signal
import threading
import time

_POLL = 0.1


def follow(parent: int) -> None:
    """Watches in a thread. `parent` comes from the parent itself: read here, it might already be the one that takes up orphans."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
