"""Tasks of lm-eval-harness during training, scored on the model as an export of this step would be.

Every process gathers a whole copy of the model in the dtype of evaluation, so the requests can be divided like those
of evaluate.py whatever the strategy is, and nothing of the training model is touched. The copy takes as much memory as
the exported model while the tasks run.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from flash_stu.data import Tokenizer
from flash_stu.errors import UserError
from flash_stu.model.loading import default_dtype
from flash_stu.model.modeling import FlashSTUForCausalLM
from flash_stu.progress import Progress
from flash_stu.training.config import EvaluationConfig
from flash_stu.training.parallel import World


class TaskEvaluation:
    """The tasks of a run, loaded before it starts.

    Args:
        config: the run's evaluation section.
        world: the processes.
        tokenizer: the run's.

    Raises:
        UserError: for unknown tasks, or data that cannot be had.
    """

    def __init__(self, config: EvaluationConfig, world: World, tokenizer: Tokenizer) -> None:
        self.config, self.world, self.tokenizer = config, world, tokenizer
        self.tasks = []
        if config.tasks is None:
            return
        from flash_stu.evaluation.definitions import resolve_tasks  # takes seconds to import
        from flash_stu.evaluation.harness import load_tasks

        folders = {key: getattr(config, key) and Path(getattr(config, key)) for key in ("data_dir", "include_path")}
        for key, folder in folders.items():
            if folder is not None and not folder.is_dir():
                raise UserError(f"evaluation.{key} is '{folder}', which is not a directory")
        try:
            specs, _ = resolve_tasks(config.tasks)
            with self.world.main_first():
                self.tasks = load_tasks(specs, **folders)
        except UserError as error:
            raise UserError(f"evaluation.tasks: {error}") from None

    def due(self, step: int) -> bool:
        """Whether the tasks are to be run after this step."""
        return bool(self.tasks) and step % self.config.every == 0

    def scores(self, model: nn.Module, mark: Callable[[str], object] = lambda what: None) -> dict[str, float]:
        """Run the tasks; to be called by all processes alike.

        Args:
            model: as parallelize returned it.
            mark: told now and then what is being done.

        Returns:
            "evaluation/<task>/<metric>": value, the same on every process.
        """
        from flash_stu.evaluation.harness import run_task
        from flash_stu.evaluation.language_model import EvaluatedLM
        from flash_stu.evaluation.patches import quiet

        with quiet():
            copy = whole_copy(model, self.world.device, default_dtype(self.world.device))
            lm = EvaluatedLM(copy, self.tokenizer.to_transformers(), world=self.world)
        found = {}
        for task in self.tasks:
            lm.progress = Progress(enabled=False, on_update=partial(mark, f"evaluating {task.spec.name}"))
            lm.progress.on_update()
            result = run_task(lm, task, self.config.limit)
            found[f"evaluation/{task.spec.name}/{result['metric']}"] = result["value"]
        return found


@torch.no_grad()
def whole_copy(model: nn.Module, device: torch.device, dtype: torch.dtype) -> FlashSTUForCausalLM:
    """A plain model with the weights of one in training; to be called by all processes alike.

    Args:
        model: as parallelize returned it: sharded, wrapped or neither.
        device: where to put the copy.
        dtype: of the copy; what must stay float32 does.
    """
    source = model.module if isinstance(model, DistributedDataParallel) else model
    with torch.device("meta"):
        copy = FlashSTUForCausalLM(deepcopy(source.config))
    tied = copy.config.tie_word_embeddings
    state = {}
    for name, tensor in source.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        exact = name.rpartition(".")[2] in copy._keep_in_fp32_modules_strict
        state[name] = whole.to(device, torch.float32 if exact else dtype, copy=True)
    copy.load_state_dict(state, strict=not tied, assign=True)
    copy.tie_weights()
    return copy.eval().requires_grad_(False)
