"""EE checkpoints on the Hugging Face Hub: pushed in one commit, pulled whole or not at all.

A commit is what the Hub shows or does not show, so weights, config and card arrive in one; what an
upload that broke off has already stored there is found by its hash and not sent again. The token
is huggingface_hub's own business (`HF_TOKEN`, or what `hf auth login` stored).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    errors,
    get_token,
    snapshot_download,
)
from huggingface_hub.utils import validate_repo_id

from hispec.base_models.local import MODEL_FILES, base_path, fetch_names
from hispec.base_models.registry import BASES
from hispec.checkpoint.io import CARD, CONFIG, is_checkpoint, own_base, read_config
from hispec.checkpoint.model_card import FIGURE
from hispec.hub.contents import (
    BESIDE,
    PULLED,
    belongs,
    card,
    included,
    local_files,
    local_paths,
    matches,
    verify,
)
from hispec.hub.errors import HubError, UnreachableError, clearly
from hispec.planner.plan_file import PICTURE, PLAN
from hispec.utils.console import few
from hispec.utils.files import clear_leftovers, new_folder, read_json, sha256, write_json

ROOT = Path("checkpoints")
# What of an older push does not outlive a newer one: beside other exits it would be wrong.
_REPLACED = (
    *("*.safetensors", "*.safetensors.index.json", "config.json"),
    *(FIGURE, "agreement.json", PLAN, PICTURE, "custom_generate/*.py"),
)
# What the Hub itself puts into a new repository; anything else belongs to somebody.
_OF_A_NEW_REPOSITORY = {".gitattributes", CARD}


def push(
    folder: Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> str | None:
    """Put a checkpoint on the Hub as `repo`, in one commit; returns the commit's address.

    A new repository is private unless `private` is False. One that exists keeps its visibility,
    and is refused if it holds anything but an EE checkpoint, or if `private` says otherwise. The
    card is written for the Hub if it is ours (`card.WRITTEN`), else it goes there as it is.

    Args:
        revision: a branch, made if there is none of that name; default `main`.
        dry_run: say what would be sent and print the card, contact nobody.

    Raises:
        ValueError: `folder` is no whole checkpoint or could be used by nobody else, or `repo` is
            no name of the form ORG/NAME.
        HubError: no network, no or a wrong token, a repository that is not to be written to.
    """
    _check_repo(repo)
    config = verify(folder)
    base = config["base"]
    if not base["included"] and not fetch_names(base):
        raise ValueError(
            f"{folder}: nobody else could find its base, the local folder {base['id']!r}; include "
            f"it: hispec export {folder} DIR --full, then push DIR"
        )
    files, left_out = local_files(folder, config)
    text = card(folder, repo, config, files)
    sizes = {name: file.stat().st_size for name, file in files.items()} | {CARD: len(text)}
    for name in sorted(sizes):
        say(f"{sizes[name]:>14,}  {name}")
    say(f"{sum(sizes.values()):>14,}  bytes in {len(sizes)} files")
    if left_out:
        say(f"not part of a checkpoint, not sent: {', '.join(left_out)}")
    if paths := local_paths(config):
        say(f"note: {CONFIG} tells these paths of this machine: {', '.join(paths)}")
    if dry_run:
        say(f"\n{CARD}:\n\n{text.decode()}")
        say(f"dry run: nothing was sent to {repo}")
        return None
    adds = [CommitOperationAdd(name, str(file)) for name, file in files.items() if name != CARD]
    with clearly(f"{repo} could not be pushed"):
        parent, stale = _prepare(HfApi(), repo, private, revision, sizes.keys(), say)
        commit = HfApi().create_commit(
            repo,
            [CommitOperationAdd(CARD, text), *adds, *map(CommitOperationDelete, stale)],
            commit_message=f"EE checkpoint, exits {config['exits']['depths']}",
            revision=revision,
            parent_commit=parent,
        )
    say(f"pushed: {commit.commit_url}")
    return str(commit.commit_url)


def pull(
    name: str,
    folder: Path | None = None,
    *,
    revision: str | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Bring an EE checkpoint from the Hub, whole or not at all; returns its folder.

    A pull that broke off goes on where it was. What was pulled before is replaced by what the Hub
    has now; any other checkpoint and any other folder is left alone.

    Args:
        name: `ORG/NAME` or `ORG/NAME@REVISION`.
        folder: default `checkpoints/ORG--NAME`, where `hispec.load("ORG/NAME")` finds it.

    Raises:
        ValueError: a repository that is no EE checkpoint or of another format version, files that
            are not what its config says, or a folder that may not be replaced.
        HubError: no network, no such repository or revision, or no right to read it.
    """
    repo, revision = _parse(name, revision)
    folder = folder or pulled_path(f"{repo}@{revision}" if revision else repo)
    clear_leftovers(folder)
    _check_target(folder, repo)
    with clearly(f"{repo} could not be pulled"):
        commit, listed = _listing(HfApi(), repo, revision)
        _check_listing(repo, commit, listed)
        if is_checkpoint(folder) and _is_whole(folder, commit):
            say(f"{repo} at {commit} is already in {folder}")
            return folder
        # By commit, so that an interrupted download goes on without mixing two of them.
        arrived = folder.parent / ".downloads" / folder.name / commit
        say(f"{'going on with' if arrived.exists() else 'downloading'} {repo} at {commit}")
        config = _download(repo, commit, listed, arrived)
    wanted = _wanted(listed, config)
    _check_arrived(repo, commit, {file: listed[file] for file in wanted}, arrived)
    with new_folder(folder) as new:
        for file in wanted:
            (new / file).parent.mkdir(exist_ok=True)
            (arrived / file).rename(new / file)
        write_json(new / PULLED, {"repo": repo, "revision": commit})
    shutil.rmtree(arrived.parent)  # what is there of other commits, too
    _tidy(arrived)
    say(f"{repo} is in {folder}")
    if not included(config):
        _say_base(folder, config, say)
    return folder


