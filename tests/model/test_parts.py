"""A model that is called with one part of a sequence after the other gives what it gives for the whole."""

import pytest
import torch

from flash_stu.errors import UserError
from flash_stu.ops.parts import Piece, part_size

LENGTH = 333
VARIANTS = {
    "shared": {},
    "separate": {"stu_branches": "separate"},
    "positive": {"stu_branches": "positive"},
    "hankel_l": {"filter_basis": "hankel_l"},
    "full": {"stu_type": "full"},
    "few lags": {"max_position_embeddings": 64, "stu_branches": "separate"},
    "taps": {"stu_input_taps": 3, "stu_output_taps": 2},
    "full taps": {"stu_type": "full", "stu_input_taps": 3, "stu_output_taps": 2},
    "lds": {"lds_state_dim": 12},
    "trainable lds": {"lds_state_dim": 12, "lds_trainable": True, "stu_branches": "separate", "stu_input_taps": 2},
    "full lds": {"lds_state_dim": 12, "stu_type": "full"},
    "alibi": {"position_embedding": "alibi", "num_key_value_heads": 2, "sliding_window": 75},
}


def in_parts(model, ids, parts):
    """The last hidden states, part by part."""
    length, carried, outputs = ids.shape[1], {}, []
    size = part_size(length, parts)
    for start in range(0, length, size):
        part = Piece(start, length, carried)
        outputs.append(model.model(input_ids=ids[:, start : start + size], part=part).last_hidden_state)
        carried = part.left
    return torch.cat(outputs, dim=1)


def draw_taps(model):
    """Taps are zero at first; with others there is something to see."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "taps.M_" in name:
                parameter.normal_(std=0.2 / parameter[0].numel() ** 0.5 if parameter.ndim == 3 else 0.2)
            if "change" in name:
                parameter.normal_()


@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_are_those_of_the_whole(tiny_model, variant, parts):
    changes = {"max_position_embeddings": 400, "conv_backend": "auto"} | VARIANTS[variant]
    model = tiny_model(**changes).train()
    draw_taps(model)
    length = min(LENGTH, changes["max_position_embeddings"] - 1)
    ids = torch.randint(61, (2, length), generator=torch.Generator().manual_seed(0))
    weights = torch.randn(1, length, 32, generator=torch.Generator().manual_seed(1))
    found = []
    for run in (lambda: model.model(input_ids=ids).last_hidden_state, lambda: in_parts(model, ids, parts)):
        outputs = run()
        (outputs * weights).sum().backward()
        found.append([outputs.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    for whole, several in zip(*found, strict=True):
        assert (several - whole).norm() < 2e-5 * whole.norm()


def test_what_a_part_does_not_go_with(tiny_model):
    model, ids = tiny_model(), torch.zeros(1, 8, dtype=torch.long)
    for arguments, what in (
        ({"use_cache": True}, "a cache"),
        ({"output_attentions": True}, "output_attentions"),
        ({"attention_mask": torch.tensor([[0] + [1] * 7])}, "padding"),
        ({"seq_idx": torch.tensor([[0] * 4 + [1] * 4])}, "several documents"),
    ):
        with pytest.raises(UserError, match=f"a sequence in parts does not go with {what}"):
            model(input_ids=ids, part=Piece(0, 16, {}), **({"use_cache": False} | arguments))
    for changes, what in (
        ({"conv_backend": "fft"}, "'fft' needs the whole sequence"),
        ({"filter_basis": "tensor", "tensor_filters": 2}, "'tensor' has no states"),
    ):
        with pytest.raises(UserError, match=what):
            tiny_model(**changes)(input_ids=ids, part=Piece(0, 16, {}), use_cache=False)
