"""Pulls EE checkpoints from the Hugging Face Hub, each whole or not at all, or finds them there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from hispec.base_models.hub_listing import hub_listing
from hispec.base_models.local import base_path, find_base, is_path
from hispec.base_models.model_folder import MODEL_FILES
from hispec.base_models.registry import BASES
from hispec.checkpoint.format import CONFIG, PULLED, is_checkpoint, read_config
from hispec.checkpoint.io import own_base
from hispec.hub.contents import BESIDE, belongs, check_repo, included, read_pulled, verify
from hispec.hub.errors import UnreachableError, clearly
from hispec.utils.console import few
from hispec.utils.files import (
    DiskFullError,
    clear_leftovers,
    new_folder,
    output_path,
    sha256,
    write_json,
)

ROOT = Path("checkpoints")


def pull(
    name: str,
    folder: Path | None = None,
    *,
    revision: str | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Bring an EE checkpoint from the Hub, whole or not at all; returns its folder.

    A pull that broke off continues. An earlier pull from the same repository is replaced; any other
    checkpoint and any other folder is left as it is.

    Args:
        name: `ORG/NAME` or `ORG/NAME@REVISION`.
        folder: default `checkpoints/ORG--NAME`, where `hispec.load("ORG/NAME")` finds it.

    Raises:
        ValueError: a repository that is no EE checkpoint or of another format version, files that
            differ from its config, or a folder that may not be replaced.
        DiskFullError: the checkpoint does not fit on the disk.
        HubError: no network, no such repository or revision, or no right to read it.
    """
    repo, revision = _parse(name, revision)
    folder = folder or pulled_path(f"{repo}@{revision}" if revision else repo)
    clear_leftovers(folder)
    _check_target(folder, repo)
    with clearly(f"{repo} could not be pulled"):
        listing = hub_listing(repo, revision)
        commit, listed = listing.commit, listing.hashes()
        _check_listing(repo, commit, listed)
        if is_checkpoint(folder) and _is_whole(folder, commit):
            say(f"{repo} at {commit} is already in {folder}")
            return folder
        # By commit, so that an interrupted download goes on without mixing two of them.
        arrived = folder.parent / ".downloads" / folder.name / commit
        say(f"{'going on with' if arrived.exists() else 'downloading'} {repo} at {commit}")
        config = _download(repo, commit, listing.sizes(), arrived, folder)
    wanted = _wanted(listed, config)
    _check_arrived(repo, commit, {file: listed[file] for file in wanted}, arrived)
    with new_folder(folder) as new:
        for file in wanted:
            (new / file).parent.mkdir(exist_ok=True)
            shutil.move(arrived / file, new / file)
        write_json(new / PULLED, {"repo": repo, "revision": commit})
    shutil.rmtree(arrived.parent)  # downloads of other commits, too
    _tidy(arrived)
    say(f"{repo} is in {folder}")
    if not included(config):
        _say_base(folder, config, say)
    return folder


def locate(name: str) -> Path | None:
    """The folder of the EE checkpoint `name` of the Hub, downloaded if it is not here.

    A checkpoint that `hispec pull` brought comes first.

    Returns:
        None for a name that is no Hub id, or is that of a base that `hispec fetch` has fetched.

    Raises:
        ValueError: not here, and on the Hub no EE checkpoint of that name.
        HubError: not here, and the Hub refuses it or cannot be reached.
    """
    try:
        repo, revision = _parse(name, None)
    except ValueError:
        return None
    if is_checkpoint(pulled_path(name)):
        return pulled_path(name)
    if is_path(name):
        find_base(name)  # raises unless it was fetched
    if name in BASES or (base_path(name) / "config.json").is_file():
        return None
    absent = (
        f"{name!r} is no local folder and not in {pulled_path(name)} or {base_path(name)}, and "
        "on the Hub"
    )
    try:
        with clearly(absent):
            listing = hub_listing(repo, revision)
            listed = listing.hashes()
            _check_listing(repo, listing.commit, listed)
            found = snapshot_download(repo, revision=revision, allow_patterns=[CONFIG])
            wanted = _wanted(listed, read_config(Path(found)))
            return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except UnreachableError:
        # The checkpoint may be whole in huggingface_hub's cache all the same.
        try:
            found = snapshot_download(
                repo,
                revision=revision,
                allow_patterns=[CONFIG, *MODEL_FILES, *BESIDE],
                local_files_only=True,
            )
        except OSError:
            found = ""
        if found and is_checkpoint(Path(found)):
            return Path(found)
        raise


