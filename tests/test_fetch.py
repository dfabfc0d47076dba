"""Fetching base models: real GGUF files, wheels, pip runs, kills and a Hub on the loopback."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import venv
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hispec.bases import BASES, PROBE, Base, FetchError, Wheel
from hispec.fetch import base_path, fetch
from hispec.files import read_json

REPOSITORY = Path(__file__).parent.parent
SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]
MERGES = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ġ", "I"), ("ĠI", "n"), ("Ġ", "2")]
VOCAB = [*SPECIAL, *bytes_to_unicode().values(), *("".join(pair) for pair in MERGES)]
WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS = 32, 64, 2, 4, 2


def write_gguf(path: Path) -> None:
    """A llama of two layers; the MLPs are quantized, so that staying packed would show."""
    out = gguf.GGUFWriter(path, "llama")
    out.add_block_count(LAYERS)
    out.add_context_length(64)
    out.add_embedding_length(WIDTH)
    out.add_feed_forward_length(HIDDEN)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV_HEADS)
    out.add_rope_freq_base(10_000.0)
    out.add_rope_dimension_count(WIDTH // HEADS)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(len(VOCAB))
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(VOCAB)
    out.add_token_types([3] * len(SPECIAL) + [1] * (len(VOCAB) - len(SPECIAL)))
    out.add_token_merges([" ".join(pair) for pair in MERGES])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_unk_token_id(0)
    out.add_add_bos_token(False)
    out.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}")
    random = np.random.default_rng(0)

    def tensor(name: str, *shape: int, packed: bool = False) -> None:
        values = random.normal(0, 0.1, shape).astype(np.float32)
        if packed:
            kind = gguf.GGMLQuantizationType.Q8_0
            out.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            out.add_tensor(name, values)

    tensor("token_embd.weight", len(VOCAB), WIDTH)
    tensor("output_norm.weight", WIDTH)
    for layer in range(LAYERS):
        tensor(f"blk.{layer}.attn_norm.weight", WIDTH)
        tensor(f"blk.{layer}.ffn_norm.weight", WIDTH)
        tensor(f"blk.{layer}.attn_q.weight", WIDTH, WIDTH)
        tensor(f"blk.{layer}.attn_k.weight", WIDTH // HEADS * KV_HEADS, WIDTH)
        tensor(f"blk.{layer}.attn_v.weight", WIDTH // HEADS * KV_HEADS, WIDTH)
        tensor(f"blk.{layer}.attn_output.weight", WIDTH, WIDTH)
        tensor(f"blk.{layer}.ffn_gate.weight", HIDDEN, WIDTH, packed=True)
        tensor(f"blk.{layer}.ffn_up.weight", HIDDEN, WIDTH, packed=True)
        tensor(f"blk.{layer}.ffn_down.weight", WIDTH, HIDDEN, packed=True)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def probe_ids() -> tuple[int, ...]:
    """The ids of `PROBE` from a tokenizer that never went through a GGUF."""
    vocab = {token: number for number, token in enumerate(VOCAB)}
    tokenizer = Tokenizer(models.BPE(vocab, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tuple(tokenizer.encode(PROBE).ids)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Path]:
    """A registry entry and the folder of its two wheels, each with one half of the GGUF."""
    folder = tmp_path_factory.mktemp("wheels")
    whole = folder / "tiny.gguf"
    write_gguf(whole)
    content = whole.read_bytes()
    wheels = []
    for part, piece in enumerate((content[:5000], content[5000:]), start=1):
        package, member = f"tiny-hispec-base-part{part}", f"tiny_part{part}/tiny.gguf.part{part}"
        info = f"tiny_hispec_base_part{part}-1.0.dist-info"
        path = folder / f"tiny_hispec_base_part{part}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, piece)
            archive.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
            )
            archive.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{info}/RECORD", "")
        wheels.append(Wheel(package, "1.0", digest(path), member))
    base = Base(
        wheels=tuple(wheels),
        gguf_sha256=digest(whole),
        quantization="Q8_0",
        license="apache-2.0",
        origin="nobody/tiny",
        model_type="llama",
        layers=LAYERS,
        bos=("<|im_start|>", 1),
        eos=("<|im_end|>", 2),
        chat_template=True,
        rope={"all": 10_000.0},
        probe=probe_ids(),
        split_digits=True,
    )
    whole.rename(folder / "kept.gguf")
    return base, folder


@pytest.fixture
def tiny(
    shelf: tuple[Base, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Base, Path]:
    """The entry registered as "tiny"; pip finds packages in a folder of this test only."""
    base, wheels = shelf
    monkeypatch.setitem(BASES, "tiny", base)
    links = tmp_path / "links"
    shutil.copytree(wheels, links)
    for key in [k for k in os.environ if k.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return base, links


def hidden(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob(".*"))


def test_fetch_writes_a_plain_folder(tiny: tuple[Base, Path], tmp_path: Path) -> None:
    base, links = tiny
    root, lines = tmp_path / "base", []
    folder = fetch("tiny", root, say=lines.append)
    assert folder == root / "tiny" == base_path("tiny", root)
    assert hidden(root) == []
    assert [line for line in lines if "downloading" in line] == [
        "downloading tiny-hispec-base-part1 1.0",
        "downloading tiny-hispec-base-part2 1.0",
    ]

    record = read_json(folder / "provenance.json")
    assert record["downloaded"] == {w.file: w.sha256 for w in base.wheels}
    assert record["gguf_sha256"] == base.gguf_sha256
    assert record["weights"] == {"model.safetensors": digest(folder / "model.safetensors")}
    assert record["dtype"] == ["BF16"]
    assert record["versions"].keys() == {"transformers", "torch", "gguf"}
    for file in folder.glob("*.json"):  # nothing in it tells where it was made
        assert str(tmp_path) not in file.read_text()
        assert "is_local" not in file.read_text()
    assert "quantization_config" not in read_json(folder / "config.json")

    tensors = {t.name: t for t in gguf.GGUFReader(links / "kept.gguf").tensors}
    stored = load_file(folder / "model.safetensors")
    up = tensors["blk.1.ffn_up.weight"]
    expected = torch.from_numpy(gguf.quants.dequantize(up.data, up.tensor_type)).bfloat16()
    assert torch.equal(stored["model.layers.1.mlp.up_proj.weight"], expected)

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    ids = tokenizer("\n\n12  2")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["ĊĊ", "1", "2", "ĠĠ", "2"]
    assert model(torch.tensor([ids])).logits.shape == (1, len(ids), len(VOCAB))


def test_second_fetch_returns_at_once_and_damage_is_repaired(
    tiny: tuple[Base, Path], tmp_path: Path
) -> None:
    weights = fetch("tiny", tmp_path / "base") / "model.safetensors"
    before, good = weights.stat(), digest(weights)
    lines: list[str] = []
    fetch("tiny", tmp_path / "base", say=lines.append)
    assert lines == [f"tiny is already in {weights.parent}"]
    assert (weights.stat().st_mtime_ns, weights.stat().st_ino) == (
        before.st_mtime_ns,
        before.st_ino,
    )

    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    bad = digest(weights)
    fetch("tiny", tmp_path / "base", say=lines.append)
    assert any("damaged" in line and good in line and bad in line for line in lines)
    assert digest(weights) == good
    assert hidden(tmp_path / "base") == []


def test_a_folder_of_someone_else_is_left_alone(tiny: tuple[Base, Path], tmp_path: Path) -> None:
    mine = tmp_path / "base" / "tiny" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(FetchError, match=r"no provenance\.json"):
        fetch("tiny", tmp_path / "base")
    assert mine.read_text() == "mine"


def test_wheels_put_by_hand_are_used(
    tiny: tuple[Base, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, links = tiny
    monkeypatch.delenv("PIP_FIND_LINKS")
    downloads = tmp_path / "base" / ".downloads"
    with pytest.raises(FetchError) as caught:
        fetch("tiny", tmp_path / "base")
    assert str(downloads) in str(caught.value)
    assert base.wheels[0].file in str(caught.value)
    for wheel in base.wheels:
        shutil.copy(links / wheel.file, downloads)
    fetch("tiny", tmp_path / "base")


def test_wrong_wheel_is_tried_twice_and_refused(tiny: tuple[Base, Path], tmp_path: Path) -> None:
    base, links = tiny
    wheel = links / base.wheels[1].file
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("more", b"")
    lines: list[str] = []
    with pytest.raises(FetchError) as caught:
        fetch("tiny", tmp_path / "base", say=lines.append)
    assert digest(wheel) in str(caught.value)
    assert base.wheels[1].sha256 in str(caught.value)
    assert lines.count("downloading tiny-hispec-base-part2 1.0") == 2
    assert hidden(tmp_path / "base") == [".downloads"]
    assert not (tmp_path / "base" / "tiny").exists()
    # The good first part waits for the next try.
    assert [p.name for p in (tmp_path / "base" / ".downloads").iterdir()] == [base.wheels[0].file]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layers", 3, "number of layers is 2, expected 3"),
        ("eos", ("<unk>", 0), "eos id in GenerationConfig is 2, expected 0"),
        ("rope", {"all": 5.0}, "rope base is {'all': 10000.0}, expected {'all': 5.0}"),
        ("split_digits", False, "tokenization like the original's is False"),
        ("chat_template", False, "chat template is True, expected False"),
        ("gguf_sha256", "0" * 64, "expected " + "0" * 64),
    ],
)
def test_an_unexpected_model_is_refused(
    tiny: tuple[Base, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    field: str,
    value: object,
    message: str,
) -> None:
    entry = Base(**{**vars(tiny[0]), field: value})
    monkeypatch.setitem(BASES, "tiny", entry)
    with pytest.raises(FetchError) as caught:
        fetch("tiny", tmp_path / "base")
    assert message in str(caught.value)
    assert hidden(tmp_path / "base") == [".downloads"]
    assert not (tmp_path / "base" / "tiny").exists()


@pytest.mark.parametrize(
    "name", ["llama", "", "../x", "a/b/c", "/etc", "smollm2-135m@main", "a/b@", "a/b\n"]
)
def test_unknown_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        fetch(name, tmp_path)
    assert repr(name) in str(caught.value)
    assert "smollm2-135m" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_base_path(tmp_path: Path) -> None:
    assert base_path("gemma3-270m") == Path("checkpoints/base/gemma3-270m")
    assert base_path("org/Some.Model", tmp_path) == tmp_path / "org--Some.Model"
    assert base_path("org/m@refs/pr/1", tmp_path) == tmp_path / "org--m@refs--pr--1"
    assert base_path(str(tmp_path), Path("elsewhere")) == tmp_path
    with pytest.raises(ValueError, match="unknown base model"):
        base_path(str(tmp_path / "missing"))


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def test_no_network_says_so(
    tiny: tuple[Base, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed_port()}/simple")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    start = time.monotonic()
    with pytest.raises(FetchError, match="needs the network once"):
        fetch("tiny", tmp_path / "base")
    assert time.monotonic() - start < 30
    assert list((tmp_path / "base").rglob("*")) == [tmp_path / "base" / ".downloads"]


def test_python_without_pip_says_so(
    tiny: tuple[Base, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(FetchError, match="has no pip"):
        fetch("tiny", tmp_path / "base")


def run_fetch(name: str, root: Path, base: Base | None = None) -> list[str]:
    """The command of a process that registers `base`, if given, and fetches `name`."""
    register = "" if base is None else f"BASES[{name!r}] = {base!r}"
    script = f"""
