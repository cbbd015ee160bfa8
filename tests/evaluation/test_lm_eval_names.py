"""Names inside lm-eval that ours replaces or overrides: a failure here says which one a new version has changed."""

import inspect

import lm_eval.api.task
import lm_eval.utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM

from flash_stu.evaluation.patches import compiled_templates, quiet


def test_the_harness_makes_the_bar_that_is_hidden():
    before = lm_eval.api.task.tqdm
    assert "tqdm(" in inspect.getsource(lm_eval.api.task.Task.build_all_requests)
    with quiet():
        assert lm_eval.api.task.tqdm is not before
        assert lm_eval.api.task.tqdm([1]).disable
        print("not shown")
    assert lm_eval.api.task.tqdm is before


def test_templates_are_compiled_where_they_are_cached():
    assert "env.from_string(" in inspect.getsource(lm_eval.utils.apply_template)
    before = lm_eval.utils.env.from_string("{{a}}")
    with compiled_templates():
        assert lm_eval.utils.env.from_string("{{a}}") is lm_eval.utils.env.from_string("{{a}}") is not before
    assert lm_eval.utils.env.from_string("{{a}}") is not lm_eval.utils.env.from_string("{{a}}")


def test_the_methods_that_ours_overrides_are_called():
    assert "self._loglikelihood_tokens(" in inspect.getsource(TemplateLM.loglikelihood)
    source = inspect.getsource(HFLM.generate_until)
    assert "self._model_generate(" in source and "self.tok_batch_encode(" in source
    assert {"context", "max_length", "stop"} < set(inspect.signature(HFLM._model_generate).parameters)
    assert "left_truncate_len" in inspect.signature(HFLM.tok_batch_encode).parameters
