from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vidrial.build.files import locked
from vidrial.build.formats import BINARY_SCHEMA, SCHEMA, binary_key
from vidrial.build.store import Store
from vidrial.errors import ArgumentError, StoreError

IMAGE = bytes(range(256)) * 37 + b"\0"
SOURCE = "// includes sha256:0\nint main() {}\n"


def key_of(n: int = 0) -> str:
    return binary_key(f"{SOURCE}// {n}", "sm_80", ("-std=c++17",), "nvrtc 13.0")


def filled(root: Path, **kwargs: Any) -> Store:
    store = Store(root, **kwargs)
    store.put(key_of(), IMAGE, SOURCE, {"arch": "sm_80"})
    return store


def folder_of(store: Store, key: str) -> Path:
    return store.root / f"v{SCHEMA}" / "bin" / key[:2] / key


def test_round_trip(tmp_path: Path) -> None:
    filled(tmp_path / "cache")
    store = Store(tmp_path / "cache")
    entry = store.get(key_of())
    assert entry is not None
    assert (entry.image, entry.source, entry.meta["arch"]) == (IMAGE, SOURCE, "sm_80")
    assert store.get(key_of(1)) is None
    assert (store.stats.hits, store.stats.misses, store.stats.corrupt) == (1, 1, 0)
    assert (store.root.stat().st_mode & 0o777, store.usage()[0], list((store.root / "tmp").iterdir())) == (0o700, 1, [])
    assert {path.name for path in folder_of(store, key_of()).iterdir()} == {"kernel.cubin.z", "kernel.cu", "meta.json"}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder_of(store, key_of()).iterdir())


def test_every_part_changes_the_key() -> None:
    parts: list[tuple[Any, Any]] = [("s", "t"), ("sm_80", "sm_90a"), (("-a", "-b"), ("-a-b",)), ("nvrtc 13.0", "nvrtc 13.1")]
    assert len({binary_key(*chosen) for chosen in itertools.product(*parts)}) == 16


