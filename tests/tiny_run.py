"""The settings of a run that trains in a second."""

from pathlib import Path


def run_settings(output_dir: Path, dataset: Path, cache_dir: Path) -> dict:
    """A tiny hybrid on bytes: 6 steps of 4 sequences of 24 tokens; a fresh dictionary at every call."""
    return {
        "output_dir": str(output_dir),
        "model": {
            "vocab_size": 264,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "sliding_window": 7,
            "max_position_embeddings": 24,
            "num_filters": 4,
        },
        "data": {
            "dataset": str(dataset),
            "tokenizer": "bytes",
            "cache_dir": str(cache_dir),
            "validation_fraction": 0.2,
        },
        "train": {
            "sequence_length": 24,
            "global_batch_size": 96,
            "micro_batch_size": 2,
            "steps": 6,
            "dtype": "float32",
        },
        "wandb": {"mode": "disabled"},
    }
