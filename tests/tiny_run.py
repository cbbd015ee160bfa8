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


def training_settings(output_dir: Path, corpus: Path) -> dict:
    """The settings of that run with validations at the steps 3 and 6 and checkpoints at 2, 4 and 6."""
    settings = run_settings(output_dir, corpus / "text.jsonl", corpus / "cache") | {"seed": 1}
    settings["train"] |= {"validation_every": 3, "validation_tokens": 240, "checkpoint_every": 2, "log_every": 1}
    settings["optimizer"] = {"learning_rate": 1e-2, "min_learning_rate": 1e-3, "warmup_steps": 2}
    return settings
