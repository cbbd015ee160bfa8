"""The sources run no code that they find in files: no pickle, no eval, no shell, safe loaders only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("flash_stu", "spectralds", "scripts", ".")
    for path in ROOT.glob(f"{folder}/**/*.py" if folder != "." else "*.py")
)
FORBIDDEN = {
    *("eval", "exec", "os.system", "os.popen", "torch.load", "torch.save", "pickle.load", "pickle.loads"),
    *("marshal.loads", "shelve.open", "joblib.load", "dill.load", "yaml.unsafe_load", "yaml.full_load"),
}
NEEDED = {  # of a call by its last name: keyword arguments and the values they must have
    "from_pretrained": {"trust_remote_code": False},
    "from_config": {"trust_remote_code": False},
    "load_dataset": {"trust_remote_code": False},
}


def calls(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: word.value for word in node.keywords}, node.lineno


def problems(source: str) -> list[str]:
    """Every call that could run code of a file, with its line."""
    tree, found = ast.parse(source), []
    for name, keywords, line in calls(tree):
        last = name.rpartition(".")[2]
        if name in FORBIDDEN:
            found.append(f"{line}: {name}")
        if "shell" in keywords and ast.unparse(keywords["shell"]) != "False":
            found.append(f"{line}: {name}(shell=)")
        if name == "yaml.load" and ast.unparse(keywords.get("Loader", ast.Constant(None))) not in (
            "_Loader",
            "yaml.SafeLoader",
        ):
            found.append(f"{line}: yaml.load without a safe loader")
        if name == "np.load" and ast.unparse(keywords.get("allow_pickle", ast.Constant(None))) != "False":
            found.append(f"{line}: np.load without allow_pickle=False")
        for word, value in NEEDED.get(last, {}).items():
            given = keywords.get(word, keywords.get(None))  # or inside **options
            if (
                given is None
                or (word in keywords and ast.unparse(given) != repr(value))
                or word not in keywords
                and f"{word!r}: {value}" not in ast.unparse(given)
            ):
                found.append(f"{line}: {name} without {word}={value}")
        if name == "AutoModelForCausalLM.from_pretrained" and "use_safetensors" not in keywords:
            found.append(f"{line}: {name} without use_safetensors=True")
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [
            f"{node.lineno}: import {name}" for name in names if name.split(".")[0] in ("pickle", "marshal", "dill")
        ]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_sources_run_no_code_of_files(path):
    assert problems(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        *(
            "eval(x)",
            "exec(x)",
            "os.system(x)",
            "torch.load(x)",
            "pickle.loads(x)",
            "import pickle",
            "from pickle import loads",
        ),
        *("run(x, shell=True)", "run(x, shell=flag)", "yaml.load(x)", "yaml.load(x, Loader=yaml.Loader)", "np.load(x)"),
        *("np.load(x, allow_pickle=True)", "AutoTokenizer.from_pretrained(x)", "datasets.load_dataset(x)"),
        *(
            "AutoModelForCausalLM.from_pretrained(x, trust_remote_code=False)",
            "f(trust_remote_code=True).from_config(x)",
        ),
        *("AutoConfig.from_pretrained(x, trust_remote_code=True)", "load_dataset(x, **options)"),
    ],
)
def test_the_walk_finds_them(source):
    assert len(problems(source)) >= 1
