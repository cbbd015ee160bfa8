"""Names of lm-eval that are replaced while it runs, for want of settings.

tests/evaluation/test_lm_eval_names.py checks that they are still there and still used.
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from unittest.mock import patch

import datasets
import lm_eval.api.task
import lm_eval.utils
from tqdm import tqdm


@contextmanager
def quiet(level: int = logging.WARNING) -> Iterator[None]:
    """Keep the harness's prints, log lines below a level, and progress bars but ours off the terminal."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    hidden = datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(level)
    datasets.disable_progress_bars()
    try:
        bar = functools.partial(tqdm, disable=True)
        with redirect_stdout(StringIO()), patch.object(lm_eval.api.task, "tqdm", bar):
            yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)
        if not hidden:
            datasets.enable_progress_bars()


@contextmanager
def compiled_templates() -> Iterator[None]:
    """Compile each prompt template once; the harness does it for every row, which is most of its own time."""
    env = lm_eval.utils.env
    with patch.object(env, "from_string", functools.cache(env.from_string)):
        yield
