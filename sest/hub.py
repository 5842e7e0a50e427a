"""Repositories on the Hugging Face hub: what is in one, fetched once, or pushed; heads there are `hf://owner/name`.

HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to huggingface_hub.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from sest.errors import InputError, shown

logger = logging.getLogger(__name__)

NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")  # owner/name, or owner/name@revision
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # names of files in the hub's cache
HEAD = "state.json"  # of a repository that `sest push` wrote
_ADDRESS = re.compile(rf"hf:/{{1,2}}{NAME.pattern}")  # a Path has one slash left


@dataclass(frozen=True)
class Repository:
    """A repository by name.

    Args:
        name: owner/name.
        revision: a branch, tag or commit; None: the newest.
        then: what to do with a folder that somebody downloaded, such as "pass --encoder FOLDER".
    """

    name: str
    revision: str | None
    then: str

    def _package(self) -> ModuleType:
        try:
            import huggingface_hub
            import huggingface_hub.errors
            import huggingface_hub.utils
        except ImportError as error:
            raise InputError(
                f"No file or folder {self.name}. If it is a repository on the Hugging Face hub: pip install "
                f"'sest[hub]'. {self._by_hand()}"
            ) from error
        return huggingface_hub

    def _by_hand(self) -> str:
        return (
            f"By hand: `hf download {self.name} --local-dir FOLDER` on a machine that has access, copy FOLDER here, "
            f"and {self.then}."
        )

    def _gated(self) -> InputError:
        return InputError(
            f"{self.name} on the Hugging Face hub wants its licence accepted on its page first; then set HF_TOKEN, or "
            f"run `hf auth login`. {self._by_hand()}"
        )

    def files(self, marker: str) -> tuple[Path | None, Sequence[str]]:
        """The names of its files; with the folder of the cache, if only that can be reached.

        Args:
            marker: a file that a usable one has, by which it is found in the cache.

        Raises:
            InputError: no such repository or revision, no access, or no connection and nothing in the cache.
        """
        hub = self._package()
        try:
            found = hub.HfApi().model_info(self.name, revision=self.revision)
            names = [file.rfilename for file in found.siblings or ()]
        except hub.errors.GatedRepoError as error:
            raise self._gated() from error
        except hub.errors.RevisionNotFoundError as error:
            raise InputError(f"{self.name} on the Hugging Face hub has no revision {self.revision!r}.") from error
        except hub.errors.RepositoryNotFoundError as error:
            raise InputError(
                f"No file or folder {self.name} here, and no such repository on the Hugging Face hub that you have "
                "access to (a private one needs HF_TOKEN)."
            ) from error
        except Exception as error:  # what the library's HTTP client raises depends on their versions
            reason = _reason(error)
            cached = hub.try_to_load_from_cache(self.name, marker, revision=self.revision)
            if not isinstance(cached, str):
                raise InputError(
                    f"{self.name} cannot be fetched from the Hugging Face hub ({reason}). {self._by_hand()}"
                ) from error
            folder = Path(cached).parent
            logger.info(f"{self.name}: the hub cannot be reached ({reason}); used as downloaded before, from {folder}.")
            return folder, sorted(file.name for file in folder.iterdir())
        if odd := [name for name in names if not _is_file_name(name)]:
            raise InputError(f"{self.name}: the hub lists {odd[0]!r:.80}, which is no name of a file in a repository.")
        return None, names

    def check(self, folder: Path, names: Sequence[str]) -> None:
        """Compare files of the hub's cache with the hashes that the hub declares; the cache names them so.

        Raises:
            InputError: one is not what was declared; what to delete is said.
        """
        for name in names:
            file = (folder / name).resolve()
            if _HASH.fullmatch(file.name) and file.is_file() and file.name != _digest(file):
                raise InputError(
                    f"{name} of {self.name} is damaged in the cache of the hub: it has not the sha256 that the hub "
                    f"declares. Delete {file} and run the same command again, which downloads it."
                )

    def in_part(self, folder: Path) -> InputError | None:
        """The error of a download that did not finish, where there is no connection; None: it did."""
        if not any((folder.parents[1] / "blobs").glob("*.incomplete")):
            return None
        return InputError(
            f"{self.name} was downloaded only in part, and the hub cannot be reached. Run the same command where there "
            f"is a connection: it goes on where it stopped. {self._by_hand()}"
        )

    def download(self, names: Sequence[str]) -> Path:
        """The folder of the cache with these files, downloaded where they are not there yet.

        Raises:
            InputError: no access or no connection, or a file is not what the hub declares.
        """
        hub = self._package()
        if not sys.stderr.isatty():
            hub.utils.disable_progress_bars()
        try:
            folder = Path(hub.snapshot_download(self.name, revision=self.revision, allow_patterns=list(names)))
        except hub.errors.GatedRepoError as error:  # its list of files is open to all
            raise self._gated() from error
        except Exception as error:
            raise InputError(
                f"{self.name} could not be downloaded ({_reason(error)}). The same command goes on where it stopped. "
                f"{self._by_hand()}"
            ) from error
        self.check(folder, names)
        return folder

    def upload(self, folder: Path, message: str, *, private: bool) -> str:
        """Make the files of a folder the repository's, in one commit; returns its address.

        Args:
            message: of the commit.
            private: where the repository is made by this.

        Raises:
            InputError: no right to write there, or no connection.
        """
        hub = self._package()
        if not sys.stderr.isatty():
            hub.utils.disable_progress_bars()
        try:
            api = hub.HfApi()
            made = api.create_repo(self.name, private=private, exist_ok=True)
            api.upload_folder(repo_id=self.name, folder_path=folder, revision=self.revision, commit_message=message)
        except Exception as error:
            raise InputError(
                f"{self.name} could not be written on the Hugging Face hub ({_reason(error)}). It needs a token with "
                "write access: set HF_TOKEN, or run `hf auth login`."
            ) from error
        return str(made)


def repository_of(path: str | os.PathLike[str]) -> Repository | None:
    """The repository that a path names as hf://owner/name or hf://owner/name@revision; None: it names no such one."""
    found = _ADDRESS.fullmatch(os.fspath(path))
    return Repository(found[1], found[2], "pass FOLDER") if found else None


def fetched(path: Path) -> Path:
    """A path as it is, or of hf://owner/name the folder of its checkpoint, downloaded where it is not there yet.

    Raises:
        InputError: no such repository, none of a checkpoint, no access or no connection.
    """
    repository = repository_of(path)
    if repository is None:
        return path
    folder, names = repository.files(HEAD)
    if HEAD not in names:
        raise InputError(f"{repository.name} is no head that `sest push` wrote: it has {shown(names)}.")
    wanted = [name for name in names if name.endswith((".safetensors", HEAD))]
    if folder is None:
        folder = repository.download(wanted)
        logger.info(f"{repository.name}: revision {folder.name[:12]}, in {folder}.")
    elif (unfinished := repository.in_part(folder)) is not None:
        raise unfinished
    else:
        repository.check(folder, wanted)
    return folder


def _is_file_name(name: object) -> bool:
    """Whether it is the path of a file within a repository."""
    if not isinstance(name, str) or not name.isprintable() or "\\" in name or name.startswith(("/", "~")):
        return False
    return bool(name) and not {"", ".", ".."} & set(name.split("/"))


def _digest(file: Path) -> str:
    """The hash that names a file in the hub's cache: sha256 of large ones, Git's of others."""
    with file.open("rb") as opened:
        if len(file.name) == 64:
            return hashlib.file_digest(opened, "sha256").hexdigest()
        data = opened.read()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')[:300]}"
