"""
Gives every Trainer of this process the callback `Watch`, without importing Trainer, which takes seconds: at once if somebody
has imported it, else behind the import.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TRAINER = "transformers.trainer"


def watch_trainers() -> None:
    """Trainers that are made from now on have the callback, once; harmless if done before."""
    trainer = sys.modules.get(_TRAINER)
    if trainer is not None:
        _add_watch(trainer)
    elif not any(isinstance(finder, _BehindTrainer) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BehindTrainer())


def _add_watch(trainer: ModuleType) -> None:
    from .watch import Watch  # imports transformers' callbacks

    callbacks = getattr(trainer, "DEFAULT_CALLBACKS", None)  # None while it is being imported
    if callbacks is not None and Watch not in callbacks:
        callbacks.append(Watch)


class _BehindTrainer(MetaPathFinder):
    """Finds nothing itself: lets the others find Trainer's module, and adds the callback when its code has run."""

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        if fullname != _TRAINER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _add_watch(module)

        spec.loader.exec_module = exec_module
        return spec