def pulled_path(name: str) -> Path:
    """Where `pull` puts the checkpoint of that name, if no folder is given."""
    return ROOT / name.replace("/", "--")


def _parse(name: str, revision: str | None) -> tuple[str, str | None]:
    repo, at, given = name.partition("@")
    if at and (revision is not None or not given):
        raise ValueError(f"{name!r} and revision={revision!r}: name one revision")
    check_repo(repo)
    return repo, given or revision


def _check_listing(repo: str, commit: str, listed: dict[str, str | None]) -> None:
    if CONFIG in listed:
        return
    what = f"it holds {few(sorted(listed))}" if listed else "it is empty"
    if "config.json" in listed:
        what = f"it is a plain model, which is got as a base: hispec fetch {repo}"
    raise ValueError(f"{repo} at {commit} is no EE checkpoint: it has no {CONFIG}; {what}")


def _download(
    repo: str, commit: str, sizes: dict[str, int], arrived: Path, folder: Path
) -> dict[str, Any]:
    """Bring a commit's files; its config first, so that what cannot be read is not downloaded.

    Raises:
        DiskFullError: the files that are still to come do not fit on the disk.
    """
    snapshot_download(repo, revision=commit, local_dir=arrived, allow_patterns=[CONFIG])
    with _refusing(repo, commit, arrived):
        config = read_config(arrived)
    wanted = _wanted(sizes, config)
    need = sum(sizes[name] for name in wanted if not (arrived / name).exists())
    if need > (free := shutil.disk_usage(arrived).free):
        raise DiskFullError(folder, f"{need:,} bytes are needed and {free:,} are free")
    snapshot_download(repo, revision=commit, local_dir=arrived, allow_patterns=wanted)
    if missing := [name for name in wanted if not (arrived / name).is_file()]:
        # Cut off from the Hub, some versions of huggingface_hub are content with what is there.
        raise UnreachableError(f"{repo} could not be pulled whole: {few(missing)}; pull again")
    return config


def _check_arrived(repo: str, commit: str, wanted: dict[str, str | None], arrived: Path) -> None:
    """Verify a download by the Hub's hashes and by the checkpoint's own.

    A file that differs from the Hub's hash is removed, so that the next pull brings it again. One
    that differs from the checkpoint's hash would come again as it is.
    """
    for name, expected in wanted.items():
        if expected and (found := sha256(arrived / name)) != expected:
            (arrived / name).unlink()
            raise ValueError(
                f"{name} of {repo} arrived damaged, SHA-256 {found}, the Hub says {expected}: "
                "removed, pull again"
            )
    with _refusing(repo, commit, arrived):
        verify(arrived)


@contextmanager
def _refusing(repo: str, commit: str, arrived: Path) -> Iterator[None]:
    """Remove a download that is no usable checkpoint; the error names the repository instead of
    the folder."""
    try:
        yield
    except ValueError as error:
        shutil.rmtree(arrived)
        _tidy(arrived)
        message = str(error).replace(str(arrived), f"{repo} at {commit}")
        raise ValueError(f"{repo} was not pulled: {message}") from error


def _wanted(listed: Iterable[str], config: dict[str, Any]) -> list[str]:
    return [name for name in listed if belongs(name, config)]


def _check_target(folder: Path, repo: str) -> None:
    """Raise ValueError unless `folder` may be replaced: an empty one, or an earlier pull from the
    same repository."""
    output_path(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    record = read_pulled(folder)
    if record is None or record.repo != repo:
        what = f"was pulled from {record.repo}" if record else f"was not pulled from {repo}"
        raise ValueError(f"{folder} exists and {what}: it is left as it is; name another folder")


def _is_whole(folder: Path, commit: str) -> bool:
    try:
        verify(folder)
    except ValueError:
        return False
    record = read_pulled(folder)
    return record is not None and record.revision == commit


def _tidy(arrived: Path) -> None:
    """Remove the folders that held a download, as far as nothing is left in them."""
    for folder in (arrived.parent, arrived.parent.parent):
        with suppress(OSError):
            folder.rmdir()


def _say_base(folder: Path, config: dict[str, Any], say: Callable[[str], None]) -> None:
    try:
        say(f"its base is in {own_base(folder, config).folder}")
    except ValueError as error:
        say(f"note: {error}")
