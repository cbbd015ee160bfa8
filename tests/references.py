"""Reference forms that several packages' tests hold the fast ones against."""

import torch

from flash_stu.ops.lds import State, lds_advance


def lds_scan(x: torch.Tensor, decay: torch.Tensor, readout: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
    """Run a diagonal linear dynamical system token by token; arguments and results are those of `lds_chunked`."""
    outputs = []
    for t in range(x.shape[1]):
        state = lds_advance(x[:, t], decay, state)
        outputs.append((readout.double().t() * state[-1].double()).sum(dim=2))
    return torch.stack(outputs, dim=1).to(x.dtype), state
