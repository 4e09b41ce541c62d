"""Checkpoints of a training run: asynchronous, atomic, verified, and continued by that run only.

Orbax writes each into a temporary folder, which gets its name when all is in it, so that a killed
process leaves no half a checkpoint under that name. What Orbax does not notice is a byte that has
changed since: a file of SHA-256 digests is written along and checked before anything is read.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

PyTree = Any

DIGESTS = "digests.json"
NOTHING, ALL_DAMAGED = -1, -2  # what process 0 tells the others in place of a step


class Checkpoints:
    """The newest `keep` checkpoints of one run; all processes call the same methods.

    The directory is for this run alone (what killed processes left unfinished there is removed), on
    a file system that all processes see and that renames atomically. `run` is what a run must agree
    in to continue a checkpoint (model, optimizer, data), as JSON.
    """

    def __init__(self, directory: Path, run: dict[str, Any], keep: int = 3):
        self.directory = directory.absolute()
        self.run = entries(run)
        self._current: int | None = None  # the step that was saved or restored last
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_digests),
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, state: PyTree) -> None:
        """Saves in the background; a step that was just saved or restored is not saved again.

        The state may be donated or changed as soon as this returns. A RuntimeError means that this
        save or the one before it failed; earlier checkpoints are kept.
        """
        self.wait()
        if step == self._current:
            return
        newest = self._manager.latest_step()
        if newest is not None and newest >= step:
            raise ValueError(
                f"{self.directory} has a checkpoint of step {newest}, so that none of step {step} "
                "can be added: continue from it or choose another folder"
            )
        about = {"run": self.run, "arrays": arrays(state)}
        items = {"state": ocp.args.StandardSave(state), "about": ocp.args.JsonSave(about)}
        self._current = step
        with self._explained_errors():  # `force`: whether to save has been decided
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, like: PyTree) -> tuple[int, PyTree] | None:
        """Step and state of the newest intact checkpoint, or None; sets damaged newer ones aside.

        `like` is the state as arrays or `jax.ShapeDtypeStruct`, with the shardings to restore to,
        whatever devices and processes the checkpoint was written by. It is an error if all
        checkpoints are damaged, or the newest is of another `run` or holds other arrays.
        """
        self.wait()
        step = self._newest_intact()
        if step is None:
            return None
        about, here = self._read(step, about=ocp.args.JsonRestore()), arrays(like)
        # Of arrays a few say enough: in another model all may differ.
        unlike = differences(about["run"], self.run) or differences(about["arrays"], here)[:4]
        if unlike:
            raise ValueError(
                f"{self.directory / str(step)} is a checkpoint of another model, optimizer or "
                f"data set: {'; '.join(unlike)}. Continue it with the options that it was "
                "written with, or choose another folder."
            )
        state = self._read(step, state=ocp.args.StandardRestore(like))
        self._current = step
        return step, state

    def _read(self, step: int, **item: Any) -> Any:
        """One of the two items of a checkpoint."""
        (name,) = item
        return self._manager.restore(step, args=ocp.args.Composite(**item))[name]

    def wait(self) -> None:
        """Waits until nothing is being saved; raises RuntimeError if the last save failed."""
        with self._explained_errors():
            self._manager.wait_until_finished()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._manager.close()  # ends Orbax's threads

    @contextmanager
    def _explained_errors(self) -> Iterator[None]:
        """Turns what goes wrong in a save into an error that says what is left."""
        try:
            yield
        except Exception as error:
            step, self._current = self._current, None
            if jax.process_index() == 0:
                for folder in self._unfinished(step):  # on a full disk the space is needed
                    shutil.rmtree(folder, ignore_errors=True)
            self._manager.reload()  # Orbax has struck off the one that was to make room
            left = ", ".join(map(str, sorted(self._manager.all_steps()))) or "none"
            raise RuntimeError(
                f"The checkpoint of step {step} could not be written to {self.directory}: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}. "
                f"Steps of the checkpoints that are kept there: {left}"
            ) from None  # Orbax has logged the pages of its traceback

    def _unfinished(self, step: int | None) -> list[Path]:
        """The folder that Orbax writes a step to before it renames it (a list of at most one)."""
        return list(self.directory.glob(f"{step}{ocp.utils.TMP_DIR_SUFFIX}*"))

    def _write_digests(self) -> None:
        """Orbax calls this on process 0 when all is written but the folder not yet renamed."""
        (folder,) = self._unfinished(self._current)
        # Not the files beside these folders: Orbax still changes them, and reads none of them.
        files = sorted(path for path in folder.glob("*/**/*") if path.is_file())
        digests = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
        (folder / DIGESTS).write_text(json.dumps(digests, indent=1))

    def _newest_intact(self) -> int | None:
        """The step to restore, on which all processes agree; None if there are no checkpoints."""
        damaged: dict[int, str] = {}
        chosen = self._choose(damaged) if jax.process_index() == 0 else NOTHING
        chosen = int(multihost_utils.broadcast_one_to_all(np.int32(chosen)))
        self._manager.reload()
        if chosen == ALL_DAMAGED:
            reasons = "".join(f"\n  step {step}: {reason}" for step, reason in damaged.items())
            raise RuntimeError(
                f"All checkpoints in {self.directory} are damaged:{reasons}\nTo begin again, "
                "delete this folder or choose another one."
            )
        return None if chosen == NOTHING else chosen

    def _choose(self, damaged: dict[int, str]) -> int:
        """The newest intact step; sets newer ones aside and adds them to `damaged` with reasons."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            reason = damage(self.directory / str(step))
            if reason is None:
                for bad in damaged:  # renamed, so that its step can be saved again
                    aside = self.directory / f"{bad}.corrupt"
                    shutil.rmtree(aside, ignore_errors=True)
                    (self.directory / str(bad)).rename(aside)
                    warnings.warn(
                        f"The checkpoint of step {bad} in {self.directory} is damaged "
                        f"({damaged[bad]}); that of step {step} is used instead. The damaged one, "
                        f"now called {aside.name}, may be deleted.",
                        stacklevel=4,
                    )
                return step
            damaged[step] = reason
        # None is set aside, lest the next start finds an empty folder and begins at zero.
        return ALL_DAMAGED if damaged else NOTHING


def arrays(tree: PyTree) -> dict[str, str]:
    """Type and shape of each array."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


def entries(tree: dict[str, Any]) -> dict[str, str]:
    """The leaves of nested dictionaries as JSON, under names such as `model.width`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: not isinstance(x, dict))
    names = (jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves)
    return {name: json.dumps(x) for name, (_, x) in zip(names, leaves, strict=True)}


def differences(there: dict[str, str], here: dict[str, str]) -> list[str]:
    """The entries that differ, and how."""
    differ = [name for name in sorted(there | here) if there.get(name) != here.get(name)]
    values = [(n, there.get(n, "absent"), here.get(n, "absent")) for n in differ]
    return [f"{name} is {old} there and {new} here" for name, old, new in values]


def damage(folder: Path) -> str | None:
    """Why a checkpoint is not what was written, or None if it is."""
    try:
        digests = json.loads((folder / DIGESTS).read_bytes())
        changed = [name for name, digest in digests.items() if sha256(folder / name) != digest]
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except ValueError:
        return f"{DIGESTS} itself is unreadable"
    return f"{', '.join(changed)} changed since it was written" if changed else None


def sha256(path: Path) -> str:
    """The SHA-256 digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
