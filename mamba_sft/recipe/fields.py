"""The fields of a recipe, section by section: type, bounds, default and help.

Names are TRL's and PEFT's wherever they have one. The string under a field is its help: what a change of it
does to quality, memory or time.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    JsonValue,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    WrapSerializer,
)

from mamba_sft.credentials import has_credentials
from mamba_sft.errors import RecipeError
from mamba_sft.recipe.spans import TokenCount, span_of
from mamba_sft.wording import shown


def _whole_from_one(value: float) -> float:
    if value >= 1 and not value.is_integer():
        raise ValueError("must be a whole number from 1 up, or a share below 1")
    return value


def _not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("must be -1 (no limit) or at least 1")
    return value


def _not_zero3(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"(deepspeed_?)?zero_?3", value.strip().lower()):
        raise ValueError(
            "must not be `zero3`: it fetches a module's weights when that module is called, and the mixer "
            "reads those of its convolution without a call; use `fsdp`, which fetches whole blocks"
        )
    return value


def _empty_is_default(value: Any) -> Any:
    return {} if value is None else value


def _as_count(value: float) -> float | int:
    return int(value) if value.is_integer() else value


NEAREST_TO_0 = 1e-12
"""A number that is nearer, and not 0, is a slip: nothing would come of it."""


def _not_vanishing(value: float) -> float:
    if 0 < abs(value) < NEAREST_TO_0:
        raise ValueError(f"must not be nearer to 0 than {NEAREST_TO_0:g}")
    return value


def _prose(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    if any(unicodedata.category(each) == "Cc" for each in text if each not in "\n\r\t"):
        raise ValueError("must not hold control characters")
    if has_credentials(text):
        raise ValueError("must not hold a token or password: recipes are kept with runs (tokens: `HF_TOKEN`)")
    return text


def _one_line(text: str) -> str:
    if re.search(r"[\n\r\t\u2028\u2029]", text):
        raise ValueError("must be a single line without tabs")
    return _prose(text)


def _file_name(text: str) -> str:
    names = text.encode("utf-8", "surrogatepass").split(b"/")
    if max(map(len, names)) > 255 or sum(map(len, names)) + len(names) > 1024:
        raise ValueError("must have at most 1,024 bytes, and each name in it 255")
    return _one_line(text)


def _layer_name(text: str) -> str:
    if not re.fullmatch(r"\w+(\.\w+)*", text, re.ASCII):
        raise ValueError("must be the name of a layer, such as `in_proj`")
    return text


Number = Annotated[float, AfterValidator(_not_vanishing)]
CountOrShare = Annotated[
    float, AfterValidator(_not_vanishing), AfterValidator(_whole_from_one), PlainSerializer(_as_count)
]
"""A count from 1 up, or below 1 a share of the whole."""

Part = Literal[
    "messages",
    "prompt",
    "input",
    "response",
    "system",
    "history",
    "tools",
    "text",
    "chosen",
    "rejected",
    "difficulty",
]
"""What a column of the data can be for."""

MANY = 1_000_000_000  # where a number needs a bound and has no natural one
Span = Annotated[
    float | str,
    span_of(Annotated[float, AfterValidator(_not_vanishing), AfterValidator(_whole_from_one)], most=MANY),
]
"""How long a part of the run is: a share below 1, steps from 1 up, or tokens such as `20M tokens`."""
Interval = Annotated[float, Field(gt=0, le=MANY), AfterValidator(_whole_from_one), PlainSerializer(_as_count)]
"""A count or share that may be left out, so that its bounds are its own."""
Text = Annotated[str, Field(min_length=1), AfterValidator(_prose)]
"""What people write: lines and tabs are part of it."""
Name = Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_one_line)]
FileName = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_file_name)]
"""A path, a glob, or an id of the hub; a longer path cannot be opened everywhere."""
LayerName = Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_layer_name)]
TARGETS = ("in_proj", "x_proj", "dt_proj", "out_proj")
"""The linear layers of a mixer, on which LoRA can go."""
ORDINARY = BeforeValidator(_empty_is_default)  # `eval:` with nothing under it is a section of defaults


class Section(BaseModel):
    """What all sections share: no unknown fields, no coercion, no NaN, no change after construction."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses what pydantic would refuse, too, in words that say what to do instead."""
        raise RecipeError(
            f"a recipe does not change once it is made, and so `{shown(name)}` stays as it is",
            hint='make another: `Recipe.load("quickstart", ["train.max_steps=20"])`, or'
            ' `Recipe.from_text(recipe.to_yaml(), overrides=["train.max_steps=20"])`',
        )


