"""Faults of the disk and of what lies on it, over the commands that write: one line, exit 2, and nothing lost.

Every command runs in this process. The faults are those that system calls report: permissions would not hold off tests
that run as root.
"""

import errno
import json
import os
import resource
import sys

import datasets
import pytest
import torch
import yaml
from processes import Child
from published_weights import published_weights
from safetensors.torch import load_file, save_file

import distill as distill_py
import evaluate as evaluate_py
from flash_stu import FlashSTUConfig, FlashSTUForCausalLM
from flash_stu.data import DataConfig, TokenDataset, load_tokenizer, prepare
from flash_stu.errors import UserError, run_cli
from flash_stu.evaluation import definitions
from flash_stu.evaluation.definitions import write_embedded_data
from flash_stu.files import MANIFEST
from flash_stu.filters import spectral as filters
from flash_stu.filters.spectral import spectral_filters
from flash_stu.locks import holding
from scripts import convert_checkpoint, fetch_eval_data, plot_run, prepare_data

SIZES = {
    "vocab_size": 257,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "sliding_window": 7,
    "max_position_embeddings": 33,
    "num_filters": 4,
}
PUBLISHED = {"dim": 16, "num_heads": 2, "num_layers": 2, "seq_len": 33, "window_size": 7, "vocab_size": 257}
PUBLISHED |= {"mlp_scale": 2, "num_eigh": 4, "use_hankel_L": False, "theta": 1e4, "use_alibi": False}
TASK = {
    "task": "colours",
    "dataset_path": "someone/colours",
    "output_type": "multiple_choice",
    "validation_split": "validation",
    "doc_to_text": "text",
    "doc_to_target": "label",
    "doc_to_choice": "choices",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The inputs of the commands."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    FlashSTUForCausalLM(FlashSTUConfig(**SIZES)).save_pretrained(folder / "model")
    load_tokenizer("bytes").to_transformers().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("some text to be scored. " * 20)
    for name in ("published", "run", "tasks"):
        (folder / name).mkdir()
    save_file(published_weights(layers=2, size=16, vocab=257, filters=4), folder / "published/model.safetensors")
    (folder / "published/config.json").write_text(json.dumps(PUBLISHED | {"softcap": 50.0, "weight_tying": True}))
    (folder / "tasks/colours.yaml").write_text(yaml.safe_dump(TASK))
    config = {"output_dir": str(folder / "run"), "model": SIZES, "data": {"dataset": str(folder / "corpus.jsonl")}}
    config["data"] |= {"tokenizer": "bytes", "validation_fraction": 0.3}
    config["train"] = {"sequence_length": 24, "global_batch_size": 24, "steps": 5}
    (folder / "run/config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run/metrics.jsonl").write_text("".join(f'{{"step": {n}, "loss": {5 / n}}}\n' for n in range(1, 30)))
    texts = [{"text": f"document {number} about filters " * 9} for number in range(60)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return folder


@pytest.fixture(autouse=True)
def stand_ins(tmp_path, tmp_path_factory, monkeypatch):
    """An empty cache of the user's, a hub with one data set, and no figures, which take long."""
    monkeypatch.setattr(filters.platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache" / name))
    rows = [{"text": f"pot {number}", "choices": ["red", "blue"], "label": number % 2} for number in range(99)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.setattr("spectralds.directory.plot_fit", lambda bank, fit, curve, path: path.write_bytes(b"x" * 9999))
    monkeypatch.setattr("flash_stu.evaluation.report.draw_positions", lambda *args: args[-1].write_bytes(b"x" * 9999))


MODEL, TEXT = "INPUTS/model", "INPUTS/text.txt"
COMMANDS = {
    "distill": (distill_py, ["--checkpoint", MODEL, "--state-dim", "4", "--output", "OUTPUT"]),
    "convert": (
        convert_checkpoint,
        ["--checkpoint", "INPUTS/published/model.safetensors", "--config", "INPUTS/published/config.json"]
        + ["--tokenizer", "bytes", "--output", "OUTPUT"],
    ),
    "evaluate": (evaluate_py, ["--model", MODEL, "--text", TEXT, "--device", "cpu", "--output", "OUTPUT"]),
    "fetch": (fetch_eval_data, ["--tasks", "colours", "--include-path", "INPUTS/tasks", "--output", "OUTPUT"]),
    "plot": (plot_run, ["INPUTS/run", "--output", "OUTPUT/loss.png"]),
    "prepare": (prepare_data, ["--config", "INPUTS/run/config.yaml", "data.cache_dir=OUTPUT"]),
}
WRITERS_OF_DIRECTORIES = ["distill", "convert", "evaluate", "fetch"]


@pytest.fixture
def command(inputs, tmp_path, monkeypatch, capsys):
    """Run a command with an output; returns exit status and stderr."""

    def run(name, output=tmp_path / "output"):
        module, words = COMMANDS[name]
        words = [word.replace("INPUTS", str(inputs)).replace("OUTPUT", str(output)) for word in words]
        monkeypatch.setattr(sys, "argv", [name, *words])
        capsys.readouterr()
        return run_cli(module.main), capsys.readouterr().err

    return run


def refused(result, *words) -> bool:
    status, stderr = result
    lines = [line for line in stderr.splitlines() if not line.startswith("tokenising ")]  # what is going on
    assert (status, len(lines)) == (2, 1), stderr
    assert lines[0].startswith("error: ") and all(str(word) in lines[0] for word in words), stderr
    return True


def files_of(folder) -> dict[str, bytes]:
    """All files, hidden ones too, but for the cache of filters."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "cache/flash_stu/filters" not in str(path)]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# A disk that takes nothing more


def failing(monkeypatch, folder, names, number):
    """Let functions of os report an error for paths in a folder, and for open files."""
    for name in names:
        original = getattr(os, name)

        def function(path, *args, original=original, **kwargs):
            if isinstance(path, int) or str(path).startswith(str(folder)):
                raise OSError(number, os.strerror(number), str(path))
            return original(path, *args, **kwargs)

        monkeypatch.setattr(os, name, function)


FAULTS = {
    "disk full": (["fsync"], errno.ENOSPC, "No space left on device"),
    "read-only file system": (["mkdir"], errno.EROFS, "Read-only file system"),
    "no permission": (["mkdir", "open"], errno.EACCES, "Permission denied"),
    "broken disk": (["replace", "rename"], errno.EIO, "Input/output error"),
    "quota": ("limit", 1000, "File too large"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", COMMANDS)
def test_what_cannot_be_written_is_one_line_and_loses_nothing(name, fault, command, tmp_path, monkeypatch):
    calls, number, words = FAULTS[fault]
    output = tmp_path / "deep/output"
    spectral_filters(33, 4)  # not what is tried here
    with monkeypatch.context() as patch:
        if calls == "limit":
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (number, limits[1]))
        else:
            failing(patch, output.parent, calls, number)
        try:
            result = command(name, output)
        finally:
            if calls == "limit":
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refused(result, output, "cannot be written", words)
    assert files_of(tmp_path) == {} and not output.parent.exists()


@pytest.mark.parametrize("fault", ["disk full", "broken disk"])
@pytest.mark.parametrize("name", WRITERS_OF_DIRECTORIES + ["plot"])
def test_an_earlier_output_stays_if_the_new_one_cannot_be_written(name, fault, command, tmp_path, monkeypatch):
    assert command(name)[0] == 0
    if name in ("evaluate", "fetch"):  # as if one file were missing yet
        for path in (tmp_path / "output").rglob("*.json*"):
            if path.name != MANIFEST:
                path.unlink()
    before = files_of(tmp_path)
    with monkeypatch.context() as patch:
        calls, number, words = FAULTS[fault]
        failing(patch, tmp_path, calls, number)
        assert refused(command(name), "cannot be written", words)
    assert files_of(tmp_path) == before
    assert command(name)[0] == 0


# Outputs that are not ours


@pytest.mark.parametrize("name", WRITERS_OF_DIRECTORIES)
@pytest.mark.parametrize(
    "files",
    [
        {"thesis.tex": "mine"},
        {"config.json": "{}", "model.safetensors": "mine"},
        {"distillation.json": "{}"},
        {"results.json": '{"models": {}}', "table.md": "mine"},
        {MANIFEST: "{}", "thesis.tex": "mine"},
        {"someone/colours/default/validation.jsonl": "mine"},
    ],
    ids=str,
)
def test_a_directory_of_the_users_stays(name, files, command, tmp_path):
    for file, text in files.items():
        (tmp_path / "output" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "output" / file).write_text(text)
    before = files_of(tmp_path)
    assert refused(command(name), f"--output {tmp_path / 'output'} exists and was not written by this program")
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("distill", "model.safetensors"),
        ("distill", "notes.txt"),
        ("convert", "config.json"),
        ("convert", "sub/notes.txt"),
        ("evaluate", "results.json"),
        ("evaluate", "table.md"),
        ("evaluate", "items/model/text.txt.json"),
        ("fetch", "someone/colours/default/validation.jsonl"),
    ],
)
def test_a_file_that_somebody_changed_or_added_stays(name, file, command, tmp_path):
    assert command(name)[0] == 0
    path = tmp_path / "output" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    before = files_of(tmp_path)
    assert refused(command(name), f"holds {file}, which this program did not write or somebody changed")
    assert files_of(tmp_path) == before
    path.unlink()
    if name in ("evaluate", "fetch"):  # what is missing is made again
        assert command(name)[0] == 0 and path.read_text() != "mine"


def test_a_users_file_in_a_picture_s_place_is_refused_before_any_work(command, tmp_path, monkeypatch):
    assert command("evaluate")[0] == 0
    (tmp_path / "output/table.csv").write_text("mine")
    monkeypatch.setattr("flash_stu.evaluation.language_model.load_source", lambda *_: pytest.fail("a model was loaded"))
    assert refused(command("evaluate"), "holds table.csv, which this program did not write")
    (tmp_path / "output/table.csv").unlink()
    assert command("evaluate")[0] == 0  # found earlier


@pytest.mark.parametrize("name", ["evaluate", "fetch"])
def test_two_at_once_on_one_output(name, command, tmp_path):
    with holding(tmp_path / "output", "--output"):
        assert refused(command(name), f"output is in use by process {os.getpid()} on host ")
    assert files_of(tmp_path) == {}
    assert command(name)[0] == 0


@pytest.mark.parametrize("first", WRITERS_OF_DIRECTORIES)
def test_a_directory_of_another_command_stays(first, command, tmp_path):
    assert command(first)[0] == 0
    before = files_of(tmp_path)
    for other in WRITERS_OF_DIRECTORIES:
        if other != first:
            assert refused(command(other), "output holds a ", "; choose another, or remove it")
    assert files_of(tmp_path) == before


# Pictures


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("loss", "--output {}/loss must end in an image format; allowed: .png, .pdf, .svg"),
        ("loss.", "must end in an image format"),
        (".png", "must end in an image format"),
        ("loss.xyz", "must end in an image format"),
        ("loss.pgf", "must end in an image format"),
        ("folder.png", "folder.png exists and is not a regular file"),
        ("file/loss.png", "file/loss.png cannot be written: "),
        ("n" * 300 + ".png", "it must not be longer than 255 bytes"),
        ("nul\0.png", "it must not have control characters"),
    ],
)
def test_paths_that_cannot_be_pictures(output, words, inputs, tmp_path, monkeypatch, capsys):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["plot_run.py", str(inputs / "run"), "--output", f"{tmp_path}/{output}"])
    assert refused((run_cli(plot_run.main), capsys.readouterr().err), words.format(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_records_without_numbers_are_not_drawn(inputs, monkeypatch):
    bad = [{}, {"loss": 1}, {"step": "1", "loss": 2}, {"step": 1, "loss": [2]}, {"step": 1, "loss": None}]
    bad += [{"step": 1, "loss": float("nan")}, {"step": float("inf"), "loss": 1}, {"step": 10**400, "loss": 1}]
    monkeypatch.setattr(plot_run, "read_metrics", lambda path: bad)
    with pytest.raises(UserError, match="is not a run directory with metrics"):
        plot_run.read_losses(inputs / "run")
    monkeypatch.setattr(plot_run, "read_metrics", lambda path: [*bad, {"step": 2, "loss": 3.5}])
    assert plot_run.read_losses(inputs / "run") == ([(48, 3.5)], [])


# Caches


def damages():
    yield "flipped", lambda content: content[:-9] + bytes([content[-9] ^ 4]) + content[-8:]
    yield "cut", lambda content: content[:-8]
    yield "empty", lambda content: b""
    yield "other", lambda content: b"\xff[]7"


damage_of_every_kind = pytest.mark.parametrize("damage", [pytest.param(change, id=name) for name, change in damages()])


def flips(content):
    """A content with one bit changed in each place."""
    for place in range(len(content)):
        yield content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]


@damage_of_every_kind
def test_a_damaged_entry_of_the_filter_cache_is_written_anew(damage, tmp_path):
    expected = spectral_filters(33, 4)
    (path,) = (tmp_path / "cache").rglob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert all(map(torch.equal, spectral_filters(33, 4), expected))
    assert path.read_bytes() == whole and list(path.parent.iterdir()) == [path]


def endless(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("replace", [endless, device])
def test_pipes_and_devices_in_place_of_cached_files_are_not_read(replace, tokens, inputs, tmp_path):
    expected = spectral_filters(33, 4)
    (path,) = (tmp_path / "cache").rglob("*.safetensors")
    for place in (path, tokens / "verified.json"):
        place.unlink()
        replace(place)
    assert all(map(torch.equal, spectral_filters(33, 4), expected))
    TokenDataset(tokens)  # compares the checksums
    (tokens / "manifest.json").unlink()
    replace(tokens / "manifest.json")
    with pytest.raises(UserError, match="manifest.json cannot be read: manifest.json is not a regular file"):
        TokenDataset(tokens)


def test_no_bit_of_the_filter_cache_can_change_unnoticed(tmp_path, monkeypatch):
    expected = spectral_filters(9, 2)
    (path,) = (tmp_path / "cache").rglob("*.safetensors")
    monkeypatch.setattr(filters, "compute_filters", lambda *_: expected)
    monkeypatch.setattr(filters, "_write_cache", lambda *_: None)
    for content in flips(path.read_bytes()):
        path.write_bytes(content)
        assert all(map(torch.equal, spectral_filters(9, 2), expected))


@pytest.mark.parametrize("change", [{"sigma": torch.ones(3)}, {"phi": torch.ones(33, 4)}, {"checksum": torch.ones(2)},
                                    {"phi": torch.full((33, 4), float("nan")).double()}])  # fmt: skip
def test_filters_of_another_shape_or_type_are_not_used(change, tmp_path):
    expected = spectral_filters(33, 4)
    (path,) = (tmp_path / "cache").rglob("*.safetensors")
    tensors = load_file(path) | change
    if "checksum" not in change and tensors["phi"].dtype == torch.float64:
        tensors["checksum"] = torch.tensor(filters._checksum(tensors["sigma"], tensors["phi"]))
    save_file(tensors, path)
    assert all(map(torch.equal, spectral_filters(33, 4), expected))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_filter_cache_that_cannot_be_written_ends_nothing(fault, tmp_path, monkeypatch):
    calls, number, _ = FAULTS[fault]
    if calls == "limit":
        (tmp_path / "cache").write_text("a file in its place")
    else:
        failing(monkeypatch, tmp_path, calls, number)
    assert spectral_filters(33, 4)[1].shape == (33, 4)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] in ([], ["cache"])


@damage_of_every_kind
def test_damaged_data_of_the_embedded_tasks_are_written_anew(damage, tmp_path):
    documents = [f"words of document {number}, and others. " * 9 for number in range(9)]
    folder = write_embedded_data(documents, tmp_path)
    whole = files_of(tmp_path)
    for path in folder.rglob("*.jsonl"):
        path.write_bytes(damage(path.read_bytes()))
    assert write_embedded_data(documents, tmp_path) == folder
    assert files_of(tmp_path) == whole


def test_data_of_the_embedded_tasks_where_the_cache_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(definitions, "_scratch", lambda: str(tmp_path / "scratch"))
    folder = write_embedded_data(["a document"], tmp_path / "file")
    assert folder.is_relative_to(tmp_path / "scratch") and len(list(folder.rglob("*.jsonl"))) == 2


# Token shards


@pytest.fixture
def tokens(inputs, tmp_path):
    config = DataConfig(
        dataset=str(inputs / "corpus.jsonl"), validation_fraction=0.3, cache_dir=str(tmp_path / "tokens")
    )
    return prepare(config, progress=False).directory / "train"


@pytest.mark.parametrize("content", [b"7", b"[]", b"null", b"\xff", b"{", b"[" * 20000, b'{"shard-0000-00000.bin": 7}',
                                     b'{"shard-0000-00000.bin": [1, 2, 3]}', b""])  # fmt: skip
def test_a_damaged_record_of_verification_means_verifying_again(content, tokens):
    record = tokens / "verified.json"
    whole = record.read_bytes()
    record.write_bytes(content)
    TokenDataset(tokens)
    assert record.read_bytes() == whole
    shard = tokens / "shard-0000-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\0\0")
    record.write_bytes(content)
    with pytest.raises(UserError, match="shard-0000-00000.bin is damaged"):
        TokenDataset(tokens)


def manifests():
    for content in (b"7", b"[]", b"null", b"\xff", b"{", b"[" * 20000, b"{}", b""):
        yield repr(content[:9]), lambda _, content=content: content
    changes = [
        {key: value} for key in ("num_tokens", "num_documents", "num_bytes") for value in (-1, "9", None, 1.5, 7)
    ]
    changes += [{"shards": value} for value in ([], {}, [7], "x", [{}])]
    changes += [{"format": "1"}, {"dtype": 2}, {"dtype": "uint32"}, {"eos_token_id": 255}, {"eos_token_id": -1}]
    changes += [{"vocab_size": True}, {"tokenizer_fingerprint": 3}]
    for change in changes:
        yield str(change), lambda content, change=change: json.dumps(json.loads(content) | change).encode()
    for key, value in (
        ("name", "../x.bin"),
        ("name", "/etc/x.bin"),
        ("num_tokens", -3),
        ("num_bytes", 1),
        ("sha256", 1),
    ):

        def alter(content, key=key, value=value):
            manifest = json.loads(content)
            manifest["shards"][0][key] = value
            return json.dumps(manifest).encode()

        yield f"shard {key} {value}", alter


@pytest.mark.parametrize("alter", [pytest.param(alter, id=name) for name, alter in manifests()])
def test_a_damaged_manifest_of_shards_is_one_line_with_the_remedy(alter, tokens):
    path = tokens / "manifest.json"
    path.write_bytes(alter(path.read_bytes()))
    with pytest.raises(UserError) as error:
        TokenDataset(tokens, load_tokenizer("bytes"))
    message = str(error.value)
    assert "\n" not in message and str(tokens) in message and f"delete {tokens} to tokenise again" in message


def test_what_is_left_of_a_deleted_split_is_refused_and_stays(tokens, command, tmp_path):
    (tokens / "manifest.json").unlink()
    (tokens / "notes.txt").write_text("mine")
    before = files_of(tmp_path)
    assert refused(command("prepare", tmp_path / "tokens"), f"{tokens} has no manifest.json and is not empty")
    assert files_of(tmp_path) == before
    for path in tokens.iterdir():
        path.unlink()
    (tokens.parent / "notes.txt").write_text("mine")
    assert command("prepare", tmp_path / "tokens")[0] == 0
    TokenDataset(tokens)
    assert (tokens.parent / "notes.txt").read_text() == "mine"


def test_an_altered_state_of_an_unfinished_preparation_is_refused(inputs, command, tmp_path, monkeypatch):
    monkeypatch.setattr("flash_stu.data.tokenize._BATCH", 500)
    monkeypatch.setattr("flash_stu.data.tokenize._COMMIT_EVERY", 0)
    with monkeypatch.context() as patch:
        patch.setattr("flash_stu.data.preparation.Preparation._finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            command("prepare")
    for name in ("part-0000.json", "job.json"):
        (path,) = (tmp_path / "output").glob(f".*.unfinished/{name}")
        whole = path.read_bytes()
        for content in [*list(flips(whole))[:: max(1, len(whole) // 40)], b"7", b"[]", b"\xff", b"{}", b""]:
            path.write_bytes(content)
            try:
                unchanged = json.loads(content) == json.loads(whole)  # white space only
            except ValueError:
                unchanged = False
            if not unchanged:
                assert refused(command("prepare"), f"{path} is damaged; delete ")
        path.write_bytes(whole)
    (path.parent / "notes.txt").write_text("mine")
    assert command("prepare")[0] == 0
    (entry,) = (tmp_path / "output").iterdir()  # of the unfinished one only a file of the user's is left
    assert sorted(other.name for other in entry.iterdir()) == ["notes.txt", "train", "validation"]


# Standard streams


def with_closed_streams(path: str) -> tuple[int, bytes]:
    """Run an entry point as a shell does after `>&- 2>&-`."""
    for descriptor in (0, 1, 2):
        os.close(descriptor)
    sys.stdin = sys.stdout = sys.stderr = None

    def main():
        print("said to nobody")
        with open(path, "w") as file:
            file.write("kept")
            print("said to nobody", flush=True)
        raise UserError("wrong")

    return run_cli(main), open(path, "rb").read()


def test_closed_streams_take_nothing_down_and_write_into_no_file(tmp_path):
    assert Child(with_closed_streams, str(tmp_path / "file")).result() == (2, b"kept")
