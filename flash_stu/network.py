"""Asks servers once and within seconds, before libraries try for minutes."""

import functools
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import huggingface_hub.constants
import requests
from huggingface_hub.errors import RepositoryNotFoundError

from flash_stu.errors import UserError

T = TypeVar("T")

HUB_TIMEOUT = 10  # seconds to wait for the hub before reporting that it cannot be reached
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


def ask_hub(question: Callable[[], T], missing: str, unreachable: str, hint: str = "") -> T:
    """Returns the hub's answer to a question about a repository.

    Raises:
        UserError: with the message for a repository that does not exist, or for a hub that cannot be asked.
    """
    spare_the_hub()
    try:
        return question()
    except RepositoryNotFoundError as error:
        raise UserError(f"{missing}{hint}") from error
    except Exception as error:  # the HTTP library's own errors differ between versions
        raise UserError(f"{unreachable} ({type(error).__name__}){hint}") from error
