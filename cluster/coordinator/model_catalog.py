"""The models that a coordinator may serve, and the names by which clients ask for them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Final

from cluster.coordinator.settings import LoadOrder, ModelEntry
from cluster.core.adapter import split_model_name
from cluster.core.errors import InvalidOption, ModelNotFound
from cluster.core.limits import MAX_FACT_CHARS

__all__ = ["DEFAULT", "ModelCatalog", "ModelEntry", "public_id"]

DEFAULT: Final = "default"
"""The name that always means the first model. An entry with this name is shown under its model's id."""
MAX_MODELS: Final = 64
MAX_ALIASES: Final = 32
MAX_REPLICAS: Final = 64
WILDCARD: Final = "*"
COPY_MARK: Final = "#"
"""Stands between a model's name and the number of a copy."""
_LISTED: Final = 20
"""Names in a refusal; more would not help a reader."""


class ModelCatalog:
    """Models by name, in an order that people chose; the first is the default one. It never changes.

    Raises InvalidOption if two models have a name in common, or if a fallback is unknown or leads back to its model.
    Its field is the name of a model, and its detail ``key`` the key that is wrong there.
    ``guests`` are served besides: models that were loaded by hand, or that left the file. A guest gives up each name
    that a model of the catalog has too.
    """

    def __init__(self, entries: Sequence[ModelEntry], guests: Sequence[ModelEntry] = ()) -> None:
        if len(entries) > MAX_MODELS:
            raise InvalidOption(f"{len(entries)} models were given; at most {MAX_MODELS} can be", field="models")
        self.entries = tuple(entries)
        self.guests = tuple(guest for guest in guests if guest.name not in {entry.name for entry in entries})
        self._ids = {entry.name: public_id(entry.order.model) for entry in self}
        _check_names(self.entries)
        _check_fallbacks(self.entries)
        self._names = {**self._index_names(self.guests), **self._index_names(self.entries)}
        self._patterns = sorted(self._find_patterns(), key=lambda found: len(found[0]), reverse=True)

    def __iter__(self) -> Iterator[ModelEntry]:
        """Iterate over all models, guests last."""
        return iter((*self.entries, *self.guests))

    def get(self, name: str) -> ModelEntry | None:
        """Return the model whose own name is ``name``; None if there is none."""
        return next((entry for entry in self if entry.name == name), None)

    @property
    def default(self) -> ModelEntry:
        """The model of requests that name none, or ``default``: the first one, or the guest of that name.

        Raises ModelNotFound if there is none.
        """
        first = next(iter(self.entries), None) or self.get(DEFAULT) or next(iter(self.guests), None)
        if first is None:
            raise ModelNotFound("no model is configured; load one with `macpipe load MODEL`", field="model")
        return first

    def find(self, requested: str | None) -> ModelEntry:
        """Return the model with this name, alias, id, source or last part of its folder; "" and None: the default one.

        Of several wildcard aliases the longest decides. Raises ModelNotFound, with the names that there are.
        """
        if requested in (None, "", DEFAULT):
            return self.default
        if entry := self._find_exact(str(requested)) or self._find_by_pattern(str(requested)):
            return entry
        raise self._not_found(str(requested))

    def resolve(self, requested: str | None) -> tuple[ModelEntry, str]:
        """Return the model that ``requested`` names, and the adapter behind a colon; "" for none.

        Raises ModelNotFound.
        """
        if requested in (None, "", DEFAULT) or self._find_exact(str(requested)):
            return self.find(requested), ""
        base, adapter = split_model_name(str(requested))
        if base and (entry := self._find_base(base)):
            return entry, adapter
        if entry := self._find_by_pattern(str(requested)):
            return entry, ""
        raise self._not_found(str(requested))

    def public_name(self, entry: ModelEntry) -> str:
        """Return the name under which a model is shown: its own, or its id if it is only known as the default one."""
        return self._ids[entry.name] if entry.name == DEFAULT else entry.name

    def public_names(self, entry: ModelEntry) -> tuple[str, ...]:
        """Return the names under which a model is listed: the public one, then aliases without a wildcard."""
        aliases = (alias for alias in entry.aliases if WILDCARD not in alias and self._names.get(alias) is entry)
        return tuple(dict.fromkeys((self.public_name(entry), *aliases)))

    def choose_load(self, name: str, order: LoadOrder, plain: LoadOrder) -> tuple[str, LoadOrder]:
        """Return the model's own name, and the order, of a load that was asked for with these.

        ``order.model`` is a source, or a name of a configured model; "" with only ``name``. An order without options,
        which equals ``plain``, means the options of a model with a name. A model without a name takes the place of a
        single one that has none either, and is beside others called by its public id. Raises ModelNotFound, and
        InvalidOption for a name that cannot be, or that is one of several configured models with another source.
        """
        entry = self._find_exact(name or order.model)
        if entry is None and (name or order.model) == DEFAULT:
            entry = self.default
        if entry is None and name and not order.model:
            raise self._not_found(name)
        if entry and name and order.model and len(self.entries) > 1 and entry in self.entries:
            self._require_source(name, entry, order.model)
        if entry and (not order.model or not name):
            configured = order == plain and entry.name != DEFAULT
            order = entry.order if configured else replace(order, model=entry.order.model)
        if entry:
            return entry.name, order
        if not name and all(entry.name == DEFAULT for entry in self):
            return DEFAULT, order
        return require_model_name(name or public_id(order.model)), order

    def _require_source(self, name: str, entry: ModelEntry, model: str) -> None:
        """Raise InvalidOption unless ``model`` means this very model: its clients would get another one's answers."""
        source = entry.order.model
        folder = Path(source).expanduser().absolute()
        if self._find_exact(model) is not entry and Path(model).expanduser().absolute() != folder:
            raise InvalidOption(
                f"{name} is the name of a configured model, {source}; choose another name for {model}", field="name"
            )

    def with_guest(self, entry: ModelEntry) -> ModelCatalog:
        """Return a catalog that serves this model besides."""
        others = (guest for guest in self.guests if guest.name != entry.name)
        return ModelCatalog(self.entries, (*others, entry))

    def with_order(self, name: str, order: LoadOrder) -> ModelCatalog:
        """Return a catalog in which the model of this name has another order."""
        entries, guests = (
            [replace(entry, order=order) if entry.name == name else entry for entry in some]
            for some in (self.entries, self.guests)
        )
        return ModelCatalog(entries, guests)

    def without_guests(self, names: Iterable[str]) -> ModelCatalog:
        """Return a catalog without the guests of these names."""
        left = set(names)
        return ModelCatalog(self.entries, [guest for guest in self.guests if guest.name not in left])

    def _index_names(self, entries: Sequence[ModelEntry]) -> dict[str, ModelEntry]:
        """Return these models by each exact name. A name goes before an alias, an alias before what a source says.

        A last part that several sources have means none of them.
        """
        found: dict[str, ModelEntry] = {}
        by_last: dict[str, list[ModelEntry]] = {}
        for entry in entries:
            found.setdefault(entry.name, entry)
        for entry in entries:
            for alias in entry.aliases:
                found.setdefault(alias, entry)
        for entry in entries:
            for name in (self._ids[entry.name], entry.order.model):
                found.setdefault(name, entry)
            by_last.setdefault(PurePath(entry.order.model).name, []).append(entry)
        for last, having in by_last.items():
            if len({entry.order.model for entry in having}) == 1:
                found.setdefault(last, having[0])
        return found

    def _find_patterns(self) -> list[tuple[str, re.Pattern[str], ModelEntry]]:
        return [
            (alias, _compile_wildcard(alias), entry) for entry in self for alias in entry.aliases if WILDCARD in alias
        ]

    def _find_exact(self, name: str) -> ModelEntry | None:
        return None if name == DEFAULT else self._names.get(name)

    def _find_base(self, name: str) -> ModelEntry | None:
        return self.default if name == DEFAULT else self._find_exact(name)

    def _find_by_pattern(self, name: str) -> ModelEntry | None:
        return next((entry for _, pattern, entry in self._patterns if pattern.fullmatch(name)), None)

    def _not_found(self, requested: str) -> ModelNotFound:
        names = [name for entry in self for name in self.public_names(entry)]
        listed = ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
        return ModelNotFound(f"the model {requested[:64]} is not served here; use {listed or 'none'}", field="model")


