"""Checks whether a server can be reached, once and within seconds, before libraries try for minutes."""

import functools
import sys
import threading
from contextlib import suppress

import huggingface_hub.constants
import requests

_SECONDS = 5


@functools.cache
def is_reachable(url: str) -> bool:
    """Returns whether a server answers, whatever it says; proxies of the environment are used. Asked once a process."""
    answers = []

    def ask() -> None:
        with suppress(requests.RequestException, OSError, ValueError):
            answers.append(requests.head(url, timeout=_SECONDS))

    asking = threading.Thread(target=ask, daemon=True)  # the look-up of a name has no time limit of its own
    asking.start()
    asking.join(_SECONDS)
    return bool(answers)


def spare_the_hub() -> None:
    """Put the Hugging Face libraries into their offline mode if the hub cannot be reached.

    They then read their caches only, and raise an error for a missing entry without a minute of retries.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE or is_reachable(huggingface_hub.constants.ENDPOINT):
        return
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:  # which has taken a copy
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
