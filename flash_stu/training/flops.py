"""FLOPs per token of a model and peak rates of GPUs, for MFU (model FLOPs utilisation).

Model FLOPs per token of a sequence of L tokens, a multiplication and an addition counted as two, with D = hidden_size,
I = intermediate_size, V = vocab_size, H heads and G key-value heads of size D / H:

    projections  2 D^2 (2 + 2 G / H) of an attention layer; 2 D^2 of an STU or LDS layer (its M_inputs)
    attention    4 D n: scores and weighted values over the n keys that a token sees on average, the mean over t < L of
                 min(t + 1, sliding_window)
    conv         the causal convolution by FFT and its filter, see below
    mlp          6 D I
    head         2 D V

Convolution: with d = 2 for shared branches (taps on even lags only: polyphase) and else d = 1, a channel's sequence is
d interleaved ones of n = ceil(L / d) tokens. Padded to N = 2 n, so that nothing wraps around, each is transformed,
multiplied by the spectrum of its filter, and transformed back. A real FFT of size N counts 2.5 N log2 N and a complex
multiplication 6, so that a channel of one sequence costs

    (2 d + 1) 2.5 N log2 N + 6 d (N / 2 + 1)        the 1: the filter's own transform

The filters (n taps, D channels) are themselves a product of the spectral filters and the learned coefficients,
2 n F D with F = num_filters (twice that for separate branches); in an LDS layer F is the number of states of a phase.
These two terms belong to a call, not to a sequence, and are counted as in a call of one sequence. A layer with stu_type
"full" convolves every channel with each of F filters and multiplies the results by F matrices: F times the convolution,
with one filter's transform for all channels, and 2 F D^2 for the projections.

Taps of inputs and outputs, k of them together, cost 2 k D, counted with the convolution; 2 k D^2 where they are
matrices ("full"), counted with the projections.

A training step counts three times the forward pass: once forward, twice for the gradients of inputs and weights.
Recomputation (activation checkpointing, spectra in backward) is not counted, nor are norms, gates, biases, the softmax,
positions and the optimizer: they are the price of a method, and MFU would reward it.

Source: Chowdhery et al. 2022, PaLM (arXiv 2204.02311), appendix B, for MFU and the factor of three.
"""

import math
import re

import torch

from flash_stu.model.config import FlashSTUConfig

# Dense tensor-core rates in bf16 (and fp16) with float32 sums, from NVIDIA's data sheets, which state twice as much for
# sparse matrices from A100 on; the first row whose words are all in the device's name holds.
_TERAFLOPS = (
    ("GB200", 2500.0),  # GB200 NVL72: 5 PFLOP/s sparse
    ("B200", 2250.0),  # HGX B200: 36 PFLOP/s sparse for eight
    ("GH200", 989.5),  # GH200 Grace Hopper: 1979 sparse
    ("H200 NVL", 835.5),  # H200: 1671 sparse
    ("H200", 989.5),  # H200 SXM: 1979 sparse
    ("H100 NVL", 835.5),  # H100 NVL: 1671 sparse
    ("H100 PCIe", 756.5),  # H100 PCIe: 1513 sparse
    ("H100", 989.5),  # H100 SXM: 1979 sparse
    ("A100", 312.0),  # A100 PCIe and SXM, 40 and 80 GB
    ("L40S", 362.0),
    ("A10", 125.0),
    ("L4", 121.0),
)


DATA_SHEET_RATES = dict(_TERAFLOPS)


def forward_flops(config: FlashSTUConfig, length: int) -> dict[str, float]:
    """Returns the FLOPs per token of a forward pass, by part.

    Args:
        config: the model's.
        length: tokens of a sequence.

    Returns:
        {"projections", "conv", "attention", "mlp", "head"}, summed over the layers; formulas at the head of this file.
    """
    size = config.hidden_size
    attention_layers = (config.layer_types or []).count("sliding_attention")
    linear_layers = config.num_hidden_layers - attention_layers
    grouped = (config.num_key_value_heads or config.num_attention_heads) / config.num_attention_heads
    full = config.stu_type == "full"
    matrices = _features(config) + _taps(config) if full else 1
    return {
        "projections": 2.0 * size**2 * (attention_layers * (2 + 2 * grouped) + linear_layers * matrices),
        "conv": linear_layers * _convolution(config, length),
        "attention": attention_layers * 4.0 * size * mean_keys(length, config.sliding_window),
        "mlp": config.num_hidden_layers * 6.0 * size * config.intermediate_size,
        "head": 2.0 * size * config.vocab_size,
    }


def train_flops(config: FlashSTUConfig, length: int) -> float:
    """Returns the FLOPs per token of a training step: three times the forward pass."""
    return 3 * sum(forward_flops(config, length).values())


def mean_keys(length: int, window: int) -> float:
    """Returns the keys that a token sees on average: the mean over t < length of min(t + 1, window)."""
    ramp = min(length, window)
    return (ramp * (ramp + 1) / 2 + (length - ramp) * window) / length


def _features(config: FlashSTUConfig) -> int:
    return config.num_filters * (2 if config.stu_branches == "separate" else 1)


def _taps(config: FlashSTUConfig) -> int:
    return config.stu_input_taps + config.stu_output_taps


def _convolution(config: FlashSTUConfig, length: int) -> float:
    """Returns the FLOPs per token of one layer's convolution and filters."""
    size, dilation = config.hidden_size, config.stu_dilation
    taps = math.ceil(length / dilation)
    padded = 2 * taps
    transform = 2.5 * padded * math.log2(padded)
    sequences = size * dilation  # that are transformed, multiplied and transformed back, by one filter each
    convolved = sequences * (2 * transform + 6 * (padded / 2 + 1))
    states = None if config.lds_state_dim is None else config.lds_state_dim // dilation
    if config.stu_type == "full":
        features = _features(config)
        filters = 0 if states is None else 2 * taps * states * features
        return (features * (convolved + transform) + filters) / length
    filters = 2 * taps * (_features(config) if states is None else states) * size
    return (convolved + size * transform + filters) / length + 2 * size * _taps(config)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Returns the rate of matrix products that a GPU's maker states, in FLOP/s.

    Args:
        device: of the model.
        dtype: of the products.

    Returns:
        the dense tensor-core rate; None for a CPU, a slice of a GPU, a GPU that is not in the table, and for float32,
        which does not run on the tensor cores.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    words = set(re.split(r"\W+", torch.cuda.get_device_name(device)))
    if "MIG" in words:
        return None
    return next((1e12 * rate for name, rate in _TERAFLOPS if words.issuperset(name.split())), None)