class ModelSection(Section):
    """The base model and how it is loaded."""

    base: FileName
    """The model to fine-tune: a hub id such as `tiiuae/falcon-mamba-7b`, or a directory."""
    revision: Name | None = None
    """Branch, tag or commit on the hub; a commit makes the run repeatable. null takes the newest."""
    adapter: FileName | None = None
    """A run, or its adapter directory, from whose adapter training goes on. Base and LoRA have to be as they
    were there; everything else may differ. null starts anew."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "bfloat16"
    """Number format of the base weights and of the computation. float32 doubles the memory of 16 bits;
    float16 is for GPUs without bfloat16 (T4, V100); auto keeps the checkpoint's own."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """nf4 stores the frozen projections in 4 bits: a 7B base takes about 4.4 GiB instead of 13.5 GiB, at
    some cost in speed and quality. Projections that are not whole blocks of 32 rows and 64 columns, as a
    small base may have, stay as they are. int8 sits between the two."""
    kernels: Literal["auto", "reference", "cpu", "triton"] = "auto"
    """What runs the scan and the convolution. auto takes the fastest that works here and says which;
    reference is slow and for checking."""


class ChatSection(Section):
    """How conversations become text."""

    template: FileName = "chatml"
    """chatml installs the template the published instruct model uses; tokenizer keeps the base's own;
    otherwise the path of a `.jinja` file, which must mark assistant turns with `{% generation %}`."""
    system: Text | None = None
    """System message put in front of every conversation that has none. null adds nothing."""
    special_tokens: Literal["auto", "add"] = "auto"
    """auto gives the template's marks unused rows of the vocabulary, so that no matrix grows;
    add appends new rows and resizes the embeddings."""
    temperature: Annotated[float, Field(ge=0, le=10), AfterValidator(_not_vanishing)] | None = None
    """Sampling that the checkpoint's generation_config recommends to whoever loads it; 0 is greedy, null says
    nothing. Samples of the run are always greedy."""
    top_p: Annotated[float, Field(gt=0, le=1), AfterValidator(_not_vanishing)] | None = None
    """The same for the probability that the tokens sampled from add up to."""
    reasoning: Literal["keep", "drop"] = "keep"
    """What happens to the reasoning beside an answer (`reasoning_content`, `thinking`): keep trains it as
    `<think>...</think>` before the answer, so that the model reasons first; drop leaves it out."""


class SourceSection(Section):
    """One place that training rows come from."""

    id: Name | None = None
    """What the source is called in stages, metrics and report; left out, its file's name without endings."""
    path: FileName
    """A hub dataset id, a file (jsonl, ndjson, json, csv, tsv, txt, all maybe packed as gz, bz2, xz or zst;
    parquet), a glob of files, or a directory that `save_to_disk` wrote."""
    name: Name | None = None
    """Configuration of the hub dataset, where it has several."""
    split: Name = "train"
    """Split of the hub dataset."""
    sample_by: Literal["line", "paragraph", "document"] = "paragraph"
    """What of a txt file is a row: a line, a paragraph (blank lines stand between them), or all of it."""
    format: Literal[
        "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "plain_completion", "text"
    ] = "auto"
    """Shape of the rows. auto looks at the rows and says what it saw. prompt_completion makes a user and an
    assistant turn of a pair of texts; plain_completion and text keep the chat template out, so that chat does
    not fit what is learned."""
    columns: dict[Part, Text] = {}
    """Columns with names of their own, part -> column: `{prompt: task, response: reply}`. Parts are messages
    (a list of turns), or prompt (maybe with input below it) and response, or text; beside them system,
    history, tools, chosen and rejected, and difficulty, a number that `curriculum` may order rows by. Common
    names are known without it."""
    roles: dict[Text, Literal["system", "user", "assistant", "tool"]] = {}
    """Names of roles that are not known by themselves: `{customer: user, agent: assistant}`. Case and blanks
    around a name do not matter."""
    preference: Literal["chosen"] | None = None
    """What to learn from preference data: chosen trains on the preferred answer, or on the rows whose `label`
    is true, and leaves the others out. null refuses such data."""
    weight: Number = Field(default=1.0, gt=0, le=1000)
    """Share of the rows that an epoch shows: 0.5 a fixed half of them, 2.0 each one twice. With
    `data.mixture`, the source's part of the mixture."""
    max_epochs: Annotated[float, Field(gt=0, le=1000), AfterValidator(_not_vanishing)] | None = None
    """With `data.mixture`: read at most so often; then the other sources take its part. null has no limit."""
    limit: int | None = Field(default=None, ge=1, le=MANY)
    """Take at most this many rows. null takes all."""
    stream: bool = False
    """Read the hub dataset as it comes, without downloading all of it first; with `limit`, only that much is
    ever fetched."""


