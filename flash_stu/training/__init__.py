"""Training: run config, trainer, parallelism, checkpoints, optimizer, metrics."""

from flash_stu.distributed import world_size
from flash_stu.training.parallel import join_world
from flash_stu.training.run_config import RunConfig, load_config
from flash_stu.training.trainer import Trainer

__all__ = ["RunConfig", "Trainer", "join_world", "load_config", "world_size"]
