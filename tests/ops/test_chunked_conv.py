"""The chunked convolution, its fit of the far lags, and the choice between back ends."""

import logging

import pytest
import torch

from flash_stu.errors import UserError
from flash_stu.filters.exponentials import tail_map
from flash_stu.filters.spectral import spectral_filters
from flash_stu.ops.conv import choice as module
from flash_stu.ops.conv.choice import causal_conv, spectral_conv
from flash_stu.ops.conv.chunked import chunked_conv
from flash_stu.ops.conv.tail import exponential_tail


def draw(batch, length, channels, chunk, states, dtype=torch.float64):
    """Inputs, near taps up to lag chunk, decays and readout; the rest of the filter follows from them."""
    torch.manual_seed(0)
    x = torch.randn(batch, length, channels, dtype=dtype, requires_grad=True)
    near = torch.randn(chunk + 1, channels, dtype=dtype, requires_grad=True)
    decay = torch.rand(states, dtype=torch.float64) * 1.8 - 0.9
    readout = torch.randn(states, channels, dtype=dtype, requires_grad=True)
    return x, near, decay, readout


def whole_filter(near, decay, readout, lags):
    far = decay ** torch.arange(lags, dtype=torch.float64)[:, None] @ readout
    return torch.cat([near, far])[:lags]


SHAPES = [
    # batch, length, channels, chunk, states, dilation
    (2, 37, 3, 4, 3, 1),
    (3, 50, 2, 4, 3, 2),
    (1, 64, 5, 8, 2, 2),
    (2, 24, 2, 4, 3, 3),
    (2, 3, 2, 4, 3, 2),
    (2, 1, 2, 2, 1, 3),
]


@pytest.mark.parametrize("segment", [1, 2**21])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_definition(shape, segment, monkeypatch):
    monkeypatch.setattr("flash_stu.ops.conv.chunked._ELEMENTS", {False: segment, True: segment})
    *sizes, dilation = shape
    x, near, decay, readout = draw(*sizes)
    chunk = sizes[3]
    weight = torch.randn_like(x)
    inputs = (x, near, readout)

    y, _ = chunked_conv(x, whole_filter(near, decay, readout, 2 * chunk), decay, readout, None, dilation)
    got = torch.autograd.grad((y * weight).sum(), inputs)
    exact = causal_conv(x, whole_filter(near, decay, readout, max(x.shape[1], 2 * chunk)), "direct", dilation)
    expected = torch.autograd.grad((exact * weight).sum(), inputs, materialize_grads=True)
    torch.testing.assert_close(y, exact)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dilation", [1, 2])
def test_a_stream_is_the_whole_sequence(dilation):
    x, near, decay, readout = draw(2, 61, 3, 4, 3)
    taps = whole_filter(near, decay, readout, 8)
    weight = torch.randn_like(x)
    whole, last = chunked_conv(x, taps, decay, readout, None, dilation)
    parts, state = [], None
    for part in x.split([1, 6, 0, 17, 3, 34], dim=1):
        y, state = chunked_conv(part, taps, decay, readout, state, dilation)
        parts.append(y)
    stream = torch.cat(parts, dim=1)
    torch.testing.assert_close(stream, whole)
    torch.testing.assert_close(tuple(state), tuple(last))

    inputs = (x, near, readout)
    expected = torch.autograd.grad((whole * weight).sum() + last.far.sum(), inputs, retain_graph=True)
    got = torch.autograd.grad((stream * weight).sum() + state.far.sum(), inputs)
    torch.testing.assert_close(got, expected)


def test_gradients_against_finite_differences():
    x, near, decay, readout = draw(2, 9, 2, 2, 2)

    def outputs(x, near, readout):
        return chunked_conv(x, whole_filter(near, decay, readout, 4), decay, readout, None, 2)[0]

    assert torch.autograd.gradcheck(outputs, (x, near, readout))


def test_operator_is_registered_soundly():
    x, near, decay, readout = draw(2, 13, 3, 2, 2)
    taps = whole_filter(near, decay, readout, 4).detach().requires_grad_()
    history, far = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 2, 3, 2, dtype=torch.float64)
    inputs = (x, history.requires_grad_(), far.requires_grad_(), taps, decay, readout)
    torch.library.opcheck(torch.ops.flash_stu.chunked_conv.default, inputs)
    filters = torch.randn(100, 3)
    torch.library.opcheck(torch.ops.flash_stu.exponential_tail.default, (filters, 33, True))


