"""What is known of each model: models.yaml as typed rows, and what follows from a shape by arithmetic."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationInfo, field_validator

from ..errors import unknown
from .read import Fact, Https, Source, fault, read_rows

FILE = Path(__file__).with_name("models.yaml")

Text = Annotated[str, Field(min_length=1)]
Repository = Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]

Shipped = Literal[
    "chatglm", "chatglm2", "chatglm3", "glm4", "chatml", "qwen3", "internlm2", "internlm3", "baichuan", "baichuan2",
    "llama2-chinese", "alpaca", "alpaca2", "rwkv", "none",
]  # fmt: skip
ChatFormat = Literal[Shipped, "own"]
"""Names of helpers.native.chat_templates; `own` is a template that the published tokenizer brings along, and of which
there is none here."""

TOLERANCE = 0.001
"""A stated count may differ by 0.1 % from the computed one: old checkpoints also store rotary tables."""


class TransformerShape(Fact):
    """Sizes of a decoder of attention and feed-forward layers; all sizes in numbers (values), none in bytes.

    Attributes:
        ffn_size: inner width of the feed-forward layer; of a gated one, the width of each half.
        mlp: `gated` has three matrices (gate, up, down), `plain` has two.
        norm: `rms` has a weight, `layer` a weight and a bias.
        qk_norm: queries and keys are normalised per head (Qwen3).
        norm_head: each row of the output head is scaled to length 1 before use (Baichuan 2).
        rotary_fraction: part of every head that positions rotate.
    """

    kind: Literal["transformer"]
    hidden_size: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    ffn_size: PositiveInt
    vocab_size: PositiveInt
    mlp: Literal["gated", "plain"] = "gated"
    norm: Literal["rms", "layer"] = "rms"
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    norm_head: bool = False
    positions: Literal["rope", "rope-2d", "alibi"] = "rope"
    rope_theta: Annotated[PositiveFloat | None, Field(validate_default=True)] = None
    rotary_fraction: Annotated[float, Field(gt=0, le=1)] | None = None

    @field_validator("kv_heads")
    @classmethod
    def _groups_are_equal(cls, kv_heads: int, info: ValidationInfo) -> int:
        heads = info.data.get("heads")
        if heads and heads % kv_heads:
            raise ValueError(f"{heads} heads cannot be shared evenly by {kv_heads} key-value heads")
        return kv_heads

    @field_validator("rope_theta")
    @classmethod
    def _rotary_positions_have_a_base(cls, theta: float | None, info: ValidationInfo) -> float | None:
        if (positions := info.data.get("positions")) and (theta is None) != (positions == "alibi"):
            raise ValueError(f"{'missing' if theta is None else 'given'}, with positions {positions}")
        return theta

    def matrices(self) -> int:
        """Count the weights in the matrices of the layers: what bitsandbytes and GPTQ quantise."""
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden_size * (width + 2 * kv_width) + width * self.hidden_size
        return self.layers * (attention + self._mlp_matrices())

    def count_parameters(self) -> dict[str, int]:
        """Count the parameters by part: embeddings, attention, mlp, norms, head (0 when tied to the embeddings)."""
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden_size * (width + 2 * kv_width) + width * self.hidden_size
        attention += self.qkv_bias * (width + 2 * kv_width) + self.output_bias * self.hidden_size
        inner_biases = 2 if self.mlp == "gated" else 1
        mlp = self._mlp_matrices() + self.mlp_bias * (inner_biases * self.ffn_size + self.hidden_size)
        norm = self.hidden_size * (2 if self.norm == "layer" else 1)
        table = self.vocab_size * self.hidden_size
        return {
            "embeddings": table,
            "attention": self.layers * attention,
            "mlp": self.layers * mlp,
            "norms": self.layers * (2 * norm + self.qk_norm * 2 * self.head_dim) + norm,
            "head": 0 if self.tied else table,
        }

    def kv_values_per_token(self) -> int:
        """Count the numbers the cache keeps for one token: a key and a value per key-value head and layer."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def state_values(self) -> int:
        """Count the numbers kept whatever the length: none."""
        return 0

    def _mlp_matrices(self) -> int:
        return (3 if self.mlp == "gated" else 2) * self.hidden_size * self.ffn_size


