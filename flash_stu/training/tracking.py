"""Weights & Biases beside metrics.jsonl: whether it can be used, found out before a run begins."""

import importlib.util
import os
from pathlib import Path

import requests

from flash_stu.errors import UserError
from flash_stu.network import is_reachable
from flash_stu.training.config import RunConfig

_SERVER = "https://api.wandb.ai"
_INIT_SECONDS = 60
_CREDENTIALS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")


def check_wandb(mode: str) -> str:
    """The mode to use: "auto" is offline where wandb is installed, else disabled.

    Raises:
        UserError: if wandb is asked for by name and not installed, or "online" without a key or a network.
    """
    installed = importlib.util.find_spec("wandb") is not None
    if mode == "auto":
        return "offline" if installed else "disabled"
    if mode != "disabled" and not installed:
        raise UserError(f"wandb.mode is {mode!r}, but wandb is not installed (pip install wandb); or use 'disabled'")
    if mode == "online":
        server = os.environ.get("WANDB_BASE_URL") or _SERVER
        if not any(os.environ.get(name) for name in _CREDENTIALS) and not requests.utils.get_netrc_auth(server):
            raise UserError(f"wandb.mode is 'online', but there is no key for {server}: wandb login, or use 'offline'")
        if not is_reachable(server):
            raise UserError(f"wandb.mode is 'online', but {server} cannot be reached; or use 'offline'")
    return mode


def start_wandb(config: RunConfig, folder: Path, run_id: str):
    """Start a wandb run, or return None where it is disabled. Its files go to the run directory.

    Raises:
        UserError: if wandb refuses, for example a key.
    """
    mode = check_wandb(config.wandb.mode)
    if mode == "disabled":
        return None
    import wandb  # optional, and slow to import

    try:
        return wandb.init(
            mode=mode,
            project=config.wandb.project,
            name=config.wandb.name or folder.name,
            dir=folder,
            id=run_id,
            resume="allow" if mode == "online" else None,  # an offline run cannot be resumed; sync appends by id
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off", init_timeout=_INIT_SECONDS),
        )
    except (wandb.Error, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"wandb.mode is {mode!r}, but a run cannot be started: {reason}; or use 'disabled'") from None
