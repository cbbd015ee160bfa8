"""Evaluation: lm-eval-harness on model directories, tasks that need no download, and the table of results.

The harness takes seconds to import and is imported by `evaluate` only after its arguments have been checked.
"""

from flash_stu.evaluation.runner import evaluate

__all__ = ["evaluate"]
