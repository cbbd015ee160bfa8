"""What the experiments learn linear systems with: layers against loops over time, closed forms on a small system."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

NAMES = ("learners", "classical", "stu_forms")


@pytest.fixture(scope="module")
def modules():
    """The modules beside the experiments, by name; other modules of their names come back afterwards."""
    others = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "experiments"))
    yield {name: importlib.import_module(name) for name in NAMES}
    del sys.path[0]
    for name in NAMES:
        del sys.modules[name]
    sys.modules.update(others)


@pytest.fixture
def u():
    return torch.randn(2, 150, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def recurrence(eigenvalues, B, C, D, u):
    """y_t = Re(C S_t) + D u_t with S_t = a S_{t-1} + B u_t, one step after the other."""
    eigenvalues, B, C = (x.detach().to(torch.complex128) for x in (eigenvalues, B, C))
    states, outputs = torch.zeros(len(u), len(eigenvalues), dtype=torch.complex128), []
    for x in u.unbind(1):
        states = eigenvalues * states + x.to(torch.complex128) @ B.T
        outputs.append((states @ C.T).real + x @ D.detach().T)
    return torch.stack(outputs, dim=1)


def close(found, true):
    return bool((found - true).abs().max() < 1e-10 * true.abs().max())


RING = {"normalise": False, "r_min": 0.9, "r_max": 0.999, "max_phase": 1.57}


@pytest.mark.parametrize(
    "settings", [{}, {"parametrisation": "exponential"}, {"parametrisation": "cartesian"}, RING], ids=str
)
def test_an_lru_is_its_recurrence(modules, u, settings):
    torch.manual_seed(1)
    layer = modules["learners"].LRU(5, 2, 3, **settings)
    nn.init.normal_(layer.D)
    first, second = layer.first.detach(), layer.second.detach()
    eigenvalues = {
        "log": lambda: torch.polar((-first.exp()).exp(), second.exp()),
        "exponential": lambda: torch.polar((-first).exp(), second),
        "cartesian": lambda: torch.complex(first, second),
    }[settings.get("parametrisation", "log")]()
    size, phase = eigenvalues.abs(), eigenvalues.angle().remainder(2 * torch.pi)
    assert bool((size >= settings.get("r_min", 0) - 1e-12).all() and (size <= settings.get("r_max", 1) + 1e-12).all())
    assert bool((phase <= settings.get("max_phase", 6.28) + 1e-12).all())
    gamma = (1 - size**2).sqrt() if settings.get("normalise", True) else torch.ones(5)
    B, C = torch.view_as_complex(layer.B.detach()), torch.view_as_complex(layer.C.detach())
    with torch.no_grad():
        assert close(layer(u), recurrence(eigenvalues, gamma[:, None] * B, C, layer.D, u))


def test_an_s4d_is_its_recurrence(modules, u):
    torch.manual_seed(2)
    layer = modules["learners"].S4D(20, 2, 3)
    poles = torch.complex(torch.full((20,), -0.5, dtype=torch.float64), layer.frequency.detach())
    step = layer.log_step.detach().exp()
    assert bool((step >= 1e-3).all() and (step <= 1e-1).all())
    # zero-order hold: the exact response to an input that is constant over a step
    held = ((step * poles).exp() - 1) / poles
    B, C = torch.view_as_complex(layer.B.detach()), torch.view_as_complex(layer.C.detach())
    with torch.no_grad():
        assert close(layer(u), recurrence((step * poles).exp(), held[:, None] * B, C, layer.D, u))


def test_an_lds_is_its_recurrence_with_eigenvalues_in_the_interval(modules, u):
    torch.manual_seed(3)
    layer = modules["learners"].LDS(40, 2, 3)
    with torch.no_grad():
        layer.A[:2] = torch.tensor([-1.5, 0.0])
        expected = recurrence(layer.A.clamp(-1, 1), layer.B, layer.C, layer.D, u)
        assert close(layer(u), expected)


def test_an_stu_is_its_sum_over_lags(modules, u):
    layer = modules["learners"].STU(160, 4, 2, 3)
    nn.init.normal_(layer.M)
    nn.init.normal_(layer.D)
    phi = layer.features[:, :4]
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(80)[:, None]
    with torch.no_grad():
        y = u @ layer.D.T
        for k, column in enumerate(torch.cat([phi, signs * phi], dim=1).T):
            for t in range(u.shape[1]):
                y[:, t] += torch.einsum("l,bli->bi", column[: t + 1].flip(0), u[:, : t + 1]) @ layer.M[k].T
        assert close(layer(u), y)


@pytest.mark.parametrize("length", [1, 64, 65])
def test_kernels_of_any_length(modules, length):
    layers = modules["learners"]
    torch.manual_seed(4)
    layer = layers.LRU(3, 1, 1)
    assert layer.kernel(length).shape == (length, 1, 1)
    assert torch.equal(layer.kernel(length)[0], layer.kernel(200)[0])


def test_gradients_reach_every_parameter(modules, u):
    layers = modules["learners"]
    for layer in (layers.STU(150, 3, 2, 2), layers.LDS(4, 2, 2), layers.LRU(4, 2, 2), layers.S4D(4, 2, 2)):
        if isinstance(layer, layers.STU):
            nn.init.normal_(layer.M)
        layer(u).square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters())


def test_descent_measures_at_its_points_and_stops_when_it_diverges(modules, u):
    descend = modules["learners"].descend
    learner = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    target = u @ torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)

    def error(learner):
        return float((learner(u) - target).square().mean())

    def run(rate, cosine=False):
        nn.init.zeros_(learner.weight)
        optimizer = torch.optim.SGD(learner.parameters(), lr=rate)
        return descend(learner, optimizer, lambda _: (u, target), 60, [1, 30, 60], error, cosine)

    curve = run(0.5)
    assert [point[0] for point in curve] == [1, 30, 60]
    assert curve[0][1] <= curve[1][1] <= curve[2][1] and curve[2][2] < 1e-6 < curve[0][2]
    assert run(1e200) == []
    assert run(0.5, cosine=True)[-1][2] > curve[-1][2]
    points = modules["learners"].spaced(1000)
    assert points[0] == 1 and points[-1] == 1000 and points == sorted(set(points))


def test_jobs_keep_their_order_in_processes(modules):
    each, jobs = modules["learners"].each, [(3,), (1,), (2,)]
    assert each(torch.arange, jobs, 2)[0].tolist() == each(torch.arange, jobs, 1)[0].tolist() == [0, 1, 2]


@pytest.fixture
def fast():
    """A system that forgets in a few steps, three sequences of it: x_{t+1} = A x_t + B u_t, y_t = C x_t + D u_t."""
    draw = np.random.default_rng(0)
    A, B, C = np.diag([0.5, -0.4, 0.2]), draw.standard_normal((3, 2)), draw.standard_normal((2, 3))
    D, result = draw.standard_normal((2, 2)), []
    for length in (400, 50):
        u, x, y = draw.standard_normal((length, 2)), np.zeros(3), []
        for now in u:
            y.append(C @ x + D @ now)
            x = A @ x + B @ now
        result += [u, np.array(y)]
    return result


@pytest.mark.parametrize("name", ["Ho-Kalman", "ARX"])
def test_classical_methods_reach_a_system_that_forgets(modules, fast, name):
    inputs, outputs, fresh, true = fast
    found = modules["classical"].methods()[name](inputs, outputs)(fresh)
    assert np.sum((found - true) ** 2) < 1e-16 * np.sum(true**2)


def test_forms_of_the_stu_run_as_their_equations(modules, fast):
    """Random weights: a loop over t of each equation, and least squares gives the weights back."""
    forms, (inputs, outputs, _, _) = modules["stu_forms"], fast
    draw, T, columns = np.random.default_rng(1), 60, 4
    u, y, phi = inputs[:T], outputs[:T], draw.standard_normal((60, columns)) / 10
    features = np.array([[phi[: t + 1, k] @ u[t::-1] for k in range(columns)] for t in range(T)])
    for fit, ways in forms.FORMS.items():
        rows, _ = forms.design(fit, phi, u, y)
        weights = draw.standard_normal((rows.shape[1], 2)) / 10
        spectral = weights[: 2 * columns].reshape(columns, 2, 2)
        taps = weights[2 * columns : 2 * columns + (2 if fit == "plain" else 6)].reshape(-1, 2, 2)
        feedback = weights[-2:] if fit == "eq. 5" else np.eye(2) if fit == "eq. 4" else np.zeros((2, 2))
        late = 0 if fit == "plain" else 2
        for way in ways:
            expected = np.zeros((T, 2))
            for t in range(T):
                expected[t] = sum(u[t - i] @ taps[i] for i in range(len(taps)) if t >= i)
                if t >= late:
                    expected[t] += np.einsum("ki,kio->o", features[t - late], spectral)
                if t >= 2:
                    expected[t] += (y if way == "eq. 4, fed" else expected)[t - 2] @ feedback
            found = forms.predict(way, weights, rows, y)
            assert np.abs(found - expected).max() < 1e-10 * np.abs(expected).max(), way
        again = forms.least_squares(iter([np.hstack([rows, rows @ weights])]), 2)
        assert np.abs(rows @ (again - weights)).max() < 1e-10 * np.abs(rows @ weights).max()
