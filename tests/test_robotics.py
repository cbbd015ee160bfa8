"""Predictors, and trajectories of bodies: closed loops against a loop by hand, scaling, files, a gait."""

import sys

import numpy as np
import pytest
import torch

from flash_stu.errors import UserError
from flash_stu.model.prediction import FlashSTUForTimeSeriesPrediction


@pytest.fixture
def walk(scripts):
    """Made-up trajectories with HalfCheetah's entries: walks of different sizes, with torques."""
    random = np.random.default_rng(0)
    states = (random.standard_normal((3, 21, 18)) * np.arange(1, 19)).cumsum(1).astype(np.float32)
    torques = random.standard_normal((3, 20, 6)).astype(np.float32)
    return scripts["bodies"].Trajectories(states, torques, {"step_seconds": 0.05})


def test_linear_is_exact_for_a_linear_system(scripts):
    training = scripts["prediction_training"]
    inputs = torch.randn(4, 50, 5, generator=torch.Generator().manual_seed(0))
    targets = inputs @ torch.randn(5, 3, generator=torch.Generator().manual_seed(1)) + 2
    predicted = training.linear(inputs, targets)(inputs)
    # the normal equations in float64, rounded to float32
    torch.testing.assert_close(predicted, targets, atol=1e-5, rtol=1e-5)
    assert training.squared_errors(targets + 2, targets) == pytest.approx([4.0] * 50)


@pytest.mark.parametrize("kind", ["STU", "AR-STU", "distilled STU", "Mamba-2"])
def test_a_closed_loop_is_the_whole_sequence_again_and_again(scripts, tiny_config, kind):
    training = scripts["prediction_training"]
    torch.manual_seed(0)
    taps = {"stu_input_taps": 3, "stu_output_taps": 2} if kind == "AR-STU" else {}
    config = tiny_config(num_input_channels=5, num_output_channels=3, **taps)
    if kind == "Mamba-2":
        network = scripts["peers"].mamba2(config, state_size=8, head_dim=4).eval()
    else:
        network = FlashSTUForTimeSeriesPrediction(config).eval()
    if kind == "distilled STU":
        network = scripts["robotics"].distill(network, state_dim=40)
    predictor = training.Predictor(training.persistence(3), network)
    context, given = torch.randn(2, 11, 5), torch.randn(2, 6, 2)
    found = predictor.closed_loop(context, given)
    seen = context
    for now in given.unbind(1):
        seen = torch.cat([seen, torch.cat([predictor.one_step(seen)[:, -1], now], dim=1)[:, None]], dim=1)
    expected = predictor.one_step(seen)[:, 10:]
    assert found.shape == (2, 7, 3)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_training_lowers_the_loss_and_leaves_the_base_alone(scripts, tiny_config):
    training = scripts["prediction_training"]
    torch.manual_seed(0)
    angle = 0.3 * torch.arange(33) + 6 * torch.rand(16, 1)
    states = torch.stack([angle.sin(), angle.cos()], dim=-1)
    network = FlashSTUForTimeSeriesPrediction(tiny_config(num_input_channels=2, num_output_channels=2))
    base = training.persistence(2)
    inputs, targets = states[:, :-1], states[:, 1:]
    before = training.squared_errors(base(inputs), targets).mean()
    settings = training.Settings(epochs=4, noise=0.0)
    predictor, facts = training.train(network, base, inputs, targets, settings, seed=0)
    assert training.squared_errors(predictor.one_step(inputs), targets).mean() < before / 4
    assert facts["updates"] == 32 and facts["curve"][-1][0] <= 32 and not network.training


def test_matched_parameters(scripts, tiny_config):
    training = scripts["prediction_training"]
    config = tiny_config(num_input_channels=5, layer_types=["sliding_attention"] * tiny_config().num_hidden_layers)
    size = training.parameters(FlashSTUForTimeSeriesPrediction(config))
    per_unit = 3 * config.hidden_size * config.num_hidden_layers  # of a gated MLP's inner width
    found = training.parameters(training.matched(config, size + 1000))
    assert abs(found - size - 1000) <= per_unit / 2


def test_features_are_scaled_by_group_and_know_how_far_the_body_moved(scripts, walk):
    bodies = scripts["bodies"]
    features = scripts["robotics"].Features(bodies.BODIES["halfcheetah"], walk)
    inputs, targets = features(walk)
    assert inputs.shape == (3, 19, 24) and targets.shape == (3, 19, 18)
    torch.testing.assert_close(inputs[:, 1:, :18], targets[:, :-1])
    raw = inputs.double() * torch.from_numpy(features.scale) + torch.from_numpy(features.mean)
    moved = np.diff(walk.states[:, :, 0].astype(np.float64), axis=1)
    # float32's rounding of values below 400
    np.testing.assert_allclose(raw[:, :, 0], moved[:, :19], atol=1e-4)
    np.testing.assert_allclose(raw[:, :, 1:18], walk.states[:, 1:20, 1:], atol=1e-4)
    np.testing.assert_allclose(raw[:, :, 18:], walk.torques[:, 1:], atol=1e-4)
    full = torch.cat([inputs[:, :, :18], targets[:, -1:]], dim=1).double()
    assert float(full.mean((0, 1)).abs().max()) < 1e-6
    parts = full.var((0, 1), correction=0).split([size for _, size in features.groups])
    assert all(abs(float(part.mean()) - 1) < 1e-5 for part in parts)


def test_trajectories_as_files(scripts, walk, tmp_path):
    bodies = scripts["bodies"]
    bodies.write(walk, tmp_path / "walk.parquet")
    again = bodies.read(tmp_path / "walk.parquet")
    assert np.array_equal(again.states, walk.states) and np.array_equal(again.torques, walk.torques)
    assert again.facts == walk.facts
    (tmp_path / "other.parquet").write_bytes(b"not a table")
    with pytest.raises(UserError, match="other.parquet is not a file of trajectories"):
        bodies.read(tmp_path / "other.parquet")


@pytest.mark.parametrize("name", ["ant", "halfcheetah", "walker2d"])
def test_bodies_are_what_their_gaits_and_groups_say(scripts, name):
    pytest.importorskip("mujoco", reason="mujoco is not installed")
    bodies = scripts["bodies"]
    body, gait = bodies.BODIES[name], np.array(bodies.GAITS[name])
    simulator = bodies.Simulator(body)
    states, torques = simulator.drive(gait, 60, np.random.default_rng(0))
    again, _ = simulator.drive(gait, 60, np.random.default_rng(0))
    assert np.array_equal(states, again) and len(states) == len(torques) + 1 == 61
    assert states.shape[1] == sum(size for _, size in body.groups) == (29 if name == "ant" else 18)
    assert torques.shape[1] == len(body.joints) and np.abs(torques).max() <= 1
    assert bodies.travelled(body, states[:51]) == pytest.approx(
        np.linalg.norm(states[50, :2] - states[0, :2]) if name == "ant" else states[50, 0] - states[0, 0]
    )


def test_missing_packages_are_one_line(scripts, monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(UserError, match=r"pip install 'flash-stu\[robotics\]'"):
        scripts["bodies"].Simulator(scripts["bodies"].BODIES["ant"])
