"""
Gives every Trainer of this process the callbacks `Watch` and `ExpectsOptimizer`, without importing Trainer, which takes
seconds: at once if somebody has imported it, else behind the import.
"""

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TRAINER = "transformers.trainer"


def watch_trainers() -> None:
    """Trainers that are made from now on have the callbacks, once; harmless if done before."""
    trainer = sys.modules.get(_TRAINER)
    if trainer is not None:
        _add_callbacks(trainer)
    elif not any(isinstance(finder, _BehindTrainer) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BehindTrainer())


def _add_callbacks(trainer: ModuleType) -> None:
    from .trainer_optimizer import ExpectsOptimizer  # these import transformers' callbacks
    from .watch import Watch

    callbacks = getattr(trainer, "DEFAULT_CALLBACKS", None)  # None while it is being imported
    if callbacks is not None:
        callbacks += [one for one in (ExpectsOptimizer, Watch) if one not in callbacks]


class _BehindTrainer(MetaPathFinder):
    """Finds nothing itself: lets the others find Trainer's module, and adds the callbacks when its code has run."""

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
            _add_callbacks(module)

        spec.loader.exec_module = exec_module
        return spec
