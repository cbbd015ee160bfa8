"""Evaluation: lm-eval-harness on model directories, tasks that need no download, and the table of results."""

from flash_stu.evaluation.runner import evaluate

__all__ = ["evaluate"]