class RwkvShape(Fact):
    """Sizes of an RWKV model, an RNN: time mixing takes the place of attention, channel mixing of the feed-forward.

    Attributes:
        head_size: width of a head, whose state is a square matrix from version 5 on; None for version 4.
        ranks: inner widths of the low-rank pairs: `mix` and `decay` (version 6); `decay`, `rate`, `value` and `gate`
            (version 7).
    """

    kind: Literal["rwkv"]
    version: Literal[4, 5, 6, 7]
    hidden_size: PositiveInt
    layers: PositiveInt
    head_size: PositiveInt | None = None
    ffn_size: PositiveInt
    vocab_size: PositiveInt
    ranks: dict[Literal["mix", "decay", "rate", "value", "gate"], PositiveInt] = Field({}, validate_default=True)

    @field_validator("ranks")
    @classmethod
    def _ranks_of_the_version(cls, ranks: dict[str, int], info: ValidationInfo) -> dict[str, int]:
        wanted = {6: {"mix", "decay"}, 7: {"decay", "rate", "value", "gate"}}.get(info.data.get("version", 0), set())
        if set(ranks) != wanted:
            raise ValueError(f"version {info.data.get('version')} has the ranks {sorted(wanted)}, not {sorted(ranks)}")
        return ranks

    def matrices(self) -> int:
        """Count the weights in the large matrices of the layers: what bitsandbytes quantises."""
        square = {4: 5, 5: 6, 6: 6, 7: 4}[self.version]  # channel mixing has one up to version 6
        return self.layers * (square * self.hidden_size**2 + 2 * self.hidden_size * self.ffn_size)

    def count_parameters(self) -> dict[str, int]:
        """Count the parameters by part, named as in a transformer: `attention` is time mixing, `mlp` channel mixing.

        Source: tensor tables of https://github.com/BlinkDL/RWKV-LM; RWKV-7: arXiv 2503.14456.
        """
        width, square = self.hidden_size, self.hidden_size**2
        matrices = {4: 4, 5: 5, 6: 5, 7: 4}[self.version]  # receptance, key, value, output; 5 and 6 add a gate
        vectors = {4: 5, 5: 6, 6: 8, 7: 12}[self.version]  # decay, bonus and one blend of two tokens per input
        attention = self.layers * (matrices * square + vectors * width)
        channel = 2 * width * self.ffn_size
        if self.version == 7:
            low_rank = sum(self.ranks.values())
            attention += self.layers * 2 * width * low_rank
            attention -= 2 * width * self.ranks["value"] + width  # the first layer has no value to blend in
            mlp = channel + width
        else:
            low_rank = 5 * self.ranks.get("mix", 0) + self.ranks.get("decay", 0)
            attention += self.layers * 2 * width * low_rank
            mlp = channel + square + 2 * width
        norms = 2 if self.version == 4 else 3  # from version 5 on also one over the heads
        table = self.vocab_size * width
        return {
            "embeddings": table,
            "attention": attention,
            "mlp": self.layers * mlp,
            "norms": (self.layers * norms + 2) * 2 * width,  # and one before the first layer, one after the last
            "head": table,
        }

    def kv_values_per_token(self) -> int:
        """Count the numbers the state grows by with a token: none, whatever the length."""
        return 0

    def state_values(self) -> int:
        """Count the numbers of one sequence's state, the same for 10 tokens and for 10 million."""
        if self.head_size is None:
            return 5 * self.layers * self.hidden_size
        return self.layers * (self.hidden_size * self.head_size + 2 * self.hidden_size)


class Repositories(Fact):
    """Where the weights are published; None where they are not."""

    huggingface: Repository
    modelscope: Repository | None = None


