"""Which models there are, by every name that clients may use."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from anaphora.backends.base import Backend, Hosting
from anaphora.errors import ModelNotFound
from anaphora.types import ModelInfo


class Catalogue:
    """The models of `backend`; `aliases` are further names of its first one, and `further` knows models by name that are
    not listed.

    Current while the backend is ready. While it is not (it is loading, or being restarted) the models are as they were, so
    that remembered answers can still be given; before the first time there are none to know.
    """

    def __init__(
        self, backend: Backend, aliases: Iterable[str] = (), *, further: Callable[[str], ModelInfo | None] | None = None
    ) -> None:
        self._backend = backend
        self._further = further or _nothing
        self._aliases = tuple(aliases)
        self._models: tuple[ModelInfo, ...] = ()
        self._by_name: dict[str, ModelInfo] = {}

    async def all(self) -> tuple[ModelInfo, ...]:
        """Waits for the backend only where nothing is known yet."""
        if self._models and not self._backend.ready():
            return self._models
        models = await self._backend.models()
        if models is not self._models:  # a restarted backend may have other weights, and so other fingerprints
            self._models = models
            self._by_name = {model.id: model for model in models}
            own = [model for model in models if not isinstance(self._backend, Hosting) or not self._backend.hosts(model.id)]
            self._by_name |= dict.fromkeys(self._aliases, own[0]) if own else {}
        return models

    async def get(self, name: str) -> ModelInfo:
        """The model that clients call `name`. Raises ModelNotFound with the ids there are."""
        models = await self.all()
        model = self._by_name.get(name) or self._further(name)
        if model is None and isinstance(self._backend, Hosting):  # it does not wait for an engine of its own that is loading
            await self._backend.loaded()
            models = await self.all()
            model = self._by_name.get(name)
        if model is None:
            ids = ", ".join(model.id for model in models)
            raise ModelNotFound(f"The model '{name}' does not exist here; there is: {ids}.", param="model")
        return model

    def fingerprint(self, name: str) -> str | None:
        """Of the model called `name`, as far as it is known without waiting."""
        model = self._by_name.get(name) or self._further(name)
        return None if model is None else model.fingerprint


def _nothing(name: str) -> None:
    return None