def locate(name: str) -> Path | None:
    """The folder of the EE checkpoint that `name` stands for on the Hub, downloaded if need be.

    What was pulled comes first. A name that is no Hub id, or a base that `hispec fetch` has
    fetched, is none of our business: None.

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
    if name in BASES or (base_path(name) / "config.json").is_file():
        return None
    absent = (
        f"{name!r} is no local folder and not in {pulled_path(name)} or {base_path(name)}, and "
        "on the Hub"
    )
    try:
        with clearly(absent):
            commit, listed = _listing(HfApi(), repo, revision)
            _check_listing(repo, commit, listed)
            found = snapshot_download(repo, revision=revision, allow_patterns=[CONFIG])
            wanted = _wanted(listed, read_config(Path(found)))
            return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except UnreachableError:
        # What huggingface_hub keeps in its cache may be whole all the same.
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
    _check_repo(repo)
    return repo, given or revision


def _check_repo(repo: str) -> None:
    """HFValidationError, a ValueError, is what validate_repo_id raises."""
    if "/" not in repo:
        raise ValueError(f"{repo!r} is not possible: name the repository as ORG/NAME")
    validate_repo_id(repo)


def _prepare(
    api: HfApi,
    repo: str,
    private: bool | None,
    revision: str | None,
    names: Collection[str],
    say: Callable[[str], None],
) -> tuple[str | None, list[str]]:
    """(commit to build on, files of an older push that are to go); makes repository and branch."""
    if get_token() is None:
        raise HubError(
            f"{repo} could not be pushed: there is no token; set HF_TOKEN or run `hf auth login`, "
            f"with a token of {api.endpoint}/settings/tokens that may write"
        )
    try:
        info = api.model_info(repo)
    except errors.RepositoryNotFoundError:
        hidden = private is not False
        api.create_repo(repo, private=hidden)
        say(f"made the {'private' if hidden else 'public'} repository {repo}")
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        return None, []
    visible = "private" if info.private else "public"
    if private is not None and private != info.private:
        raise ValueError(
            f"{repo} exists and is {visible}: pushing changes nothing about that; its settings "
            f"page does, {api.endpoint}/{repo}/settings"
        )
    present = _ours(repo, info)
    say(f"{repo} exists and is {visible}")
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
        info = api.model_info(repo, revision=revision)
        present = _ours(f"{repo}@{revision}", info)
    stale = sorted(name for name in present - {*names} if matches(name, _REPLACED))
    if stale:
        say(f"of an older push, goes with this one: {', '.join(stale)}")
    return info.sha, stale


def _ours(repo: str, info: ModelInfo) -> set[str]:
    """The files there. Raises ValueError if they are neither an EE checkpoint nor none."""
    present = {file.rfilename for file in info.siblings or ()}
    if CONFIG not in present and (foreign := sorted(present - _OF_A_NEW_REPOSITORY)):
        raise ValueError(
            f"{repo} exists and holds no EE checkpoint but {few(foreign)}: it is left as it is; "
            "name another repository"
        )
    return present


def _listing(api: HfApi, repo: str, revision: str | None) -> tuple[str, dict[str, str | None]]:
    """(commit, SHA-256 of its large files by name; None for small ones)."""
    info = api.model_info(repo, revision=revision, files_metadata=True)
    files = info.siblings or ()
    return str(info.sha), {f.rfilename: f.lfs.sha256 if f.lfs else None for f in files}


def _check_listing(repo: str, commit: str, listed: dict[str, str | None]) -> None:
    if CONFIG in listed:
        return
    what = f"it holds {few(sorted(listed))}" if listed else "it is empty"
    if "config.json" in listed:
        what = f"it is a plain model, which is got as a base: hispec fetch {repo}"
    raise ValueError(f"{repo} at {commit} is no EE checkpoint: it has no {CONFIG}; {what}")


def _download(
    repo: str, commit: str, listed: dict[str, str | None], arrived: Path
) -> dict[str, Any]:
    """Bring a commit's files; its config first, so that what cannot be read is not downloaded."""
    snapshot_download(repo, revision=commit, local_dir=arrived, allow_patterns=[CONFIG])
    with _refusing(repo, commit, arrived):
        config = read_config(arrived)
    wanted = _wanted(listed, config)
    snapshot_download(repo, revision=commit, local_dir=arrived, allow_patterns=wanted)
    if missing := [name for name in wanted if not (arrived / name).is_file()]:
        # Cut off from the Hub, some versions of huggingface_hub are content with what is there.
        raise UnreachableError(f"{repo} could not be pulled whole: {few(missing)}; pull again")
    return config