def test_other_payload_is_another_target(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(key_of(), IMAGE, SOURCE, {}, payload="kernel.so")
    found = Store(tmp_path).get(key_of(), payload="kernel.so")
    assert found is not None and found.image == IMAGE
    with pytest.warns(RuntimeWarning, match="another target"):
        assert Store(tmp_path).get(key_of()) is None


@pytest.mark.parametrize("key", ["../../etc/passwd", "ab", "A" * 64, key_of() + "/", "", "g" * 64])
def test_a_key_is_a_digest(tmp_path: Path, key: str) -> None:
    with pytest.raises(ArgumentError, match="sha256"):
        Store(tmp_path).get(key)
    with pytest.raises(ArgumentError, match="sha256"):
        Store(tmp_path).put(key, IMAGE, SOURCE, {})


def edit_meta(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        note = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({k: v for k, v in (note | changes).items() if v is not None}))

    return damage


def truncate(folder: Path) -> None:
    os.truncate(folder / "kernel.cubin.z", 100)


def empty(folder: Path) -> None:
    os.truncate(folder / "kernel.cubin.z", 0)


def flip(folder: Path) -> None:
    data = bytearray((folder / "kernel.cubin.z").read_bytes())
    data[len(data) // 2] ^= 8
    (folder / "kernel.cubin.z").write_bytes(data)


def lose_payload(folder: Path) -> None:
    (folder / "kernel.cubin.z").unlink()


def lose_meta(folder: Path) -> None:
    (folder / "meta.json").unlink()


def no_json(folder: Path) -> None:
    (folder / "meta.json").write_text("!!python/object/apply:os.system [true]")


def list_json(folder: Path) -> None:
    (folder / "meta.json").write_text("[1, 2]")


def link_payload(folder: Path) -> None:
    os.rename(folder / "kernel.cubin.z", folder.parent / "elsewhere")
    (folder / "kernel.cubin.z").symlink_to(folder.parent / "elsewhere")


def pipe_payload(folder: Path) -> None:
    (folder / "kernel.cubin.z").unlink()
    os.mkfifo(folder / "kernel.cubin.z")


def link_folder(folder: Path) -> None:
    os.rename(folder, folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


def nest(folder: Path) -> None:
    (folder / "meta.json").write_text("[" * 200_000)


def edit_source(folder: Path) -> None:
    (folder / "kernel.cu").write_text(SOURCE + " ")


def listing(folder: Path) -> dict[str, bytes | None]:
    """What lies in a folder, of plain files what is in them."""
    return {p.name: p.read_bytes() if p.is_file() else None for p in folder.iterdir()}


@pytest.mark.parametrize(
    "damage",
    [truncate, empty, flip, lose_payload, lose_meta, no_json, list_json, link_payload, pipe_payload, link_folder]
    + [edit_meta(schema=BINARY_SCHEMA + 1), edit_meta(key=key_of(1)), edit_meta(payload="../../x"), edit_meta(payload=3)]
    + [edit_meta(sha256=None), edit_meta(arch="sm_81"), edit_meta(bytes=1), edit_meta(extra=1), nest, edit_source],
)
def test_a_damaged_entry_is_a_miss_is_set_aside_and_made_anew(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    filled(tmp_path)
    store = Store(tmp_path)
    damage(folder_of(store, key_of()))
    before = listing(folder_of(store, key_of()))
    with pytest.warns(RuntimeWarning, match="is damaged") as warned:
        assert store.get(key_of()) is None
        assert store.get(key_of()) is None
    assert (len(warned), store.stats.corrupt, store.stats.misses) == (1, 1, 2)
    assert not os.path.lexists(folder_of(store, key_of()))
    (aside,) = (tmp_path / f"v{SCHEMA}" / "quarantine").iterdir()
    assert listing(aside) == before and str(aside) in str(warned[0].message)
    store.put(key_of(), IMAGE, SOURCE, {})
    again = store.get(key_of())
    assert again is not None and again.image == IMAGE


def test_verify_removes_only_what_is_damaged(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store.put(key_of(1), IMAGE, SOURCE, {}, payload="kernel.so")
    store.put(key_of(2), IMAGE, SOURCE, {})
    flip(folder_of(store, key_of(2)))
    with pytest.warns(RuntimeWarning, match="is damaged"):
        assert store.verify() == [key_of(2)]
    assert store.verify() == [] and store.usage()[0] == 2


def test_root_that_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(StoreError, match="symbolic link"):
        Store(tmp_path / "link")
    (tmp_path / "real").chmod(0o777)
    with pytest.raises(StoreError, match="written by others .mode 777.*chmod"):
        Store(tmp_path / "real")
    (tmp_path / "real").chmod(0o700)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be made"):
        Store(tmp_path / "file")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(StoreError, match="belongs to user"):
        Store(tmp_path / "real")


def test_root_is_the_first_usable_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "vidrial").mkdir()
    (tmp_path / "open" / "vidrial").chmod(0o777)
    monkeypatch.delenv("VIDRIAL_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "open"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Store().root == tmp_path / "home/.cache/vidrial"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Store().root == tmp_path / "xdg" / "vidrial"
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(tmp_path / "mine"))
    assert Store().root == tmp_path / "mine"
    assert Store.shared() is Store.shared() is Store.lasting() and Store.shared().root == tmp_path / "mine"


@pytest.mark.parametrize("kind", ["link", "open", "file", "another's"])
def test_a_folder_that_is_asked_for_is_used_or_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never another one that lasts: `cache clear` would empty that."""
    asked, home = tmp_path / "asked", tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    filled(home / ".cache/vidrial")
    if kind == "file":
        asked.write_text("")
    elif kind == "link":
        asked.symlink_to(tmp_path)
    else:
        asked.mkdir(mode=0o700)
        asked.chmod(0o777 if kind == "open" else 0o700)
    monkeypatch.setenv("VIDRIAL_CACHE_DIR", str(asked))
    if kind == "another's":
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(StoreError) if kind == "another's" else pytest.warns(RuntimeWarning, match=f"ends with this process: .*{asked}"):
        # Of another user not even a temporary folder is ours.
        store = Store.shared()
        assert store.root.parent not in (tmp_path, home / ".cache") and store.refused
    with pytest.raises(StoreError, match=str(asked) if kind != "another's" else "belongs to user"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Store.lasting()
    monkeypatch.undo()
    assert Store(home / ".cache/vidrial").get(key_of()) is not None


def test_no_usable_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for name in ("VIDRIAL_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="ends with this process"):
        store = Store()
    store.put(key_of(), IMAGE, SOURCE, {})
    found = store.get(key_of())
    assert found is not None and found.image == IMAGE
    root = store.root
    del store
    assert not root.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("step", ["write", "rename", "mkdir"])
def test_what_cannot_be_written_is_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, step: str) -> None:
    filled(tmp_path)
    store = Store(tmp_path)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    owner, name = {"write": (os, "fsync"), "rename": (os, "rename"), "mkdir": (Path, "mkdir")}[step]
    monkeypatch.setattr(owner, name, fail)
    with pytest.warns(RuntimeWarning, match="kept in memory") as warned:
        store.put(key_of(1), IMAGE, SOURCE, {"n": 1})
        store.put(key_of(2), IMAGE, SOURCE, {"n": 2})
        store.write_json("ranking", "a", {"x": [1, 2]})
    assert len(warned) == 1 and store.stats.unwritten == 3
    assert store.save_failure(SOURCE, "error") is None
    found = [store.get(key_of(n)) for n in range(3)]
    assert [entry and entry.image for entry in found] == [IMAGE] * 3
    assert store.read_json("ranking", "a") == {"x": [1, 2]} and store.keys("ranking") == ["a"]
    monkeypatch.undo()
    assert Store(tmp_path).get(key_of(1)) is None and Store(tmp_path).get(key_of()) is not None


def test_cleared_during_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cache clear` between a writer's staging and its renaming: the writer begins again."""
    store, other, rename = filled(tmp_path), Store(tmp_path), os.rename
    clears = iter([True, False])

    def clear_first(source: Path, target: Path) -> None:
        if next(clears, False):
            shutil.rmtree(tmp_path / "tmp")
            shutil.rmtree(tmp_path / f"v{SCHEMA}")
        rename(source, target)

    monkeypatch.setattr(os, "rename", clear_first)
    store.put(key_of(1), IMAGE, SOURCE, {})
    monkeypatch.undo()
    assert store.stats.unwritten == 0 and other.get(key_of(1)) is not None and other.get(key_of()) is None
    other.clear()
    assert store.get(key_of(1)) is None and store.stats.corrupt == 0
    store.put(key_of(1), IMAGE, SOURCE, {})
    assert other.get(key_of(1)) is not None


def test_lost_race_returns_own_bytes(tmp_path: Path) -> None:
    first, second = filled(tmp_path), Store(tmp_path)
    entry = second.put(key_of(), IMAGE, SOURCE, {"arch": "sm_80", "who": "second"})
    assert entry.image == IMAGE and entry.meta["who"] == "second"
    stored = first.get(key_of())
    assert stored is not None and "who" not in stored.meta
    assert list((tmp_path / "tmp").iterdir()) == []


WRITER = """
import sys
from pathlib import Path
from vidrial.build.store import Store
root, key, image = Path(sys.argv[1]), sys.argv[2], bytes(range(256)) * 400
store = Store(root)
for round in range(200):
    entry = store.get(key) or store.put(key, image, "source", {"round": round})
    assert entry.image == image
    store.write_json("ranking", "shared", {"writer": sys.argv[3], "values": list(range(500))})
    document = store.read_json("ranking", "shared")
    assert document is None or document["values"] == list(range(500)), document
    if round % 8 == int(sys.argv[3]):
        store.clear()
assert store.stats.corrupt == 0 and store.stats.unwritten == 0, store.stats
"""


def test_processes_share_a_key_while_one_clears(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", WRITER, str(tmp_path), key_of()]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    processes = [subprocess.Popen([*command, str(n)], env=environment) for n in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]


def test_threads_share_a_store(tmp_path: Path) -> None:
    store, wrong = Store(tmp_path), []

    def work(n: int) -> None:
        for i in range(20):
            key = key_of(i % 5)
            entry = store.get(key) or store.put(key, IMAGE + bytes([i % 5]), SOURCE, {"n": n})
            wrong.extend([] if entry.image == IMAGE + bytes([i % 5]) else [key])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and store.usage()[0] == 5 and store.stats.corrupt == 0


def test_least_recently_used_goes_first(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for n in range(5):
        store.put(key_of(n), os.urandom(10_000), SOURCE, {})
        os.utime(folder_of(store, key_of(n)), (1000.0 + n, 1000.0 + n))
    assert store.get(key_of(0)) is not None  # now the most recently used
    each = store.usage()[1] / 5
    assert store.prune(int(3.5 * each)) == 2
    assert [store.get(key_of(n)) is not None for n in range(5)] == [True, False, False, True, True]
    assert store.prune() == 0


def test_a_hit_renews_at_most_once_a_minute(tmp_path: Path) -> None:
    store = filled(tmp_path)
    for age, renewed in ((30.0, False), (90.0, True)):
        then = time.time() - age
        os.utime(folder_of(store, key_of()), (then, then))
        store.get(key_of())
        assert (folder_of(store, key_of()).stat().st_mtime > then + 1) == renewed


def test_size_cap_holds_while_writing(tmp_path: Path) -> None:
    store = Store(tmp_path, max_bytes=30_000)
    for n in range(130):
        store.put(key_of(n), os.urandom(1000), SOURCE, {})
    assert store.usage()[1] < 30_000 + 66 * 2500
    store.prune()
    assert 0 < store.usage()[1] <= 30_000


def test_leftovers_of_dead_processes_go(tmp_path: Path) -> None:
    store = filled(tmp_path)
    for name, age in (("old", 1e6), ("new", 1.0)):
        (tmp_path / "tmp" / name).mkdir()
        os.utime(tmp_path / "tmp" / name, (time.time() - age,) * 2)
    store.prune()
    assert [path.name for path in (tmp_path / "tmp").iterdir()] == ["new"]


def test_documents(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.read_json("ranking", "k") is None
    store.write_json("ranking", "k", {"a": [1, 2.5, None, "é"]})
    store.write_json("ranking", "k2", 3)
    assert Store(tmp_path).read_json("ranking", "k") == {"a": [1, 2.5, None, "é"]}
    assert Store(tmp_path).keys("ranking") == ["k", "k2"]
    store.write_json("ranking", "k", [4])
    assert Store(tmp_path).read_json("ranking", "k") == [4]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"schema": 99, "value": 1}', '{"schema": 1}', "\x00\xff", "[" * 200_000, '{"schema": 1, "sha256": "", "value": 1}'],
)
def test_a_damaged_document_is_none_and_set_aside(tmp_path: Path, text: str) -> None:
    store = Store(tmp_path)
    store.write_json("ranking", "k", 1)
    (tmp_path / f"v{SCHEMA}" / "ranking" / "k.json").write_text(text)
    with pytest.warns(RuntimeWarning, match="is damaged"):
        assert store.read_json("ranking", "k") is None
    (aside,) = (tmp_path / f"v{SCHEMA}" / "quarantine").iterdir()
    assert aside.read_text() == text
    store.prune(0)
    assert aside.exists()
    store.write_json("ranking", "k", 2)
    assert store.read_json("ranking", "k") == 2


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "-x", "a\n", "x" * 201])
def test_a_document_has_a_plain_name(tmp_path: Path, name: str) -> None:
    for kind, key in ((name, "k"), ("ranking", name)):
        with pytest.raises(ArgumentError, match="cannot name a document"):
            Store(tmp_path).write_json(kind, key, 1)


def test_only_json_is_stored(tmp_path: Path) -> None:
    for value in ({1, 2}, float("nan"), object()):
        with pytest.raises(ArgumentError, match="not JSON"):
            Store(tmp_path).write_json("ranking", "k", {"x": value})
        with pytest.raises(ArgumentError, match="not JSON"):
            Store(tmp_path).put(key_of(), IMAGE, SOURCE, {"x": value})


def test_failures_are_kept_and_bounded(tmp_path: Path) -> None:
    store = Store(tmp_path)
    logs = [store.save_failure(SOURCE, f"error {n}") for n in range(103)]
    assert logs[0] is not None and logs[0].read_text() == "error 0"
    assert (logs[0].parent / "kernel.cu").read_text() == SOURCE
    assert store.save_failure(SOURCE, "error 0") == logs[0]
    store.prune()
    assert len(list(logs[0].parent.parent.iterdir())) == 100


def test_nothing_is_said_when_all_is_well(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = filled(tmp_path)
        store.get(key_of())
        store.get(key_of(1))
        store.clear()
        store.clear()
        assert store.get(key_of()) is None and store.usage() == (0, 0)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """In the note, the source and the binary of an entry, and in a document: what is read is what was written, or nothing."""
    value = {"median_ms": 1.25, "config": {"tile": 64, "mma": "sync"}, "tied": False}
    store = filled(tmp_path / "whole")
    store.write_json("ranking", "k", value)
    files = [*folder_of(store, key_of()).iterdir(), store.root / f"v{SCHEMA}" / "ranking" / "k.json"]
    good = store.get(key_of())
    random, found, damaged = np.random.default_rng(0), 0, Store(store.root)
    for path in files:
        data = path.read_bytes()
        for bit in random.choice(8 * len(data), 60, replace=False):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            kept = listing(path.parent)
            path.write_bytes(flipped)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                entry, document = damaged.get(key_of()), damaged.read_json("ranking", "k")
            assert entry in (None, good) and document in (None, value)
            found += entry is None or document is None
            shutil.rmtree(path.parent, ignore_errors=True)
            path.parent.mkdir()
            for name, content in kept.items():
                (path.parent / name).write_bytes(content or b"")
    # A few flips leave the same JSON: one space becomes another.
    assert found >= 0.9 * 60 * len(files)
    assert damaged.get(key_of()) == good and damaged.read_json("ranking", "k") == value


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOMEM])
def test_an_error_that_passes_is_a_miss_and_leaves_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    store = filled(tmp_path)
    store.write_json("ranking", "hours", {"of": "work"})
    again = Store(tmp_path)

    def fail(path: Any, *args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "open", fail)
    with pytest.warns(RuntimeWarning, match="cannot be read just now") as warned:
        assert again.get(key_of()) is None and again.read_json("ranking", "hours") is None
        again.update_json("ranking", "hours", lambda old: {"old": old})
    assert len(warned) == 1 and again.stats.corrupt == 0
    # What this process made of it stands for this process.
    assert again.read_json("ranking", "hours") == {"old": None}
    monkeypatch.undo()
    found = Store(tmp_path)
    entry = found.get(key_of())
    assert entry is not None and entry.image == IMAGE and found.read_json("ranking", "hours") == {"of": "work"}
    # And writing goes on after an error that passes.
    if number != errno.EACCES:
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.warns(RuntimeWarning, match="kept in memory"):
            again.put(key_of(1), IMAGE, SOURCE, {})
        monkeypatch.undo()
        again.put(key_of(2), IMAGE, SOURCE, {})
        assert Store(tmp_path).get(key_of(2)) is not None


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_pruning_takes_nothing_for_old_that_cannot_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    store, lstat = filled(tmp_path), Path.lstat
    store.put(key_of(1), IMAGE, SOURCE, {})
    os.utime(folder_of(store, key_of(1)), (1000.0, 1000.0))
    (tmp_path / "tmp" / "staged").write_bytes(b"x")

    def fail(path: Path) -> os.stat_result:
        if path.name in (key_of(), "staged"):
            raise OSError(number, os.strerror(number))
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", fail)
    assert store.prune(store.usage()[1] - 1) == 1
    monkeypatch.undo()
    assert store.get(key_of()) is not None and store.get(key_of(1)) is None and (tmp_path / "tmp" / "staged").exists()


def test_entries_dated_in_the_future_age_like_others(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for n in range(3):
        store.put(key_of(n), os.urandom(10_000), SOURCE, {})
        os.utime(folder_of(store, key_of(n)), (2e10, 2e10) if n else (time.time() - 30,) * 2)
    assert store.get(key_of(2)) is not None  # used, so its time is now
    assert store.prune(int(2.5 * store.usage()[1] / 3)) == 1
    assert [store.get(key_of(n)) is not None for n in range(3)] == [True, False, True]
    (tmp_path / "tmp" / "left").mkdir()
    os.utime(tmp_path / "tmp" / "left", (2e10, 2e10))
    store.prune()
    assert not (tmp_path / "tmp" / "left").exists()


def test_what_replaced_a_damaged_one_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process repairs the entry and the document between our reading them and our setting them aside."""
    store, other, rename = filled(tmp_path), Store(tmp_path), os.rename
    document = tmp_path / f"v{SCHEMA}" / "ranking" / "k.json"
    store.write_json("ranking", "k", 1)
    document.write_text("{")
    flip(folder_of(store, key_of()))

    def repair_first(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        if source == document:
            other.write_json("ranking", "k", 2)
        else:
            shutil.rmtree(source)
            other.put(key_of(), IMAGE, SOURCE, {"who": "other"})
        rename(source, target)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(os, "rename", repair_first)
        assert store.read_json("ranking", "k") == 2
        monkeypatch.setattr(os, "rename", repair_first)
        entry = store.get(key_of())
    assert entry is not None and entry.meta["who"] == "other"
    assert store.read_json("ranking", "k") == 2 and store.get(key_of()) == entry and store.stats.corrupt == 0


def add(root: str, n: int) -> None:
    Store(root).update_json("ranking", "all", lambda old: sorted([*(old or []), n]))


def test_updates_lose_nothing_also_after_the_folder_was_removed(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    store = Store(root)
    shutil.rmtree(root)
    # One store, whose folder is gone, in many threads; then many processes.
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: store.update_json("ranking", "all", lambda old: sorted([*(old or []), n])), range(40)))
    assert store.read_json("ranking", "all") == list(range(40)) and root.stat().st_mode & 0o777 == 0o700
    with multiprocessing.get_context("spawn").Pool(4) as processes:
        processes.starmap(add, [(str(root), n) for n in range(40, 80)])
    assert store.read_json("ranking", "all") == list(range(80))


def test_a_lock_is_waited_for_so_long(tmp_path: Path) -> None:
    with locked(tmp_path / "lock"):
        begin = time.monotonic()
        with pytest.warns(RuntimeWarning, match="has been locked for 0.3 s"), locked(tmp_path / "lock", 0.3):
            assert 0.25 < time.monotonic() - begin < 5
        # A folder too, without leaving anything in it.
        with locked(tmp_path), pytest.warns(RuntimeWarning, match="has been locked"), locked(tmp_path, 0.1):
            assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    # A lock that was removed with its folder is not the one that others wait for.
    with locked(tmp_path / "a" / "lock"):
        shutil.rmtree(tmp_path / "a")
        begin = time.monotonic()
        with locked(tmp_path / "a" / "lock"):
            assert time.monotonic() - begin < 1
    with locked(Path("/proc/nothing/lock")):
        pass
