"""An export to the hub, with its own client: files that are there already are not sent again."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from saeopt import __version__
from saeopt.activations.pretrained import one_line
from saeopt.console import log
from saeopt.errors import HostError, UserError
from saeopt.exports.making import fill_in

_TRIES, _LONGEST_WAIT_S = 4, 30


def check_repo(repo: str) -> None:
    """Raise :class:`UserError` for what is no `OWNER/NAME`; asks nobody."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push {repo}: {one_line(error)}") from None
    if "/" not in repo:
        raise UserError(f"--push {repo}: must be OWNER/NAME")


def push(folder: Path, repo: str) -> str:
    """Make the repository where it is missing, and upload the folder into it; gives the repository's address.

    What a broken connection has left is gone on with: large files that have arrived are not sent again, here or when
    it is called anew, and a folder that is there already makes no commit.

    Raises:
        UserError: the hub refuses it.
        HostError: the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    check_repo(repo)
    fill_in(folder, repo)
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(library_name="saeopt", library_version=__version__)
    try:
        for attempt in Retrying(
            retry=retry_if_exception(_passes), stop=stop_after_attempt(_TRIES), before_sleep=_tell, reraise=True,
            wait=wait_exponential(max=_LONGEST_WAIT_S),
        ):  # fmt: skip
            with attempt:
                address = str(api.create_repo(repo, exist_ok=True))
                message = f"Upload with saeopt {__version__}"
                api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except Exception as error:
        raise _told(folder, repo, error) from error
    return address


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status with which the hub answered, where it did."""
    found = (getattr(getattr(cause, "response", None), "status_code", None) for cause in _causes(error))
    return next((status for status in found if status is not None), None)


def _unreachable(error: BaseException) -> bool:
    """Whether there was no whole answer (the client's network errors are those of its HTTP library)."""
    return any(
        type(cause).__module__.startswith("httpx") or isinstance(cause, ConnectionError | TimeoutError)
        for cause in _causes(error)
    )


def _passes(error: BaseException) -> bool:
    """Whether it may be gone when it is tried again."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return False
    status = _status(error)
    return _unreachable(error) if status is None else status in (408, 429) or status >= 500


def _tell(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    wait = state.next_action.sleep if state.next_action else 0
    status = _status(error) if error else None
    what = f"answers {status}" if status else one_line(error) if error else "gives no answer"
    log.warning("the hub: %s; trying again in %.0f s", what, wait)


def _told(folder: Path, repo: str, error: Exception) -> UserError:
    """One line: what is wrong, and what goes on from here."""
    status, again = _status(error), f"all is in {folder}: 'saeopt export {folder} --push {repo}' goes on"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return UserError(f"--push {repo}: HF_HUB_OFFLINE is set; {again}")
    if status == 401:
        return UserError(f"--push {repo}: the hub knows no such token (401): 'hf auth login' or HF_TOKEN; {again}")
    if status in (403, 404):
        return UserError(f"--push {repo}: the token may not write there ({status}); {again}")
    if status is None and _unreachable(error):
        return HostError(f"--push {repo}: the hub cannot be reached: {one_line(error)}; {again}")
    return UserError(f"--push {repo}: {f'the hub answers {status}: ' if status else ''}{one_line(error)}; {again}")
