"""Keeps prefixes of sequences in files: which there are, whose they are, their sizes, and which go first.

A prefix is a path in a tree. A node stands for the first tokens of a sequence, up to its end; its parent stands for
fewer of them. A node's folder ``OWNER/EDITION/END-ID-PARENT`` has the tokens after the parent's end, and a file for
each cache of each layer, whichever stage it was of: the cache's rows of these tokens, or its whole state at the end. So
a sequence can start at a node if each cache of the present stage has its rows all along the path, or its state there.

The index is built from the names alone. Any thread may call. It knows files, nothing of caches or of their content.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cluster.core.errors import PrefixMissing
from cluster.core.prefix_keys import NODE_ID_BYTES, OwnerKind, pack_tokens, unpack_tokens
from cluster.core.prefix_limits import MAX_DISK_NODES
from cluster.platform.private_files import create_private_file, make_private_folder, not_written
from cluster.store.disk_space import free_bytes
from cluster.store.limits import DISK_MARGIN_BYTES
from cluster.worker.piece_file import TEMPORARY, Piece, pack_piece, read_piece, write_piece

log = logging.getLogger(__name__)

_OWNER: Final = re.compile(rf"({'|'.join(OwnerKind)})-[0-9a-f]{{32}}")
_EDITION: Final = re.compile(r"[0-9a-f]{32}")
_NODE: Final = re.compile(r"(?P<end>[0-9]{8})-(?P<id>[0-9a-f]{32})-(?P<parent>[0-9a-f]{32})")
_LEAF: Final = re.compile(r"[rs]t?[0-9]{1,5}(\.[0-9]{1,5}){0,4}")
_TOKENS: Final = "tokens"
ROOT: Final = bytes(NODE_ID_BYTES)
"""The parent of a node that begins with the first token."""
_NODE_BYTES: Final = 8192
"""What the disk needs for a node's folder and its tokens."""
_ROWS, _STATE = "r", "s"


@dataclass(frozen=True, slots=True)
class Place:
    """Where prefixes of one owner and one edition of a model are."""

    owner: str
    edition: str


