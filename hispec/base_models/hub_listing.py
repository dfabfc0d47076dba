"""The files of a repository on the Hub, as the Hub lists them, checked before any is downloaded."""

from __future__ import annotations

from typing import Annotated

from huggingface_hub import HfApi
from pydantic import Field, StringConstraints

from hispec.base_models.model_folder import FileName, Sha256
from hispec.utils.schema import Schema, validate


class ListingError(ValueError):
    """The Hub lists something that cannot be downloaded safely."""


class HubFile(Schema):
    """One file of a repository."""

    name: FileName
    size: Annotated[int, Field(ge=0)]
    """In bytes."""
    sha256: Sha256 | None
    """Of large files; the Hub has none of small ones."""


class HubListing(Schema):
    """A repository at one commit."""

    commit: Annotated[str, StringConstraints(pattern="^[0-9a-f]{40}$")]
    license: str | list[str] | None
    files: list[HubFile]

    def hashes(self) -> dict[str, str | None]:
        """SHA-256 by file name; None for small files."""
        return {file.name: file.sha256 for file in self.files}

    def sizes(self) -> dict[str, int]:
        """Bytes by file name."""
        return {file.name: file.size for file in self.files}


def hub_listing(repo: str, revision: str | None) -> HubListing:
    """Ask the Hub for the files of a repository.

    Raises:
        ListingError: it lists files that lead out of their folder, or values of other types.
        Exception: what huggingface_hub raises if the Hub refuses or cannot be reached.
    """
    info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    files = [
        {"name": f.rfilename, "size": f.size or 0, "sha256": f.lfs.sha256 if f.lfs else None}
        for f in info.siblings or ()
    ]
    found = {
        "commit": info.sha,
        "license": getattr(info.card_data, "license", None),
        "files": files,
    }
    try:
        return validate(HubListing, found, f"the Hub's listing of {repo}")
    except ValueError as error:
        raise ListingError(str(error)) from None
