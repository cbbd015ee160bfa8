"""Faults of a launcher, of the network and of wandb."""

import socket
import sys

import huggingface_hub.constants
import pytest
import requests
from processes import Child

from flash_stu import UserError, distributed, network
from flash_stu.data import DataConfig
from flash_stu.data.sources import HubSource
from flash_stu.distributed import read_launch
from flash_stu.training import metrics
from flash_stu.training.metrics import check_wandb

PEERS = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
LAUNCHES = [
    *[({"WORLD_SIZE": value}, "WORLD_SIZE") for value in ("abc", "", "0", "-1", "1.5", "9" * 5000, "٣", " 2")],
    *[(PEERS | {"RANK": value}, "RANK") for value in ("2", "-1", "x", "")],
    *[(PEERS | {"LOCAL_RANK": value}, "LOCAL_RANK") for value in ("-1", "2", "x")],
    *[(PEERS | {"MASTER_PORT": value}, "MASTER_PORT") for value in ("abc", "", "0", "65536", "-1")],
    *[({name: PEERS[name] for name in PEERS if name != key}, key) for key in ("RANK", "MASTER_ADDR", "MASTER_PORT")],
    (PEERS | {"MASTER_ADDR": ""}, "MASTER_ADDR"),
    (PEERS | {"MASTER_ADDR": "no such host"}, "MASTER_ADDR"),
    ({"RANK": "1"}, "RANK"),
]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*PEERS, "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("environment", "word"), LAUNCHES)
def test_launches(refuses, config_file, model_dir, monkeypatch, environment, word):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refuses("train.py", ["--config", config_file], word)
    refuses("evaluate.py", ["--model", "model", "--output", "out", "--device", "cpu"], word)


def test_no_launcher_is_one_process():
    assert read_launch() == distributed.Launch(0, 1, 0)


def test_a_main_process_that_is_not_there(refuses, config_file, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free once the block ends
    for name, value in (PEERS | {"MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "CONNECT_SECONDS", 1)
    refuses("train.py", ["--config", config_file], "MASTER_ADDR 127.0.0.1", f"MASTER_PORT {port}")


def _meet_alone() -> str:
    distributed.MEET_SECONDS = 1
    try:
        distributed._meet(read_launch())
    except UserError as error:
        return str(error)
    return "met"


def test_others_that_do_not_come():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    message = Child(_meet_alone, environment=PEERS | {"RANK": "0", "MASTER_PORT": str(port)}).result()
    assert (
        message.startswith("the 2 processes did not meet at MASTER_ADDR 127.0.0.1, MASTER_PORT") and "\n" not in message
    )


@pytest.fixture
def no_network(monkeypatch):
    """Every request fails at once, and is counted."""
    asked = []

    def head(url, **options):
        asked.append(url)
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(requests, "head", head)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    if "datasets" in sys.modules:
        monkeypatch.setattr(sys.modules["datasets"].config, "HF_HUB_OFFLINE", False)
    network.is_reachable.cache_clear()
    yield asked
    network.is_reachable.cache_clear()


def test_the_hub_is_asked_once(no_network, refuses, config_file):
    refuses("train.py", ["--config", config_file, "data.tokenizer=nobody/nothing"], "nobody/nothing", "cannot be asked")
    with pytest.raises(UserError, match="nobody/other.*cannot be asked"):
        _ = HubSource(DataConfig(dataset="nobody/other")).commit
    assert no_network == [huggingface_hub.constants.ENDPOINT]
    assert huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_name_that_takes_long_to_look_up(monkeypatch):
    monkeypatch.setattr(network, "_SECONDS", 0.05)
    monkeypatch.setattr(requests, "head", lambda *_, **__: __import__("time").sleep(1))
    network.is_reachable.cache_clear()
    assert not network.is_reachable("http://slow.invalid")
    network.is_reachable.cache_clear()


def test_wandb_online(no_network, refuses, config_file, monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    for name in (*metrics._CREDENTIALS, "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    refuses("train.py", ["--config", config_file, "wandb.mode=online"], "wandb.mode is 'online'", "no key")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    refuses("train.py", ["--config", config_file, "wandb.mode=online"], "wandb.mode is 'online'", "cannot be reached")
    monkeypatch.setattr(metrics, "is_reachable", lambda url: True)
    assert check_wandb("online") == "online"