class MixtureSection(Section):
    """How sources are mixed at every moment of a run, instead of epoch by epoch."""

    by: Literal["tokens", "rows"] = "tokens"
    """What the sources' weights are shares of."""
    temperature: Annotated[float, Field(gt=0, le=1e6), AfterValidator(_not_vanishing)] | None = None
    """Multiplies each weight by the source's size to the power of 1 / temperature: 1 mixes in proportion to
    the sizes, a high one evenly. null leaves sizes out."""
    curriculum: Literal["length", "difficulty"] | None = None
    """Read each source from its short rows to its long ones, or by its column of difficulty, easy ones first.
    null shuffles."""


class DataSection(Section):
    """What the model is trained on, and which tokens of it."""

    sources: list[SourceSection] = Field(min_length=1)
    """Where rows come from; several are mixed by their weights."""
    mixture: MixtureSection | None = None
    """Shares of the sources, kept at every moment, each source read as often as that takes. null reads every
    row once an epoch, or `weight` times."""
    validation: CountOrShare = Field(default=0.02, ge=0, le=MANY)
    """Rows held out for the validation loss: below 1 a share, from 1 up a number of rows. 0 holds none out;
    then no best checkpoint can be chosen."""
    max_length: int | None = Field(default=2048, ge=8, le=1_048_576)
    """Longest row in tokens. Activation memory grows linearly with it. null keeps every row whole."""
    too_long: Literal["drop", "truncate", "split"] = "truncate"
    """What happens to rows longer than `max_length`: truncate loses their end, split trains on all of it in
    pieces, drop leaves the row out. No effect when `max_length` is null."""
    packing: bool = True
    """Fill each row with several conversations, whose states are kept apart. Less padding, so faster; what is
    learned from each conversation stays the same."""
    assistant_only_loss: bool = True
    """Train on assistant turns only (with their stop token). false trains on user turns too."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """stop lists the first bad rows and ends; skip leaves them out, counts them and writes them to
    rejected.jsonl."""


class AdapterSection(Section):
    """Where LoRA goes and how large it is; `adapter: none` trains all weights instead."""

    r: int = Field(default=16, ge=1, le=1024)
    """Rank. Higher can learn more and costs memory and file size in proportion."""
    lora_alpha: int = Field(default=32, ge=1, le=65536)
    """The update is scaled by lora_alpha / r. Higher acts like a higher learning rate."""
    lora_dropout: Number = Field(default=0.0, ge=0, lt=1)
    """Share of adapter inputs dropped in training. Helps small data sets against overfitting."""
    target_modules: list[LayerName] = Field(default=["in_proj", "x_proj", "out_proj"], min_length=1)
    """Linear layers of the mixer that get an adapter; `dt_proj` is possible too. Fewer layers save memory
    and can learn less."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r), which keeps high ranks (64 and up) learning."""
    use_dora: bool = False
    """Learn the length of each weight row apart from its direction. Can help at low rank; slower."""


class NoSectionError(ValueError):
    """Something else stands where a section, or the word `none`, has to."""


def _read_none(value: Any) -> Any:
    if value is not None and not isinstance(value, str | bool | int | float | list):
        return value
    if value != "none":  # an empty section may mean either
        raise NoSectionError("must be a section with fields of its own, or the word `none`")
    return None


def _write_none(value: Any, write: SerializerFunctionWrapHandler) -> Any:
    return "none" if value is None else write(value)


class _WordInSchema:
    """Has the schema say `none`, as it is written, and not null."""

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        found = handler(schema)
        choices = [one for one in found.pop("anyOf") if one != {"type": "null"}]
        return {**found, "anyOf": [*choices, {"const": "none"}]}


Adapter = Annotated[
    AdapterSection | None, BeforeValidator(_read_none), WrapSerializer(_write_none), _WordInSchema()
]
"""LoRA, or None for `adapter: none`: all weights are trained."""


