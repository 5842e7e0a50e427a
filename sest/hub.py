"""Repositories on the Hugging Face hub: what is in one, fetched once, or pushed; heads there are `hf://owner/name`.

HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to huggingface_hub.
"""

from __future__ import annotations

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
            return None, [file.rfilename for file in found.siblings]
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

    def download(self, names: Sequence[str]) -> Path:
        """The folder of the cache with these files, downloaded where they are not there yet.

        Raises:
            InputError: no access or no connection.
        """
        hub = self._package()
        if not sys.stderr.isatty():
            hub.utils.disable_progress_bars()
        try:
            return Path(hub.snapshot_download(self.name, revision=self.revision, allow_patterns=list(names)))
        except hub.errors.GatedRepoError as error:  # its list of files is open to all
            raise self._gated() from error
        except Exception as error:
            raise InputError(
                f"{self.name} could not be downloaded ({_reason(error)}). The same command goes on where it stopped. "
                f"{self._by_hand()}"
            ) from error

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
    if folder is None:
        folder = repository.download([name for name in names if name.endswith((".safetensors", HEAD))])
        logger.info(f"{repository.name}: revision {folder.name[:12]}, in {folder}.")
    return folder


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')[:300]}"
