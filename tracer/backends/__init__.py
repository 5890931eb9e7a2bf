"""The frameworks that can be recorded, each hooked when the program itself imports it.

A backend names the modules that it wants to hook; nothing is imported on its behalf.  A new framework is one
module beside this one and one line in BACKENDS.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from tracer.recorder import Recorder

BACKENDS: Final = ("pytorch", "mlx")


class Backend(Protocol):
    """Hooks of one framework."""

    name: str

    def triggers(self) -> Mapping[str, Callable[[], None]]:
        """Module name -> what to do right after the program has imported it."""

    def uninstall(self) -> None:
        """Take every hook back."""


class Backends:
    """All backends of one recording, waiting for their frameworks to be imported."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._backends: list[Backend] = []
        self._finder = ImportWatcher(self._fire)
        self._triggers: dict[str, list[Callable[[], None]]] = {}

    def install(self) -> None:
        """Hook what is imported already, and watch for the rest."""
        for name in BACKENDS:
            backend: Backend = importlib.import_module(f"tracer.backends.{name}").Backend(self._recorder)
            self._backends.append(backend)
            for module, action in backend.triggers().items():
                self._triggers.setdefault(module, []).append(action)
        for module in self._triggers:
            if module in sys.modules:
                self._fire(module)
        self._finder.wanted = frozenset(name for name in self._triggers if name not in sys.modules)
        sys.meta_path.insert(0, self._finder)

    def uninstall(self) -> None:
        """Take every hook back, in reverse order."""
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        for backend in reversed(self._backends):
            backend.uninstall()

    def _fire(self, module: str) -> None:
        for action in self._triggers[module]:
            with self._recorder.guard():
                action()


class ImportWatcher(importlib.abc.MetaPathFinder):
    """Lets the usual machinery import a module, then calls back."""

    def __init__(self, imported: Callable[[str], None]) -> None:
        self.wanted: frozenset[str] = frozenset()
        self._imported = imported

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The usual spec of a wanted module, with a loader that calls back."""
        if fullname not in self.wanted:
            return None
        # Looking for a module is not importing it: it stays wanted until it has been executed.
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _NotifyingLoader(spec.loader, self._executed)
                return spec
        return None

    def _executed(self, module: str) -> None:
        if module in self.wanted:
            self.wanted -= {module}
            self._imported(module)


class _NotifyingLoader(importlib.abc.Loader):
    """Loads a module with its own loader and reports that it is there."""

    def __init__(self, loader: importlib.abc.Loader, imported: Callable[[str], None]) -> None:
        self._loader = loader
        self._imported = imported

    def __getattr__(self, name: str) -> object:
        # get_data, get_source, is_package ...: whatever the real loader can do.
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._imported(module.__name__)