def spectral(length, filters, basis="hankel", dilation=1, branches="positive"):
    _, phi = spectral_filters(length, filters, basis)
    phi = phi[::dilation].float()
    if branches == "separate":
        phi = torch.cat([phi, phi * (-1.0) ** torch.arange(len(phi))[:, None]], dim=1)
    return phi


@pytest.mark.parametrize(
    ("length", "filters", "basis", "dilation", "branches"),
    [
        (1000, 24, "hankel", 2, "shared"),
        (8192, 24, "hankel", 2, "shared"),
        (8192, 24, "hankel", 1, "separate"),
        (5000, 24, "hankel_l", 1, "positive"),
        (131072, 24, "hankel", 1, "positive"),
    ],
)
def test_exponentials_meet_the_far_lags(length, filters, basis, dilation, branches):
    phi = spectral(length, filters, basis, dilation, branches)
    both = dilation == 1 and (branches == "separate" or basis == "hankel_l")
    decay, weights = exponential_tail(phi, 33, both)
    assert decay.abs().max() < 1 and weights.abs().max() < 1.5
    torch.manual_seed(0)
    mix = torch.randn(phi.shape[1], 16)
    # in single precision, as it will run
    lags = torch.arange(len(phi) - 33, dtype=torch.float64)[:, None]
    error = (decay**lags).float() @ (weights @ mix) - phi[33:] @ mix
    assert error.norm() / (phi @ mix).norm() < 1e-6


