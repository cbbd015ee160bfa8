"""Makes the models known to transformers' automatic classes and to PEFT as soon as those are loaded, and not before.

Importing them takes seconds, which a command line that is wrong, or asks for help, should not have to wait for.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

# Once the module of transformers or PEFT on the left is loaded, the one of ours on the right registers what it has.
_REGISTRARS = {
    "transformers.models.auto.configuration_auto": "flash_stu.model.config",
    "transformers.models.auto.modeling_auto": "flash_stu.model.auto",
    "transformers.cli.serving.model_manager": "flash_stu.model.serving",
    "peft.tuners.tuners_utils": "flash_stu.model.adapters",
}


def install() -> None:
    """Register what can be registered now, and the rest when the module that wants it is loaded."""
    for auto, registrar in _REGISTRARS.items():
        if auto in sys.modules:
            import_module(registrar)
        else:
            sys.meta_path.insert(0, _Finder(auto, registrar))


class _Finder(MetaPathFinder):
    """Finds one module as the finders after it do, and has it followed by its registrar."""

    def __init__(self, auto: str, registrar: str) -> None:
        self.auto, self.registrar = auto, registrar

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        if fullname != self.auto:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Followed(spec.loader, self.registrar)
        return spec


class _Followed(Loader):
    """A loader that imports another module once its own is executed."""

    def __init__(self, loader: Loader, follower: str) -> None:
        self.loader, self.follower = loader, follower

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        import_module(self.follower)
