"""diffusers has no entry point for quantizers. So ours are put into its dictionaries as soon as both packages are
there, whichever was imported first, and diffusers is never imported for it.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

AWAITED = "diffusers.quantizers.auto"


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds nothing itself: the module's own loader gets something to do after its work."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, own: importlib.abc.Loader) -> None:
        self._own = own

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._own.exec_module(module)
        sys.modules[AWAITED] = module
        _register()


def _register() -> None:
    from . import diffusers_quantizer  # noqa: F401  (which registers itself)


def serve_diffusers() -> None:
    """Register now, or when diffusers' quantizers are imported."""
    if AWAITED in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Watcher())