from pathlib import Path
from hispec.bases import BASES, Base, FetchError, Wheel
from hispec.fetch import fetch
{register}
try:
    fetch({name!r}, Path({str(root)!r}))
except FetchError as error:
    raise SystemExit(f"FetchError: {{error}}")
"""
    return [sys.executable, "-c", script]


@pytest.mark.slow
def test_killed_fetch_is_announced_and_completed(tiny: tuple[Base, Path], tmp_path: Path) -> None:
    root = tmp_path / "base"
    process = subprocess.Popen(run_fetch("tiny", root, tiny[0]), cwd=REPOSITORY)
    deadline = time.monotonic() + 60
    while not list(root.glob(".tiny.tmp-*/model.gguf")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (root / "tiny").exists()

    lines: list[str] = []
    fetch("tiny", root, say=lines.append)
    assert lines[0].startswith("cleaned up .tiny.tmp-")
    assert "interrupted" in lines[0]
    assert not any("downloading" in line for line in lines)
    assert (root / "tiny" / "provenance.json").exists()
    assert hidden(root) == []


class Hub:
    """As much of the Hub as a download needs: one model, at one revision."""

    sha = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.declared = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        self.asked: list[str] = []
        self.open = threading.Event()  # while it is not set, weights do not arrive
        self.open.set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.split("?")[0]
                hub.asked.append(path)
                status, data, headers = hub.answer(path)
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    if path.endswith(".safetensors"):
                        hub.open.wait()
                    self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        api = "/api/models/org/tiny"
        if path in (api, f"{api}/revision/{self.sha}", f"{api}/revision/v1"):
            listing = [self.entry(name, "rfilename") for name in self.files]
            info = {"id": "org/tiny", "sha": self.sha, "siblings": listing}
            card = {"cardData": {"license": "mit"}}
            return 200, json.dumps({**info, **card}).encode(), {}
        if path == f"{api}/tree/{self.sha}":
            tree = [{"type": "file", **self.entry(name, "path")} for name in self.files]
            return 200, json.dumps(tree).encode(), {}
        name = path.removeprefix(f"/org/tiny/resolve/{self.sha}/")
        if name in self.files:
            headers = {"ETag": f'"{self.declared[name]}"', "X-Repo-Commit": self.sha}
            return 200, self.files[name], headers
        code = "RevisionNotFound" if path.startswith(api) else "RepoNotFound"
        return 404, b"", {"X-Error-Code": code}

    def entry(self, name: str, key: str) -> dict[str, object]:
        size = len(self.files[name])
        entry: dict[str, object] = {key: name, "size": size, "oid": "0" * 40}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": self.declared[name], "size": size, "pointerSize": 100}
            entry["lfs"]["sha256"] = self.declared[name]  # type: ignore[index]
        return entry

    def start(self, name: str, root: Path) -> subprocess.Popen[str]:
        """`fetch` in a process of its own: the Hub's address is read on import."""
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(root.parent / "hf"),
            "NO_PROXY": "127.0.0.1",
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(run_fetch(name, root), cwd=REPOSITORY, env=environment, **pipes)

    def fetch(self, name: str, root: Path) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a whole run."""
        process = self.start(name, root)
        out, errors = process.communicate(timeout=120)
        return process.returncode, out, errors


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    save_file({"a.weight": torch.ones(3, dtype=torch.float16)}, tmp_path / "model.safetensors")
    weights = (tmp_path / "model.safetensors").read_bytes()
    hub = Hub(
        {
            "config.json": b'{"model_type": "llama"}',
            "tokenizer.json": b"{}",
            "chat_template.jinja": b"x",
            "LICENSE": b"MIT",
            "README.md": b"not wanted",
            "pytorch_model.bin": b"not wanted",
            "original/model.safetensors": weights,
            "model.safetensors": weights,
        }
    )
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def test_hub_model_keeps_its_files_and_dtype(hub: Hub, tmp_path: Path) -> None:
    root = tmp_path / "base"
    code, _, errors = hub.fetch("org/tiny", root)
    assert code == 0, errors
    folder = root / "org--tiny"
    names = {"config.json", "tokenizer.json", "chat_template.jinja", "LICENSE", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == {*names, "provenance.json"}
    assert hidden(root) == []
    record = read_json(folder / "provenance.json")
    assert (record["hub_id"], record["revision"]) == ("org/tiny", hub.sha)
    assert (record["license"], record["dtype"]) == ("mit", ["F16"])
    assert record["downloaded"].keys() == names
    assert record["weights"] == {"model.safetensors": hub.declared["model.safetensors"]}

    asked = len(hub.asked)
    assert "already in" in hub.fetch("org/tiny", root)[1]
    assert len(hub.asked) == asked  # a whole folder needs no network

    assert hub.fetch("org/tiny@v1", root)[0] == 0
    assert read_json(root / "org--tiny@v1" / "provenance.json")["revision"] == hub.sha


def test_hub_download_goes_on_after_a_kill(hub: Hub, tmp_path: Path) -> None:
    root = tmp_path / "base"
    hub.open.clear()
    process = hub.start("org/tiny", root)
    deadline = time.monotonic() + 60
    while not list(root.glob(".downloads/org--tiny/*/config.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    hub.open.set()
    assert not (root / "org--tiny").exists()

    code, out, errors = hub.fetch("org/tiny", root)
    assert code == 0, errors
    assert "going on with the interrupted download of org/tiny" in out
    assert (root / "org--tiny" / "provenance.json").exists()
    assert hidden(root) == []


def test_hub_failures_are_one_clear_line(hub: Hub, tmp_path: Path) -> None:
    root = tmp_path / "base"
    for name in ("org/missing", "org/tiny@v9"):
        _, _, errors = hub.fetch(name, root)
        assert errors.startswith(f"FetchError: {name} could not be downloaded: the Hub has")
    hub.declared["model.safetensors"] = "0" * 64
    assert f"the Hub says {'0' * 64}" in hub.fetch("org/tiny", root)[2]
    del hub.files["model.safetensors"]
    assert "no transformers model" in hub.fetch("org/tiny", root)[2]
    hub.address = f"http://127.0.0.1:{closed_port()}"
    _, _, errors = hub.fetch("org/tiny", root)
    assert "needs the network once" in errors
    assert len(errors.strip().splitlines()) == 1
    assert not list(root.glob("org--*"))


@pytest.mark.slow
def test_smollm2_knows_paris(tmp_path: Path) -> None:
    folder = fetch("smollm2-135m", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer.startswith("The capital of France is Paris")