def _check_arrived(repo: str, commit: str, wanted: dict[str, str | None], arrived: Path) -> None:
    """What differs from the Hub's hash is downloaded anew the next time; what differs from the
    checkpoint's own hashes would only come again."""
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
    """A checkpoint that cannot be used does not stay, and is named by where it came from."""
    try:
        yield
    except ValueError as error:
        shutil.rmtree(arrived)
        _tidy(arrived)
        message = str(error).replace(str(arrived), f"{repo} at {commit}")
        raise ValueError(f"{repo} was not pulled: {message}") from error


def _wanted(listed: dict[str, str | None], config: dict[str, Any]) -> list[str]:
    return [name for name in listed if belongs(name, config)]


def _check_target(folder: Path, repo: str) -> None:
    """Only what was pulled from the same repository, or nothing, may be replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    record = folder / PULLED
    origin = read_json(record).get("repo") if record.is_file() else None
    if origin != repo:
        what = f"was pulled from {origin}" if origin else f"was not pulled from {repo}"
        raise ValueError(f"{folder} exists and {what}: it is left as it is; name another folder")


def _is_whole(folder: Path, commit: str) -> bool:
    try:
        verify(folder)
    except ValueError:
        return False
    return read_json(folder / PULLED).get("revision") == commit


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