class Licence(Fact):
    """Under what terms the weights (not the code) may be used."""

    name: Text
    url: Https
    commercial: Text


class Adapter(Fact):
    """One published LoRA; its commit is None where it could not be read.

    Attributes:
        sha256: checksum of its adapter_model.bin, as its publisher states it.
    """

    repository: Repository
    revision: Commit | None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None


class Adapters(Fact):
    """A model published as LoRA: the base it was trained on, and the adapters in the order they are merged."""

    base: Text
    steps: Annotated[tuple[Adapter, ...], Field(min_length=1)]


class Published(Fact):
    """One figure as its publisher states it; their GB may be 10**9 or 2**30 bytes, of whatever they measured.

    Attributes:
        source: one of the row's own sources.
    """

    metric: Literal["memory", "speed", "file_size", "perplexity", "accuracy", "throughput"]
    precision: Text
    value: PositiveFloat
    unit: Literal["GB", "tokens/s", "characters/s", "requests/s", "percent", "perplexity"]
    setting: Text
    source: Https


class Claim(Fact):
    """A claim of the survey or the publisher, in words, to be measured or at least sourced."""

    text: Text
    source: Https


class Model(Fact):
    """One model.

    Attributes:
        file: the weight file to take, of a repository that holds several models.
        architecture: class named in the published config.json.
        native_class: class that runs it with no remote code, of transformers or of helpers.native.own; None when there
            is none.
        conversion: the file of helpers.native that converts it; `own class` needs a small class of ours beside;
            `none` is published in (or only renamed to) the native form.
        parameters: number of parameters of the running model, tied tensors counted once.
        stored_parameters: number in the files where that is another one.
        weight_bytes: bytes of the tensors in the published 16-bit files (of an adapter: after merging).
        largest_file: bytes of the largest weight file, which has to fit into RAM; None where it was not read.
        context: tokens the model was made for, prompt and answer together.
        training_tokens: tokens it was pre-trained on, its base's not counted.
        stand_in: id of the model whose tiny stand-in serves this one too, mostly its own; None where there is none.
        original_config: the published config.json, without the keys that only its remote code reads.
        native_config: the same of a model in native form, as `AutoConfig.for_model` takes it.
        revision: commit of the Hugging Face repository to load; None with the reason in ``revision_note``.
        status: `current` or followed by ``successor``, the id of a living model of the same publisher or kind.
    """

    id: Text
    name: Text
    family: Literal["glm", "llama", "rwkv"]
    repositories: Repositories
    adapters: Adapters | None = None
    revision: Commit | None
    revision_note: Text
    file: Text | None = None
    architecture: Text
    native_class: Text | None
    conversion: Literal["chatglm", "chatglm1", "baichuan", "qwen", "internlm2", "internlm3", "llama", "rwkv", "none"]
    chat_format: ChatFormat
    shape: Annotated[TransformerShape | RwkvShape, Field(discriminator="kind")]
    parameters: PositiveInt
    stored_parameters: PositiveInt | None = None
    dtype: Literal["fp16", "bf16"]
    weight_bytes: PositiveInt
    largest_file: PositiveInt | None = None
    context: PositiveInt
    languages: Annotated[tuple[Literal["zh", "en", "multilingual"], ...], Field(min_length=1)]
    training_tokens: PositiveInt | None = None
    licence: Licence
    stand_in: Text | None = None
    status: Literal["current", "superseded"]
    successor: Annotated[Text | None, Field(validate_default=True)] = None
    original_config: Annotated[dict[str, Any] | None, Field(validate_default=True)] = None
    native_config: Annotated[dict[str, Any] | None, Field(validate_default=True)] = None
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    published: tuple[Published, ...] = ()
    claims: tuple[Claim, ...] = ()
    note: str = ""

    @field_validator("parameters")
    @classmethod
    def _parameters_follow_from_shape(cls, parameters: int, info: ValidationInfo) -> int:
        if shape := info.data.get("shape"):
            _close(parameters, sum(shape.count_parameters().values()), "the shape gives")
        return parameters

    @field_validator("weight_bytes")
    @classmethod
    def _two_bytes_a_parameter(cls, weight_bytes: int, info: ValidationInfo) -> int:
        if parameters := info.data.get("stored_parameters") or info.data.get("parameters"):
            _close(weight_bytes, 2 * parameters, "two bytes a stored parameter give")
        return weight_bytes

    @field_validator("largest_file")
    @classmethod
    def _part_of_the_whole(cls, largest: int | None, info: ValidationInfo) -> int | None:
        whole = info.data.get("weight_bytes")
        if largest and whole and largest > whole * (1 + TOLERANCE):
            raise ValueError(f"{largest:,} bytes in one file, {whole:,} in all files")
        return largest

    @field_validator("published", "claims")
    @classmethod
    def _sourced(cls, rows: tuple[Published | Claim, ...], info: ValidationInfo) -> tuple[Published | Claim, ...]:
        known = {source.url for source in info.data.get("sources", [])}
        for row in rows:
            if known and row.source not in known:
                raise ValueError(f"{row.source} is not among the sources of this row")
        return rows

    @field_validator("original_config", "native_config")
    @classmethod
    def _config_for_the_conversion(cls, config: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        if conversion := info.data.get("conversion"):
            wanted = {"own class": None, "none": "native_config"}.get(conversion, "original_config")
            if (config is not None) != (info.field_name == wanted):
                raise ValueError(f"{'missing' if config is None else 'given'}, with conversion {conversion!r}")
        if config is not None and "model_type" not in config:
            raise ValueError("model_type is missing")
        return config

    @field_validator("successor")
    @classmethod
    def _superseded_by_something(cls, successor: str | None, info: ValidationInfo) -> str | None:
        if (status := info.data.get("status")) and (successor is None) != (status == "current"):
            raise ValueError(f"{'missing' if successor is None else 'given'}, with status {status!r}")
        return successor

    def count_parameters(self) -> dict[str, int]:
        """Count the parameters of the running model by part: embeddings, attention, mlp, norms, head."""
        return self.shape.count_parameters()

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Return the bytes that one more token of one sequence adds to the cache (RWKV: none)."""
        return self.shape.kv_values_per_token() * bytes_per_value

    def state_bytes(self, bytes_per_value: int = 4) -> NonNegativeInt:
        """Return the bytes of one sequence's recurrent state (transformers: none); RWKV keeps it in fp32."""
        return self.shape.state_values() * bytes_per_value


def read_models(path: Path = FILE) -> dict[str, Model]:
    """Read models.yaml, or another file of its form.

    Raises:
        HelpersError: the file does not hold, naming file, row and field.
    """
    rows = read_rows(path, Model)
    for row in rows.values():
        if row.successor is not None and row.successor not in rows:
            raise fault(path, f"{row.id}.successor", f"there is no row {row.successor!r}")
        if row.stand_in is not None and (row.stand_in not in rows or rows[row.stand_in].stand_in != row.stand_in):
            raise fault(path, f"{row.id}.stand_in", f"there is no stand-in of {row.stand_in!r}")
    return rows


def models() -> dict[str, Model]:
    """Return every model by id, in reading order.

    Raises:
        HelpersError: models.yaml does not hold, naming row and field.
    """
    return dict(_catalogue())


def model(id: str) -> Model:
    """Return one model.

    Raises:
        HelpersError: no such id; names the near misses and every valid one.
    """
    if id not in _catalogue():
        raise unknown("model", id, list(_catalogue()))
    return _catalogue()[id]


@cache
def _catalogue() -> dict[str, Model]:
    return read_models()


def _close(stated: int, computed: int, what: str) -> None:
    if abs(stated - computed) > TOLERANCE * computed:
        raise ValueError(f"{stated:,} is stated, {what} {computed:,} ({stated / computed - 1:+.2%})")
