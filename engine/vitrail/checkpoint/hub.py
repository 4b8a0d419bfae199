"""Downloads a checkpoint from the Hugging Face hub: the small files and a set of weights.

``huggingface_hub`` is imported only inside the functions, so a local folder needs neither it nor
the network.
"""

import errno
import glob
import re
from functools import partial
from pathlib import Path

from vitrail.checkpoint import contents
from vitrail.errors import CheckpointError, InputError, VitrailError, show

_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w./-]{0,254}", re.ASCII)
_STORAGE_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


def download(repo: str, revision: str | None, local_files_only: bool) -> Path:
    """The snapshot folder of a hub repository; the folder's name is the commit.

    Raises CheckpointError if the hub or its cache cannot give the files, InputError for a
    malformed ``revision``.
    """
    if revision is not None and not _REVISION.fullmatch(revision):
        raise InputError(f"revision: got {show(revision)}, wanted a branch, a tag or a commit")
    try:
        return _download(repo, revision, local_files_only)
    except VitrailError:
        raise
    except Exception as error:  # the hub client lets the errors of several HTTP libraries through
        raise CheckpointError(f"{repo}: {_hub_reason(error, revision)}") from error


def _download(repo: str, revision: str | None, local_files_only: bool) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download

    # For a commit, some versions of the client ask the hub even in offline mode.
    local_files_only = local_files_only or constants.HF_HUB_OFFLINE
    folder = _download_small_files(repo, revision, local_files_only)
    names = contents.file_names(folder)
    if local_files_only or contents.SINGLE in names:
        return folder
    if contents.INDEX in names:
        weights = sorted(set(contents.read_weight_map(folder).values()))
    else:
        listed = HfApi().list_repo_files(repo, revision=folder.name)
        weights = [contents.choose_weights((name for name in listed if "/" not in name), repo)]
    patterns = [glob.escape(name) for name in weights]
    snapshot_download(repo, revision=folder.name, allow_patterns=patterns)
    return folder


def _download_small_files(repo: str, revision: str | None, local_files_only: bool) -> Path:
    from huggingface_hub import errors, snapshot_download

    fetch = partial(snapshot_download, repo, revision=revision)
    # A repository may hold the same weights in several formats. Only the preferred file, a single
    # safetensors file, comes with the small files; `download` fetches other weights by name.
    patterns = [*contents.SMALL_FILES, contents.SINGLE, contents.INDEX]
    try:
        folder = fetch(allow_patterns=patterns, local_files_only=local_files_only)
    except errors.LocalEntryNotFoundError as error:
        # The client knows that files are missing from the cache. Tokenizer and preprocessor files
        # may be missing: the call that needs them says so. The other files may not.
        if not hasattr(error, "snapshot_path"):
            raise
        patterns = [contents.CONFIG, contents.SINGLE, contents.INDEX]
        folder = fetch(allow_patterns=patterns, local_files_only=True)
    return Path(folder)


def _hub_reason(error: Exception, revision: str | None) -> str:
    """The reason of a hub error and the next step, on a single line."""
    if isinstance(error, ImportError):
        return "a hub id needs huggingface_hub: pip install huggingface_hub, or give a local folder"
    from huggingface_hub import errors

    log_in = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"the repository is gated: accept its terms on its hub page, then {log_in}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such local folder and no such hub repository; if it is private, {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"got revision {show(revision)}, wanted a branch, tag or commit of the repository"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return (
            "no such local folder, not complete in the hub's cache, and the hub is out of reach "
            "(offline, or local_files_only); download it once while online, or give a local folder"
        )
    detail = show(" ".join(str(error).split()))
    if isinstance(error, OSError) and error.errno in _STORAGE_FAULTS:
        return f"the download cannot be stored: {detail}; make room, or set HF_HOME to another disk"
    return (
        f"the hub could not be read: {type(error).__name__}: {detail}; try again, or give a folder"
    )
