"""Pushes EE checkpoints to the Hugging Face Hub, each in one commit.

The Hub shows a commit whole or not at all, so weights, config and card arrive in one. Files of an
upload that broke off are found there by their hashes and are not sent again. The token is found by
huggingface_hub (`HF_TOKEN`, or what `hf auth login` stored).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    errors,
    get_token,
)

from hispec.base_models.local import fetch_names
from hispec.base_models.model_folder import matches
from hispec.checkpoint.format import CARD, CONFIG, exit_depths
from hispec.checkpoint.model_card import FIGURE
from hispec.hub.contents import card, check_repo, local_files, local_paths, verify
from hispec.hub.errors import HubError, clearly
from hispec.planner.plan_file import PICTURE, PLAN
from hispec.utils.console import few

# Files of an older push that a newer one removes: beside other exits they would be wrong.
_REPLACED = (
    *("*.safetensors", "*.safetensors.index.json", "config.json"),
    *(FIGURE, "agreement.json", PLAN, PICTURE, "custom_generate/*.py"),
)
# Files that the Hub itself puts into a new repository.
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
    card is written for the Hub if hispec wrote it (`model_card.WRITTEN`), else it goes there as it
    is.

    Args:
        revision: a branch, made if there is none of that name; default `main`.
        dry_run: list the files and print the card, without asking the Hub.

    Raises:
        ValueError: `folder` is no whole checkpoint or could be used by nobody else, or `repo` is
            no name of the form ORG/NAME.
        HubError: no network, no or a wrong token, a repository that is not to be written to.
    """
    check_repo(repo)
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
            commit_message=f"EE checkpoint, exits {exit_depths(config)}",
            revision=revision,
            parent_commit=parent,
        )
    say(f"pushed: {commit.commit_url}")
    return str(commit.commit_url)


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
