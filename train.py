"""Train a model: python train.py --config configs/X.yaml [section.key=value ...] [--dry-run]; or torchrun."""

from flash_stu.arguments import input_file
from flash_stu.errors import ArgumentParser, end_process, run_cli


def main() -> None:
    """Parse the command line and train, or print the size of the run or all settings."""
    parser = ArgumentParser(description="Train a model. A run that was stopped continues.")
    parser.add_argument("--config", type=input_file, metavar="YAML", help="the run; see configs/")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and the run's size, and exit")
    parser.add_argument("--list-settings", action="store_true", help="print all settings of a run, and exit")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the config's")
    arguments = parser.parse_intermixed_args()
    if arguments.list_settings:
        from flash_stu.training.settings_table import as_text

        print(as_text())
        return
    if arguments.config is None:
        parser.error("the following arguments are required: --config")

    from flash_stu.training import Trainer, join_world, load_config, world_size
    from flash_stu.training.run_size import describe

    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        print(describe(config, world_size()))
        return
    with join_world(config) as world:
        Trainer(config, world).fit()


if __name__ == "__main__":
    end_process(run_cli(main))
