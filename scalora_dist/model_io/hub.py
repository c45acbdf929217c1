"""Uploads a finished folder to a repository of a Hugging Face hub.

The token is huggingface_hub's own (HF_TOKEN, or ``hf auth login``). It is never written or printed.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from scalora_dist.errors import UserError

# {whether a repository holds an adapter, not a model: the file that says so}
CONFIG_FILES = {True: "adapter_config.json", False: "config.json"}
logger = logging.getLogger(__name__)


class HubError(Exception):
    """The hub cannot be reached, or refuses. The message is one line: the reason."""


def check_hub(repository: str, *, private: bool, adapter: bool) -> str:
    """Make a repository for models if it is not there, and check that it can be written to.

    Call it before long work. It warns if the repository is public and should be private.

    Args:
        repository: a name in the token's account, or account/name.
        private: whether a new repository is private.
        adapter: whether an adapter will be uploaded, not a model.

    Returns:
        account/name.

    Raises:
        UserError: there is no token, the hub cannot be reached, the name is no repository's, the
            token may not write there, or a model and an adapter would be in one repository.
    """
    try:
        with _errors_told():
            if get_token() is None:
                raise HubError("there is no token: set HF_TOKEN, or run `hf auth login`")
            api = HfApi()
            name = api.create_repo(repository, private=private, exist_ok=True).repo_id
            # A token that may only read passes, if the repository exists.
            api.auth_check(name, write=True)
            found = api.model_info(name)
            if CONFIG_FILES[not adapter] in {file.rfilename for file in found.siblings or ()}:
                raise HubError(
                    f"it holds {'a model' if adapter else 'an adapter'}, and of both transformers "
                    "would load the adapter and its base: name another with --hub_model_id"
                )
    except HubError as error:
        raise UserError(
            f"--push_to_hub cannot upload to the repository {repository}: {error}"
        ) from error
    if private and not found.private:
        logger.warning(
            "%s exists on the hub and is public: make it private in its settings, name another "
            "with --hub_model_id, or set --hub_private_repo false",
            name,
        )
    return name


def push(folder: Path, repository: str, message: str) -> str:
    """Upload all files of a finished folder. Other files of the repository stay.

    huggingface_hub retries. What an interrupted call has uploaded is not sent again.

    Args:
        repository: account/name; it exists.
        message: message of the commit.

    Returns:
        URL of the commit.

    Raises:
        HubError: not all files are uploaded.
    """
    with _errors_told():
        commit = HfApi().upload_folder(
            repo_id=repository, folder_path=folder, commit_message=message
        )
    return str(commit.commit_url)


def upload(
    folder: Path, repository: str, message: str, *, private: bool, again: str | None = None
) -> None:
    """Upload a finished folder, and tell where it is.

    Args:
        repository: account/name; it exists.
        message: message of the commit.
        private: whether the command that repeats the upload makes a private repository.
        again: what also repeats the upload, for the error's message.

    Raises:
        UserError: not all files are uploaded. It says how to repeat the upload.
    """
    logger.info("uploading %s to %s", folder, repository)
    try:
        url = push(folder, repository, message)
    except HubError as error:
        command = f"`{upload_command(folder, repository, private=private)}`"
        advice = f"{again}, and so does {command}" if again else f"upload it with {command}"
        raise UserError(
            f"{folder} is whole, but could not be uploaded to {repository} ({error}): {advice}"
        ) from error
    logger.info("uploaded: %s", url)


def upload_command(folder: Path, repository: str, *, private: bool) -> str:
    """The shell command that uploads the folder without us."""
    words = ["hf", "upload", repository, str(folder), ".", *["--private"] * private]
    return shlex.join(words)


@contextmanager
def _errors_told() -> Iterator[None]:
    """Turn any exception of huggingface_hub into a HubError.

    They have no common base: those of the network, of HTTP, of files, of hf_xet, of a name that is
    none, of an answer that cannot be read.

    Raises:
        HubError: inside ``with`` there was an exception.
    """
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        raise HubError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    """Why a call failed, in one line that has no token."""
    if isinstance(error, HfHubHTTPError):
        said = error.server_message or str(error)
        text = f"the hub answered {error.response.status_code}: {said}"
    elif isinstance(error, HFValidationError):
        text = f"{str(error).rstrip('.')}: name one with --hub_model_id"
    else:
        text = f"{type(error).__name__}: {error}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = re.sub(r"Bearer .*", "Bearer …", lines[0])  # a header with a damaged token
    line = re.sub(r"(https?://[^\s?]*)\?[^\s']*", r"\1", line)  # signed addresses of storage
    line = "".join(x if x.isprintable() else " " for x in line).rstrip(".:")
    if isinstance(error, RuntimeError) and error.__cause__:  # of a thread that sends a file
        line += f": {_reason(error.__cause__)}"
    return line