@dataclass(eq=False, slots=True)
class Node:
    """The first ``end`` tokens of sequences, with the files of its folder and their bytes."""

    place: Place
    id: bytes
    parent: bytes
    end: int
    files: dict[str, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return _NODE_BYTES + sum(self.files.values())

    def has(self, leaf: str) -> bool:
        """Return whether it has a cache's rows or its state."""
        return _ROWS + leaf in self.files or self.has_state(leaf)

    def has_state(self, leaf: str) -> bool:
        return _STATE + leaf in self.files


class PrefixFiles:
    """The files in ``folder``, at most ``limit`` bytes. ``evictions`` counts the nodes that went to make room."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self.limit = folder, limit
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        """Held while files are written or owners deleted, so that no file of a deleted owner is written."""
        self._owners: tuple[frozenset[str], bool] = frozenset(), False
        self._nodes: OrderedDict[tuple[Place, bytes], Node] = OrderedDict()
        """Least recently used first."""
        self._bytes = 0
        self.evictions = 0
        for node in _sort_by_use(_scan(folder)):
            self._nodes[node.place, node.id] = node
            self._bytes += node.nbytes

    @property
    def nbytes(self) -> int:
        return self._bytes

    def __len__(self) -> int:
        return len(self._nodes)

    def keep_owners(self, owners: Collection[str], *, anonymous: bool) -> None:
        """Delete the files of all other owners, and write none for them. Raises OSError.

        ``anonymous``: keep those of callers that need no key. Before the first call nothing is written.
        """
        with self._writing:
            self._owners = frozenset(owners), anonymous
            with self._lock:
                for node in [n for n in self._nodes.values() if not self.keeps(n.place.owner)]:
                    self._forget(node)
            for name in os.listdir(self._folder) if self._folder.exists() else ():  # noqa: PTH208
                if not self.keeps(name):
                    log.info("prefixes: deleted those of an owner that is gone owner=%s", name)
                    _remove(self._folder / name)

    def keeps(self, owner: str) -> bool:
        """Return whether the owner may have prefixes here."""
        named, anonymous = self._owners
        known = owner in named or (anonymous and owner.startswith(f"{OwnerKind.OPEN}-"))
        return known and bool(_OWNER.fullmatch(owner))

    def node(self, place: Place, node_id: bytes) -> Node | None:
        with self._lock:
            return self._nodes.get((place, node_id))

    def path(self, place: Place, node_id: bytes) -> list[Node]:
        """Return the nodes from the first to this one. Raises PrefixMissing if one is missing."""
        found: list[Node] = []
        with self._lock:
            while node_id != ROOT:
                node = self._nodes.get((place, node_id))
                if node is None or (found and node.end >= found[-1].end):
                    raise PrefixMissing("the prefix is not on disk, or only a part of it")
                found.append(node)
                node_id = node.parent
        return found[::-1]

    def touch(self, path: Iterable[Node]) -> None:
        """Count a path as used just now. Its nodes are dropped from its end, since the rest is useless without them."""
        latest_first = sorted(path, key=lambda node: -node.end)
        with self._lock:
            self._use(latest_first)
        for node in latest_first:
            with suppress(OSError):
                os.utime(self._path_of(node))

    def _use(self, latest_first: Iterable[Node]) -> None:
        for node in latest_first:
            if self._nodes.get((node.place, node.id)) is node:
                self._nodes.move_to_end((node.place, node.id))

    def startable(self, edition: str, leaves: Collection[str]) -> list[tuple[int, bytes]]:
        """Return end and id of each node at which a sequence with these caches can start, most recently used first."""
        with self._lock:
            nodes = [node for node in self._nodes.values() if node.place.edition == edition]
        asked = frozenset(leaves)
        rows: dict[tuple[Place, bytes], frozenset[str]] = {}
        found: set[tuple[Place, bytes]] = set()
        for node in sorted(nodes, key=lambda node: node.end):
            before = asked if node.parent == ROOT else rows.get((node.place, node.parent), frozenset())
            here = frozenset(leaf for leaf in before if _ROWS + leaf in node.files)
            rows[node.place, node.id] = here
            if all(leaf in here or _STATE + leaf in node.files for leaf in asked):
                found.add((node.place, node.id))
        return [(node.end, node.id) for node in reversed(nodes) if (node.place, node.id) in found]

    def add_node(self, place: Place, node_id: bytes, parent: bytes, start: int, tokens: tuple[int, ...]) -> Node | None:
        """Return the node for the tokens up to the end of ``tokens``; create it if there is none.

        ``tokens`` are those from ``start`` on, where the ``parent`` ends. None if there is no room, or if the owner's
        files are not kept. Raises OSError.
        """
        with self._writing:
            if (known := self.node(place, node_id)) is not None:
                return known
            node = Node(place, node_id, parent, start + len(tokens))
            if not self.keeps(place.owner) or not self._make_room(_NODE_BYTES, node):
                return None
            path = self._path_of(node)
            make_private_folder(path, top=self._folder)
            write_piece(path / _TOKENS, pack_piece(path / _TOKENS, {"start": start}, [pack_tokens(tokens)]))
            with self._lock:
                self._nodes[place, node_id] = node
                self._bytes += node.nbytes
                self._use(self._path_to(node)[::-1])
            return node

    def write(self, node: Node, leaf: str, header: dict[str, Any], parts: list[memoryview], *, rows: bool) -> bool:
        """Write a cache's rows, or its state. Return False if there is no room, or if the node is gone. Raises OSError.

        The least recently used nodes go to make room, but neither this one nor those before it.
        """
        name = (_ROWS if rows else _STATE) + leaf
        path = self._path_of(node) / name
        content = pack_piece(path, header, parts)
        size = sum(memoryview(part).nbytes for part in content)
        with self._writing:
            if self.node(node.place, node.id) is not node or not self._make_room(size, node):
                return False
            write_piece(path, content)
            with self._lock:
                self._bytes += size - node.files.get(name, 0)
                node.files[name] = size
            return True

    def read_tokens(self, node: Node) -> tuple[int, tuple[int, ...]]:
        """Return where the node's tokens start, and the tokens. Raises PrefixMissing."""
        piece = read_piece(self._path_of(node) / _TOKENS)
        try:
            return int(piece.header["start"]), unpack_tokens(piece.data)
        except (KeyError, TypeError, ValueError) as e:
            raise PrefixMissing("the tokens of a prefix are damaged") from e

    def read(self, node: Node, leaf: str, *, rows: bool) -> Piece:
        """Return a cache's rows or state. Raises PrefixMissing."""
        return read_piece(self._path_of(node) / ((_ROWS if rows else _STATE) + leaf))

    def delete(self, node: Node) -> None:
        """Delete a node that is damaged. What follows it can no longer be used and goes in its turn.

        A file that cannot be deleted is used no more until the next start, which finds the damage again.
        """
        with self._lock:
            self._forget(node)
        with suppress(OSError):
            _remove(self._path_of(node))

    def _make_room(self, needed: int, node: Node) -> bool:
        """Delete the least recently used nodes until ``needed`` bytes of ``node`` fit. Return False if they never do.

        Nodes also go if others have filled the disk. What is before ``node`` stays: without it, the node is useless.
        """
        if needed > self.limit:
            return False
        most = min(self.limit, self._bytes + free_bytes(self._folder) - DISK_MARGIN_BYTES)
        gone: list[Node] = []
        with self._lock:
            most_nodes = MAX_DISK_NODES - ((node.place, node.id) not in self._nodes)
            kept: list[Node] | None = None
            while self._bytes + needed > most or len(self._nodes) > most_nodes:
                kept = [*self._path_to(node), node] if kept is None else kept
                oldest = next((old for old in self._nodes.values() if old not in kept), None)
                if oldest is None:
                    break
                self._forget(oldest)
                gone.append(oldest)
            self.evictions += len(gone)
            fits = self._bytes + needed <= most and len(self._nodes) <= most_nodes
        for old in gone:
            _remove(self._path_of(old))
        return fits

    def _path_to(self, node: Node) -> list[Node]:
        """Return the nodes before this one and it, as far as they are there."""
        found: list[Node] = []
        at: Node | None = node
        while at and (not found or at.end < found[-1].end):
            found.append(at)
            at = self._nodes.get((node.place, at.parent))
        return found[::-1]

    def _forget(self, node: Node) -> None:
        if self._nodes.get((node.place, node.id)) is node:
            del self._nodes[node.place, node.id]
            self._bytes -= node.nbytes

    def _path_of(self, node: Node) -> Path:
        name = f"{node.end:08}-{node.id.hex()}-{node.parent.hex()}"
        return self._folder / node.place.owner / node.place.edition / name


def prepare_folder(folder: Path, limit: int) -> None:
    """Create the folder of a worker's prefixes, or delete it if ``limit`` is 0. Raises InvalidOption or DiskFull.

    Deleting it is no option but a promise: without the option, nothing of a prompt stays on disk.
    """
    try:
        if not limit:
            _remove(folder)
            return
        make_private_folder(folder)
        probe = folder / f"{TEMPORARY}probe"
        os.close(create_private_file(probe))
        probe.unlink()
    except OSError as e:
        raise not_written(e, folder, "prefixes") from e


def _scan(folder: Path) -> Iterator[tuple[int, Node]]:
    """Yield each node with the time of its last use. Delete everything else: leftovers of a kill, links, other forms.

    Raises OSError if the folder cannot be read.
    """
    if not folder.exists():
        return
    for owner in _folders(folder, _OWNER):
        for edition in _folders(owner, _EDITION):
            for path in _folders(edition, _NODE):
                name = _NODE.fullmatch(path.name)
                assert name
                place = Place(owner.name, edition.name)
                node = Node(place, bytes.fromhex(name["id"]), bytes.fromhex(name["parent"]), int(name["end"]))
                node.files = _files(path)
                yield path.stat().st_mtime_ns, node


def _sort_by_use(found: Iterable[tuple[int, Node]]) -> list[Node]:
    """Return nodes, the least recently used first. A node was used whenever one that follows it was."""
    used = {(node.place, node.id): (at, node) for at, node in found}
    for key, (_, node) in sorted(used.items(), key=lambda item: -item[1][1].end):
        before = used.get((node.place, node.parent))
        if before and before[1].end < node.end:
            used[node.place, node.parent] = max(before[0], used[key][0]), before[1]
    return [node for _, node in sorted(used.values(), key=lambda item: (item[0], -item[1].end))]


def _folders(parent: Path, form: re.Pattern[str]) -> list[Path]:
    found = []
    with os.scandir(parent) as entries:
        for entry in entries:
            if form.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                found.append(parent / entry.name)
            else:
                _remove(parent / entry.name)
    return found


def _files(path: Path) -> dict[str, int]:
    sizes = {}
    with os.scandir(path) as entries:
        for entry in entries:
            known = entry.stat(follow_symlinks=False)
            if stat.S_ISREG(known.st_mode) and _LEAF.fullmatch(entry.name):
                sizes[entry.name] = known.st_size
            elif not stat.S_ISREG(known.st_mode) or entry.name != _TOKENS:
                _remove(path / entry.name)
    return sizes


def _remove(path: Path) -> None:
    """Delete a file, a link or a folder with all that is in it. Raises OSError if it cannot be deleted."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        return
