"""Evaluation between steps: the validation loss, and tasks of lm-eval-harness.

The tasks are scored on the model as an export of this step would be. Every process gathers a whole copy of the model in
the dtype of evaluation, so the requests can be divided like those of evaluate.py whatever the strategy is, and nothing
of the training model is touched. The copy takes as much memory as the exported model while the tasks run.
"""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from flash_stu.data import TokenDataset, Tokenizer
from flash_stu.devices import default_dtype
from flash_stu.distributed import World
from flash_stu.errors import UserError
from flash_stu.model.modeling import FlashSTUForCausalLM
from flash_stu.progress import Progress
from flash_stu.training.initialization import build_model
from flash_stu.training.parallel import free_gathered
from flash_stu.training.run_config import EvaluationConfig, RunConfig
from flash_stu.training.step import token_loss, unwatched


class ValidationWindows:
    """The same windows at every validation, evenly spread over the split.

    Args:
        dataset: the validation split.
        config: the run's.
        end_of_text: as `token_loss` takes it.
    """

    def __init__(self, dataset: TokenDataset, config: RunConfig, end_of_text: int | None) -> None:
        self.dataset = dataset
        self.end_of_text = end_of_text
        self.length = config.train.sequence_length
        self.batch_size = config.train.micro_batch_size
        self.chunks = config.train.sequence_chunks
        available = (len(dataset) - 1) // self.length
        if available < 1:
            raise UserError(
                f"train.sequence_length is {self.length}; the validation split has only {len(dataset)} tokens"
            )
        wanted = config.train.validation_tokens
        count = available if wanted is None else min(available, max(1, wanted // self.length))
        self.starts = [i * available // count * self.length for i in range(count)]
        self.tokens_per_byte = len(dataset) / dataset.num_bytes

    def batches(self, world: World) -> Iterator[tuple[torch.Tensor, int]]:
        """Yield (windows, how many of them count, from the front) for this process.

        Every process gets the same number of batches, since a forward pass may have to be made by all
        together, and all batches have one shape, since compiled blocks would be compiled again for another:
        the last ones are filled up with copies.
        """
        for first in range(0, len(self.starts), self.batch_size * world.data_size):
            begin = first + world.data_rank * self.batch_size
            starts = self.starts[begin : begin + self.batch_size]
            filled = starts + self.starts[:1] * (self.batch_size - len(starts))
            windows = [self.dataset.window(start, self.length + 1) for start in filled]
            yield torch.from_numpy(np.stack(windows).astype(np.int64)), len(starts)

    @torch.no_grad()
    def losses(self, model: nn.Module, world: World, mark: Callable[[str], object] = unwatched) -> tuple[float, float]:
        """Returns the mean loss over the windows in nats per token and in bits per byte; for all processes alike.

        The model, as `parallelize` returned it, is in eval mode afterwards; `mark` is called before each batch.
        """
        model.eval()
        nats, windows = torch.zeros((), device=world.device), 0
        for batch, counted in self.batches(world):
            mark("validation")
            loss = token_loss(model, batch, world, counted or None, self.end_of_text, self.chunks)
            nats = nats + loss * counted  # of none: finite times 0
            windows += counted
        free_gathered(model)
        total_nats, total_windows = world.sum(nats, windows)
        loss = total_nats / total_windows
        return loss, loss / math.log(2) * self.tokens_per_byte

    @torch.no_grad()
    def try_forward(self, model: nn.Module, world: World) -> None:
        """Run one forward pass, so that a back end that cannot run here raises before anything is written."""
        model.eval()
        batch, _ = next(self.batches(world))
        token_loss(model, batch, world, None, self.end_of_text, self.chunks)
        free_gathered(model)


class TaskEvaluation:
    """The tasks of a run, loaded before it starts.

    Args:
        config: the run's.
        world: the processes that share the work.
        tokenizer: of the run.
        longest: the longest input of the model; None for any.

    Raises:
        UserError: for unknown tasks, tasks that are longer than that, or data that is not available.
    """

    def __init__(
        self, config: EvaluationConfig, world: World, tokenizer: Tokenizer, longest: int | None = None
    ) -> None:
        self.config, self.world, self.tokenizer = config, world, tokenizer
        self.tasks = []
        if config.tasks is None:
            return
        from flash_stu.evaluation.definitions import resolve_tasks  # takes seconds to import
        from flash_stu.evaluation.harness import load_tasks
        from flash_stu.evaluation.long_context import parse_name

        given = {"data_dir": config.data_dir, "include_path": config.include_path}
        folders = {key: None if path is None else Path(path) for key, path in given.items()}
        for key, folder in folders.items():
            if folder is not None and not folder.is_dir():
                raise UserError(f"evaluation.{key} is '{folder}', which is not a directory")
        try:
            specs, _ = resolve_tasks(config.tasks)
            for task in filter(None, (parse_name(spec.name) for spec in specs)):
                if longest is not None and task.length > longest:
                    raise UserError(
                        f"{task.kind}_{task.length} is longer than model.max_position_embeddings, {longest}"
                    )
            with self.world.main_first():
                self.tasks = load_tasks(specs, **folders, count_tokens=lambda text: len(tokenizer.encode(text)))
        except UserError as error:
            raise UserError(f"evaluation.tasks: {error}") from None

    def due(self, step: int) -> bool:
        """Returns whether the tasks are to be run after this step."""
        return bool(self.tasks) and step % self.config.every == 0

    def scores(self, model: nn.Module, mark: Callable[[str], object] = unwatched) -> dict[str, float]:
        """Run the tasks on a model as parallelize returned it; `mark` is called now and then with what is being done.

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
    """Returns a plain model with the weights of one in training, sharded, wrapped or neither.

    To be called by all processes alike. What must stay float32 does, whatever the dtype.
    """
    source = cast(FlashSTUForCausalLM, model.module if isinstance(model, DistributedDataParallel) else model)
    copy = build_model(deepcopy(source.config))
    tied = copy.config.tie_word_embeddings
    state = {}
    for name, tensor in source.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        state[name] = whole.to(device, torch.float32 if copy.stays_float32(name) else dtype, copy=True)
    copy.load_state_dict(state, strict=not tied, assign=True)
    copy.tie_weights()
    return copy.eval().requires_grad_(False)