class StageSection(Section):
    """A part of a run with lengths and a mixture of its own; optimizer and schedule go on through all."""

    until: float | None = Field(default=None, gt=0, lt=1)
    """Where it ends, as a share of the run. Left out for the last stage alone."""
    max_length: int | None = Field(default=None, ge=8, le=1_048_576)
    """Longest row in tokens; longer ones wait for a later stage. null is `data.max_length`."""
    sources: Annotated[dict[Name, Annotated[Number, Field(ge=0, le=1000)]], Field(min_length=1)] | None = None
    """Id of a source -> its weight in this stage; sources that are not named are not read. null takes all, by
    their own weights."""
    curriculum: Literal["length", "difficulty"] | None = None
    """As in `data.mixture`, for this stage; null is what is said there."""


class RampSection(Section):
    """How the batch grows at the start of a run."""

    model_config = ConfigDict(serialize_by_alias=True)

    from_: int = Field(alias="from", ge=1, le=1_000_000)
    """Rows of the first step, over all devices."""
    to: int = Field(ge=1, le=1_000_000)
    """Rows of a step from the end of the ramp on."""
    tokens: TokenCount
    """Tokens over which it grows, evenly in what was read: a number, or such as `20M tokens`."""


class TrainSection(Section):
    """Optimization: how long, how fast, how large the batches are."""

    num_train_epochs: Number = Field(default=1.0, gt=0, le=1000)
    """Passes over the data. Instruct tuning rarely gains from more than 3."""
    max_steps: Annotated[int, AfterValidator(_not_zero)] = Field(default=-1, ge=-1, le=MANY)
    """Stop after this many optimizer steps, whatever num_train_epochs says. -1 has no limit."""
    stages: list[StageSection] | None = Field(default=None, min_length=1, max_length=100)
    """Parts of the run, one after the other, such as short rows first and long ones last; needs
    `data.mixture`, which is there with its defaults if it is left out. null is one stage."""
    per_device_train_batch_size: int = Field(default=1, ge=1, le=4096)
    """Rows that go through the model at once on each device. Activation memory is proportional to it."""
    gradient_accumulation_steps: int | None = Field(default=None, ge=1, le=65536)
    """Micro-batches added up for one optimizer step: a larger batch for time instead of memory. null, or left
    out, is 16, or as many fewer as it takes to make 20 steps of a small data set; with batch_ramp it
    follows."""
    batch_ramp: RampSection | None = None
    """Begin with small steps, which learn more from a token while all is new, and let the batch grow:
    `{from: 8, to: 128, tokens: 20M tokens}`. null takes every step alike."""
    batch_scaling: bool = False
    """While the batch grows, scale the learning rate by sqrt(batch / to), which keeps the noise in Adam's
    steps what it is at the end of the ramp."""
    learning_rate: Number = Field(default=2e-4, gt=0, le=1)
    """Peak step size. LoRA likes 1e-4 to 3e-4, all weights about a tenth of it, which is the default with
    `adapter: none`; too high and the loss jumps or becomes NaN."""
    lr_scheduler_type: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    """Course of the learning rate after the warmup: wsd holds the peak and falls at the end, cosine and
    linear fall all the way, constant stays."""
    decay: Literal["exponential", "1-sqrt", "linear"] | None = None
    """How wsd falls: 1-sqrt steeply at first and to 0, exponential by the same factor in every step, as
    Falcon-Mamba was pre-trained. null is 1-sqrt."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1), AfterValidator(_not_vanishing)] | None = None
    """Share of the peak that the learning rate has in the last step. null is 1/256 for an exponential decay;
    otherwise 0, which would come a step after the last."""
    warmup_steps: Span = 0.03
    """How long the learning rate rises to its peak: below 1 a share of the run, from 1 up a number of steps,
    or tokens: `20M tokens`. The first step is above 0 already."""
    stable_steps: Span | None = None
    """How long wsd holds the peak, written as warmup_steps is. null is what warm-up and decay leave."""
    decay_steps: Span | None = None
    """How long wsd falls, written as warmup_steps is. null is a fifth of the run, or what stable_steps
    leaves."""
    weight_decay: Number = Field(default=0.0, ge=0, le=1)
    """Pulls what is trained towards zero, but no biases, no norms, no `A_log` and no `D`. Seldom needed with
    LoRA."""
    max_grad_norm: Number = Field(default=1.0, gt=0, le=1e6)
    """Gradients longer than this are scaled down to it, which tames loss spikes."""
    optim: Literal["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"] = "adamw_torch_fused"
    """The 8-bit ones hold optimizer state in a quarter of the memory; paged moves it to CPU memory when the
    GPU is full. With LoRA that state is small; with `adapter: none` it is twice the weights."""
    checkpointing: Literal["none", "block", "mamba"] = "block"
    """block keeps only the input of each block and computes the rest again in the backward pass: far less
    memory, about a third more time. mamba keeps the large matrix products too and repeats only what is cheap:
    three times what block keeps, for hardly more time than none, which is fastest if it fits. mamba needs
    LoRA."""
    stream_tokens: int | None = Field(default=None, ge=1, le=MANY)
    """Train rows of any length in chunks of this many tokens, with the gradients of the whole row, in the
    memory of one chunk, for one more forward. 1024 suits most GPUs, with `checkpointing: none` or mamba.
    null takes each row at once."""
    carry_state: bool = False
    """Start each row from the state that an earlier row ended with, without gradients, instead of from
    nothing. Helps models trained on short rows to read longer ones; changes what is learned."""
    auto_batch: bool = False
    """Survive running out of memory: try the longest rows first, and run a micro-batch that does not fit in
    parts. The effective batch and the order of the data stay what they are."""
    parallel: Annotated[Literal["ddp", "fsdp", "zero2"], BeforeValidator(_not_zero3)] = "ddp"
    """How several GPUs share a run. ddp: each has the whole model, which is fastest where it fits. fsdp: each
    loads the base, keeps a part of it, of the adapter and of the optimizer, and fetches a block's weights
    when it computes it: room for activations. zero2: each has the whole model and a part of gradients and
    optimizer, by DeepSpeed; with LoRA that is little. Without effect on one GPU."""
    logging_steps: int = Field(default=1, ge=1, le=MANY)
    """Optimizer steps between logged losses."""
    save_steps: CountOrShare = Field(default=0.2, gt=0, le=MANY)
    """When a checkpoint is saved: below 1 a share of the run, from 1 up a number of steps. Left out, it is
    `eval.eval_steps`."""
    save_total_limit: int = Field(default=2, ge=1, le=MANY)
    """Checkpoints kept on disk; older ones are removed, the best one never."""
    grace_seconds: float = Field(default=20.0, ge=0, le=86_400)
    """How soon after Ctrl-C or SIGTERM a checkpoint is there: a step that takes more than half of it is given
    up. Slurm and Colab kill after about 30 seconds."""
    on_spike: Literal["warn", "skip", "stop"] = "warn"
    """What to do at a step whose loss or gradient norm is far outside its recent course: say so and name its
    rows, leave the step out as well, or stop before it. All are in the run's spikes.jsonl."""
    log_activations: bool = False
    """Log the largest number of the residual stream as `largest_residual`, for one more reading of every
    block's output. Beyond 65,504 a float16 model would lose it."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Where metrics go besides metrics.jsonl."""
    trainer_arguments: dict[str, JsonValue] = {}
    """More fields of TRL's SFTConfig, for the rare case: those that nothing else settles."""


class EvalSection(Section):
    """What is measured while training."""

    eval_steps: CountOrShare = Field(default=0.2, gt=0, le=MANY)
    """When the validation loss is measured: below 1 a share of the run, from 1 up a number of steps."""
    per_device_eval_batch_size: int = Field(default=1, ge=1, le=4096)
    """Rows per forward pass in evaluation. Needs far less memory per row than training."""
    prompts: FileName | None = None
    """Prompts to answer before and after training: a jsonl file of {"prompt": ..., "answer": ...}, answer
    optional, or a txt file with one prompt a line. null answers none."""
    sample_steps: Interval | None = None
    """When a few of the prompts are answered while training goes on, for the report: below 1 a share of the
    run, from 1 up a number of steps. Costs the time of those answers; null answers none in between."""
    max_new_tokens: int = Field(default=128, ge=1, le=65536)
    """Longest answer to a prompt."""
    load_best_model_at_end: bool = True
    """Keep the checkpoint with the lowest validation loss instead of the last one. Left out, it is true if
    there are validation rows."""
    early_stopping_patience: int | None = Field(default=None, ge=1, le=MANY)
    """Stop after this many evaluations without a lower validation loss. null never stops early."""
