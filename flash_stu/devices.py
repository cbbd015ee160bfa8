"""The device to compute on, and the dtype that suits it."""

import torch

from flash_stu.errors import UserError


def default_device() -> torch.device:
    """Returns the first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_device(name: str | None) -> torch.device:
    """Returns the device of that name, or the default one for None.

    Raises:
        UserError: for a name that means no device here.
    """
    if name is None:
        return default_device()
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    allowed = ["cpu", *["cuda"] * bool(gpus), *gpus]
    if name not in allowed:
        raise UserError(f"device is {name!r}; allowed here: {', '.join(allowed)}")
    return torch.device(name)


def default_dtype(device: torch.device) -> torch.dtype:
    """Returns bfloat16 on a GPU, float32 on the CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