def public_id(model: str, path: str = "") -> str:
    """Return how a model is called in public: a Hugging Face id or bundled name unchanged, a folder's last part.

    A folder's path is private. ``path`` is where the model was found; "" looks whether there is such a folder.
    """
    name = PurePath(model)
    is_folder = model.startswith(("/", ".", "~"))
    if not is_folder and model:
        is_folder = PurePath(path).parts[-len(name.parts) :] == name.parts if path else Path(model).is_dir()
    return Path(model).expanduser().absolute().name if is_folder else model


def require_model_name(name: str, what: str = "a model's name", field: str = "name") -> str:
    """Return ``name``. Raises InvalidOption unless it can be the name of a model."""
    if not name or len(name) > MAX_FACT_CHARS or not name.isprintable() or name != name.strip():
        raise InvalidOption(
            f"{name[:64]!r} cannot be {what}: give 1 to {MAX_FACT_CHARS} printable characters without a space at the "
            "start or end",
            field=field,
        )
    if WILDCARD in name:
        raise InvalidOption(f"{name[:64]!r} cannot be {what}: only an alias may have a {WILDCARD}", field=field)
    if COPY_MARK in name and field == "name":
        raise InvalidOption(f"{name[:64]!r} cannot be {what}: a {COPY_MARK} marks the copies of a model", field=field)
    return name