CASES = [
    # filter length, tokens, dilation, basis, branches
    (1000, 1000, 2, "hankel", "shared"),
    (1500, 777, 1, "hankel", "separate"),
    (1000, 999, 1, "hankel_l", "positive"),
    (1000, 30, 2, "hankel", "shared"),
    (90, 50, 2, "hankel", "shared"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("length", "tokens", "dilation", "basis", "branches"), CASES)
def test_spectral_filters_against_float64(length, tokens, dilation, basis, branches, dtype, tolerance):
    phi = spectral(length, 16, basis, dilation, branches)
    both = dilation == 1 and (branches == "separate" or basis == "hankel_l")
    torch.manual_seed(0)
    x = torch.randn(2, tokens, 5).to(dtype).requires_grad_()
    weights = torch.randn(phi.shape[1], 5).requires_grad_()
    weight = torch.randn(2, tokens, 5).to(dtype)
    y = spectral_conv(x, phi, weights, "chunked", dilation, both)
    assert y.dtype == dtype
    got = (y, *torch.autograd.grad((y * weight).sum(), (x, weights)))

    x64, weights64 = (t.detach().double().requires_grad_() for t in (x, weights))
    exact = spectral_conv(x64, phi.double(), weights64, "direct", dilation)
    expected = (exact, *torch.autograd.grad((exact * weight.double()).sum(), (x64, weights64)))
    for result, reference in zip(got, expected, strict=True):
        assert (result.double() - reference).norm() / reference.norm() < tolerance


def test_autocast_does_not_round_the_states():
    phi, x = spectral(500, 16), torch.randn(1, 500, 3)
    weights = torch.randn(16, 3)
    expected = spectral_conv(x, phi, weights, "chunked")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(spectral_conv(x, phi, weights, "chunked"), expected)


def test_compiles_to_one_graph_for_any_length():
    phi, weights = spectral(3000, 8), torch.randn(8, 3, requires_grad=True)

    def function(x, weights):
        return spectral_conv(x.sin(), phi, weights, "auto", 2).cos()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for length in (1500, 1600, 40):
        x = torch.randn(2, length, 3, requires_grad=True)
        torch.testing.assert_close(compiled(x, weights), function(x, weights))
        got = torch.autograd.grad(compiled(x, weights).sum(), (x, weights))
        torch.testing.assert_close(got, torch.autograd.grad(function(x, weights).sum(), (x, weights)))


def test_auto_says_once_what_it_chose_and_why(caplog, monkeypatch):
    monkeypatch.setitem(module._FASTEST, ("cpu", torch.float32), ((0, "fft"), (50, "chunked")))
    module._explained.clear()
    phi, weights = spectral(100, 8), torch.randn(8, 2)
    with caplog.at_level(logging.DEBUG, logger="flash_stu"):
        for length in (49, 50, 60, 120):
            spectral_conv(torch.randn(1, length, 2), phi, weights)
        spectral_conv(torch.randn(1, 60, 2, dtype=torch.float64), phi, weights)
        spectral_conv(torch.randn(1, 60, 2), phi, weights, smooth_tail=False)
    assert [record.getMessage() for record in caplog.records] == [
        "convolution on cpu in float32: fft, the fastest measured from 0 tokens on",
        "convolution on cpu in float32: chunked, the fastest measured from 50 tokens on",
        "convolution on cpu in float32: fft, the sequence is longer than the filters",
        "convolution on cpu in float64: fft, nothing was measured there",
        "convolution on cpu in float32: fft, the filters do not end in exponentials",
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_auto_on_a_gpu_is_an_estimate(dtype, monkeypatch):
    present = {"triton"}
    monkeypatch.setattr(module.backends, "why_not", lambda name: None if name in present else "not here")
    name, reason = module._fastest_for_exponentials("cuda", dtype, 1024)
    assert name == "triton" and "estimate" in reason
    assert module._fastest_for_exponentials("cuda", dtype, 1023)[0] == "fft"
    present.clear()
    assert module._fastest_for_exponentials("cuda", dtype, 8192)[0] == "fft"
    assert module._fastest_for_exponentials("cuda", torch.float64, 8192)[0] == "fft"


@pytest.mark.parametrize("backend", ["direct", "fft", "chunked"])
@pytest.mark.parametrize(
    ("tokens", "dilation", "count"), [(150, 2, 3), (150, 1, 3), (150, 2, 80), (100, 1, 60), (2, 2, 3)]
)
def test_taps_on_top(backend, tokens, dilation, count):
    phi = spectral(200, 8, dilation=dilation)
    torch.manual_seed(0)
    inputs = torch.randn(2, tokens, 3), torch.randn(8, 3), torch.randn(count, 3)
    inputs = tuple(tensor.requires_grad_() for tensor in inputs)
    weight = torch.randn(2, tokens, 3)

    def sums(x, weights, taps):
        y = causal_conv(x, phi.to(x) @ weights, "direct", dilation)
        return y + causal_conv(x, taps, "direct")

    y = spectral_conv(*inputs[:1], phi, inputs[1], backend, dilation, taps=inputs[2])
    got = (y, *torch.autograd.grad(y, inputs, weight))
    exact_inputs = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    exact = sums(*exact_inputs)
    expected = (exact, *torch.autograd.grad(exact, exact_inputs, weight.double()))
    for result, reference in zip(got, expected, strict=True):
        assert (result.double() - reference).norm() <= 1e-5 * reference.norm()


def test_filters_that_jump_have_no_far_states():
    x, filters, weights = torch.randn(1, 40, 2), torch.randn(50, 3), torch.randn(3, 2)
    got = spectral_conv(x, filters, weights, smooth_tail=False)
    torch.testing.assert_close(got, causal_conv(x, filters @ weights, "direct"))
    with pytest.raises(UserError, match="back end is 'chunked'; allowed: auto, direct, fft, flashfftconv"):
        spectral_conv(x, filters, weights, "chunked", smooth_tail=False)


def test_the_map_of_the_tail_is_kept_on_every_device():
    first = tail_map(200, 33, True, torch.device("meta"))
    assert first is tail_map(200, 33, True, torch.device("meta"))
    shapes = [tensor.shape for tensor in tail_map(200, 33, True, torch.device("cpu"))]
    assert [tensor.shape for tensor in first] == shapes and all(tensor.is_meta for tensor in first)


def test_bad_arguments():
    x = torch.zeros(1, 40, 2)
    with pytest.raises(UserError, match=r"got \(10, 3\) and \(4, 2\)"):
        spectral_conv(x, torch.zeros(10, 3), torch.zeros(4, 2))
    with pytest.raises(UserError, match="'chunked' ends at the filters' 10 lags; the sequence has 40"):
        spectral_conv(x, torch.zeros(10, 3), torch.zeros(3, 2), "chunked")
    with pytest.raises(UserError, match="convolution back end is 'cuda'; allowed: auto, direct, fft, .*, triton"):
        spectral_conv(x, torch.zeros(10, 3), torch.zeros(3, 2), "cuda")
    with pytest.raises(UserError, match=r"got \(1, 40, 2\), \(3, 2\)"):
        chunked_conv(x, torch.zeros(3, 2), torch.zeros(1), torch.zeros(1, 2))
    with pytest.raises(UserError, match="trainable decays"):
        chunked_conv(x, torch.zeros(4, 2), torch.zeros(1, requires_grad=True), torch.zeros(1, 2))
