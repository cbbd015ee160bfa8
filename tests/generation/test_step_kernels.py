"""A compiled step launches few kernels on a GPU: each takes longer to start than to run."""

import pytest
import torch
from gpu_kernels import count_kernels

from flash_stu import FlashSTUCache
from flash_stu.generation.static_step import _step

# norm, in_proj, states with their sum; norm, gate and up, activation, down
LDS = 7
# norm, q k v, rotation, write of key and value, scores, softmax, values, o_proj; norm, gate and up, activation, down
ATTENTION = 12
REST = 5  # angles twice, last norm, head, position


@pytest.mark.skipif(torch.__version__ < "2.13", reason="what is fused is PyTorch's choice; counted with 2.13")
@pytest.mark.parametrize("kind", ["linear_attention", "sliding_attention"])
@torch.no_grad()
def test_kernels_of_a_block(tiny_model, kind):
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "sliding_window": 64}
    model = tiny_model(lds_state_dim=16, layer_types=[kind] * 2, num_hidden_layers=2, **shape).bfloat16()
    cache = FlashSTUCache(2)
    model(torch.zeros(1, 5, dtype=torch.long), past_key_values=cache)
    count = count_kernels(
        _step, model, torch.zeros(1, 1, dtype=torch.long), torch.full((1,), 5), None, tuple(cache.states)
    )
    block = LDS if kind == "linear_attention" else ATTENTION
    assert 2 * block < count <= 2 * block + REST
