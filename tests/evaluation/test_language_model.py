"""A model directory in the harness: against the model's own loss, and against the harness's own class."""

from types import SimpleNamespace

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file

from flash_stu.data import load_tokenizer
from flash_stu.errors import UserError
from flash_stu.evaluation.language_model import EvaluatedLM
from flash_stu.model.loading import load_model


def requests(*pairs):
    return [SimpleNamespace(args=pair) for pair in pairs]


PAIRS = requests(
    ("A question about lakes. Answer:", " deep"),
    ("A question about lakes. Answer:", " shallow water"),
    ("A question about lakes. Answer:", " d"),
    ("A question about lakes. Answer:", " s"),
    ("trailing blank ", "moves to the continuation"),
    ("", "no context at all"),
    ("x" * 90, " context longer than the model"),
    ("é東", " not ASCII"),
)


@pytest.mark.parametrize("name", ["stu_dir", "lds_dir", "llama_dir"])
def test_log_likelihoods_do_not_depend_on_the_batch_size_and_equal_the_harness_own(name, request):
    directory = request.getfixturevalue(name)
    one, five = (EvaluatedLM.load(directory, "cpu", batch_size) for batch_size in (1, 5))
    plain = HFLM(
        pretrained=str(directory), device="cpu", dtype="float32", trust_remote_code=True, max_length=one.longest or 200
    )
    results = [lm.loglikelihood(PAIRS, disable_tqdm=True) for lm in (one, five, plain)]
    for first, second, theirs in zip(*results, strict=True):
        assert first[0] == pytest.approx(second[0], abs=1e-4)
        assert first[0] == pytest.approx(theirs[0], abs=1e-4)
        assert first[1] == second[1] == theirs[1]
    assert one.counters.requests == len(PAIRS)
    assert one.trained_length == 65
    longest = len("x" * 90 + " context longer than the model") - 1
    if name == "lds_dir":  # its state takes any length
        assert (one.longest, one.counters.truncated, one.counters.beyond_trained_length) == (None, 0, 1)
    else:
        assert (one.longest, one.counters.truncated, one.counters.beyond_trained_length) == (65, 1, 0)
        assert one.counters.truncated_tokens == longest - 65


@pytest.mark.parametrize("name", ["stu_dir", "llama_dir"])
def test_rolling_log_likelihood_is_the_sum_of_the_models_own_loss(name, request, documents):
    directory = request.getfixturevalue(name)
    lm = EvaluatedLM.load(directory, "cpu", batch_size=3)
    model = load_model(directory)
    texts = [documents[0], documents[1][:64], documents[2][:65], documents[3][:66], "a"]
    scores = lm.loglikelihood_rolling(requests(*[(text,) for text in texts]))
    for text, score in zip(texts, scores, strict=True):
        # end-of-text, then the text, in stretches of 65 predictions; the last one reaches back for context
        stream = torch.tensor([256, *text.encode()])
        total = 0.0
        for start in range(0, len(stream) - 1, 65):
            stop = min(start + 65, len(stream) - 1)
            inputs, labels = (
                stream[max(0, stop - 65) : stop],
                stream[max(0, stop - 65) + 1 : stop + 1].clone(),
            )
            labels[: len(labels) - (stop - start)] = -100
            with torch.no_grad():
                logits = model(inputs[None]).logits
                loss = torch.nn.functional.cross_entropy(logits[0], labels, reduction="sum")
                if name == "stu_dir":  # what training minimises
                    own = model(inputs[None], shift_labels=labels[None], skip_logits=True).loss
                    loss = own * (stop - start)
            total -= loss.item()
        assert score == pytest.approx(total, rel=1e-6)


def test_missing_weights_are_an_error_not_random_numbers(stu_dir):
    path = stu_dir / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.gate_up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"stu.*no tensor .*gate_up_proj"):
        EvaluatedLM.load(stu_dir, "cpu", 1)


def test_tokenizer_larger_than_the_vocabulary_is_refused(tiny_model, tmp_path):
    tiny_model(vocab_size=61).save_pretrained(tmp_path)
    load_tokenizer("bytes").to_transformers().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="ids go up to 256, the model.s vocabulary to 60"):
        EvaluatedLM.load(tmp_path, "cpu", 1)


def test_generation_tasks_count_prompts_that_do_not_fit(stu_dir):
    lm = EvaluatedLM.load(stu_dir, "cpu")
    options = {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}
    short, long = (SimpleNamespace(args=("a b" * times, options)) for times in (4, 40))
    alone = EvaluatedLM.load(stu_dir, "cpu").generate_until([short])
    texts = lm.generate_until([short, long])
    assert texts[0] == alone[0]
    assert (lm.counters.truncated, lm.counters.truncated_tokens) == (1, 125 - 65)
