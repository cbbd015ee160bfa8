"""Generation tasks: prompts of no tokens, room for new tokens, and what was run."""

from types import SimpleNamespace

import pytest

from flash_stu.errors import UserError
from flash_stu.evaluation.language_model import EvaluatedLM


def asking(prompt, new=5, **options):
    return SimpleNamespace(args=(prompt, {"until": ["\n\n"], "max_gen_toks": new, "do_sample": False} | options))


@pytest.mark.parametrize("name", ["stu_dir", "lds_dir", "llama_dir"])
def test_an_empty_prompt_is_the_same_alone_and_in_a_batch(name, request):
    directory = request.getfixturevalue(name)
    one, many = (EvaluatedLM.load(directory, "cpu", size) for size in (1, 8))
    prompts = ["", "some words", "", "é"]
    requests = [asking(prompt) for prompt in prompts]
    alone = [one.generate_until([entry])[0] for entry in requests]
    assert many.generate_until(requests) == alone
    assert alone[0] == one.generate_until([asking("<|endoftext|>")])[0]  # the prefix token
    assert EvaluatedLM.load(directory, "cpu").loglikelihood([SimpleNamespace(args=("", alone[0] or "x"))])


@pytest.mark.parametrize("new", [65, 66, 10**6, 0, -1])
def test_new_tokens_that_leave_no_room(new, stu_dir):
    lm = EvaluatedLM.load(stu_dir, "cpu")
    with pytest.raises(UserError, match="max_gen_toks is .*allowed: 1 to 64"):
        lm.generate_until([asking("a", new)])
    assert len(lm.generate_until([asking("a", 64)])) == 1
    del (without := asking("a")).args[1]["max_gen_toks"]
    with pytest.raises(UserError, match="max_gen_toks is 256"):
        lm.generate_until([without])


def test_a_state_has_room_for_any_number_of_tokens(lds_dir):
    lm = EvaluatedLM.load(lds_dir, "cpu")
    assert len(lm.generate_until([asking("a", 100)])) == 1


def test_what_is_run_is_counted(stu_dir):
    lm = EvaluatedLM.load(stu_dir, "cpu", 1)
    lm.generate_until([asking("abcdef", 7, until=["never"])])
    assert lm.counters.forward_tokens == lm.counters.forward_tokens_unshared
    assert 6 <= lm.counters.forward_tokens <= 6 + 6  # an end-of-text token may come before the seventh
    lm = EvaluatedLM.load(stu_dir, "cpu", 2)
    lm.generate_until([asking("abcdef", 1), asking("", 1)])
    assert lm.counters.forward_tokens == 6 + 1