def _compile_wildcard(alias: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, re.split(r"\*+", alias))), re.DOTALL)


def check_entry(entry: ModelEntry) -> ModelEntry:
    """Return ``entry``. Raises InvalidOption if its name or its aliases cannot be those of a model."""
    require_model_name(entry.name)
    if len(entry.aliases) > MAX_ALIASES:
        raise InvalidOption(
            f"the model {entry.name} has {len(entry.aliases)} aliases; at most {MAX_ALIASES} can be", field="aliases"
        )
    for alias in entry.aliases:
        require_model_name(alias.replace(WILDCARD, "x"), "an alias", "aliases")
    return entry


def _check_names(entries: Sequence[ModelEntry]) -> None:
    """Raise InvalidOption if a name is wrong, or if it means two models."""
    owners: dict[str, ModelEntry] = {}
    for entry in entries:
        check_entry(entry)
        if entry.name in owners:
            raise InvalidOption(
                f"two models are named {entry.name}; give one of them another name", field=entry.name, key="name"
            )
        owners[entry.name] = entry
    if len(entries) > 1 and DEFAULT in owners:
        raise InvalidOption(
            f"no model can be named {DEFAULT}: that always means the first one; give it another name", field=DEFAULT
        )
    for entry in entries:
        _check_aliases(entry, owners)
        if DEFAULT in entry.aliases and entry is not entries[0]:
            raise InvalidOption(
                f"the model {entry.name} cannot have the alias {DEFAULT}: that always means the first one; remove it",
                field=entry.name,
                key="aliases",
            )


def _check_aliases(entry: ModelEntry, owners: dict[str, ModelEntry]) -> None:
    for alias in entry.aliases:
        owner = owners.setdefault(alias, entry)
        if owner is entry:
            continue
        if alias == owner.name and entry.name in owner.aliases:
            raise InvalidOption(
                f"{entry.name} and {owner.name} are aliases of each other, which is a circle; remove one alias",
                field=entry.name,
                key="aliases",
            )
        raise InvalidOption(
            f"the alias {alias} of the model {entry.name} already means the model {owner.name}; remove one of them",
            field=entry.name,
            key="aliases",
        )


def _check_fallbacks(entries: Sequence[ModelEntry]) -> None:
    """Raise InvalidOption if a fallback is no model's name or alias, or if it leads back to its model."""
    by_name = {name: entry for entry in entries for name in (*entry.aliases, entry.name)}
    for entry in entries:
        passed, at = [entry.name], entry
        while at.fallback:
            if at.fallback not in by_name:
                raise InvalidOption(
                    f"the fallback {at.fallback} of the model {at.name} is no model's name; the models are"
                    f" {', '.join(one.name for one in entries)}",
                    field=at.name,
                    key="fallback",
                )
            at = by_name[at.fallback]
            if at.name in passed:
                circle = " -> ".join([*passed[passed.index(at.name) :], at.name])
                why = f"the fallbacks {circle} are a circle; remove one of them"
                raise InvalidOption(why, field=at.name, key="fallback")
            passed.append(at.name)
