"""What the Hugging Face hub refuses, in words that a user can act on."""

from collections.abc import Iterator

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

LONGEST = 400  # characters of a library's message
# By name: which HTTP library is behind the hub's client depends on its version.
UNREACHABLE = {"ConnectError", "ConnectTimeout", "ConnectionError", "LocalEntryNotFoundError", "OfflineModeIsEnabled"}


def refusal(error: BaseException) -> str:
    """Why nothing came, and what would help; what the error says, on one line, where the hub is not the reason.

    Libraries that load models raise errors of their own around those of the hub, so the causes are looked through.
    """
    for cause in _causes(error):
        if isinstance(cause, GatedRepoError):
            return (
                "its repository is gated: accept its terms on its page of huggingface.co, then log in with hf auth "
                "login or set HF_TOKEN"
            )
        if isinstance(cause, RepositoryNotFoundError):
            return (
                "the hub has no such repository, or it is private: check the name; for a private one log in with hf "
                "auth login or set HF_TOKEN"
            )
        if isinstance(cause, RevisionNotFoundError):
            return "its repository has no such revision"
        if UNREACHABLE & {base.__name__ for base in type(cause).__mro__}:
            return (
                "it is not in the local cache and the hub cannot be reached: download it where there is a network (hf "
                "download), or give a folder"
            )
        if isinstance(cause, EntryNotFoundError):
            return "its repository has no such file"
    return _one_line(error)


def _one_line(error: BaseException) -> str:
    """What an error says, at most 400 characters; with its class where that is no sentence, as of KeyError."""
    text = " ".join(str(error).split()).rstrip(".")
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    if " " in text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
