"""Shared fixtures: tiny models and tokenizers built on the spot, no network."""

from __future__ import annotations

import logging
import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
# Prepared rows are the tests' own, and gone with them.
os.environ["MAMBA_SFT_CACHE"] = tempfile.mkdtemp(prefix="mamba-sft-tests-")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does

import atexit
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():  # read when the kernels are defined: they then run as Python on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
# No machine is too slow: what takes long is measured in benchmarks/.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
atexit.register(shutil.rmtree, os.environ["MAMBA_SFT_CACHE"], ignore_errors=True)

SHARED_FALCON = Path(__file__).parents[2] / "shared" / "falcon-tokenizer"

SLOTS = [
    ">>TITLE<<", ">>ABSTRACT<<", ">>INTRODUCTION<<", ">>SUMMARY<<", ">>COMMENT<<", ">>ANSWER<<",
    ">>QUESTION<<", ">>DOMAIN<<", ">>PREFIX<<", ">>SUFFIX<<", ">>MIDDLE<<", "<|endoftext|>",
]  # fmt: skip


def build_tokenizer() -> Any:
    """A byte-level BPE tokenizer with Falcon's structure: special slots first, then bytes, then merges."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation(behavior="contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=SLOTS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the quick brown fox jumps over the lazy dog and asks user assistant system hello world"
    words = (text + " question answer number colour").split()
    corpus = [" ".join(words[i:] + words[:i]) + f" {i} {i * 7}" for i in range(len(words))] * 4
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    fast.model_max_length = 8192
    return fast


def build_model(**config: Any) -> Any:
    """A 2-layer fp32 FalconMamba with weights large enough that logits are not flat, in eval mode."""
    import torch
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    values = {
        "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16,
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 11, "pad_token_id": 11,
    } | config  # fmt: skip
    torch.manual_seed(0)
    model = FalconMambaForCausalLM(FalconMambaConfig(**values)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and not name.endswith("A_log"):
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
        model.backbone.embeddings.weight.normal_(0.0, 1.0)
        if not model.config.tie_word_embeddings:
            model.lm_head.weight.normal_(0.0, 2.0 * model.config.hidden_size**-0.5)
    return model


@pytest.fixture
def tiny_model() -> Any:
    """A stock transformers model; tests install our mixer themselves."""
    return build_model()


@pytest.fixture
def tiny_tokenizer() -> Any:
    """No chat template, no ChatML tokens: what the base tokenizer is like."""
    return build_tokenizer()


@pytest.fixture
def tiny_base(tmp_path: Path) -> Path:
    """A directory with the tiny model and tokenizer, as a hub snapshot has them."""
    path = tmp_path / "tiny-base"
    build_model().save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def falcon_tokenizer() -> Any:
    """The real 65,024-token Falcon tokenizer."""
    if not SHARED_FALCON.is_dir():
        pytest.skip("the real Falcon tokenizer is not beside this checkout")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHARED_FALCON)


@pytest.fixture(autouse=True)
def messages_go_where_they_went() -> Iterator[None]:
    """Undo what the command line does to the package's logger when a test calls it in this process."""
    logger = logging.getLogger("mamba_sft")
    before = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers, level, logger.propagate = before
    logger.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def _measured_processor() -> None:
    """Keeps figures of a processor, so that no plan of a test measures this one first: that takes seconds."""
    import json
    from dataclasses import asdict

    from mamba_sft.planning import processor

    for threads in {1, torch.get_num_threads()}:
        for dtype in ("float32", "bfloat16"):
            known = processor.Processor(
                name="a processor", threads=threads, dtype=dtype, date="2026-01-01", busy=False, layer=0.003,
                channel=6e-8, forward=0.4, products=1.5e11, logit=1e-8,
            )  # fmt: skip
            path = processor.place_of(threads, dtype)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(known)))


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """48 short chats of different lengths."""
    import json

    path = tmp_path / "chats.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": "hello " * (1 + i % 3) + str(i)},
                {"role": "assistant", "content": f"quick {i} fox" + " jumps" * (i % 4)},
            ]
        }
        for i in range(48)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe(tiny_base: Path, chats: Path, tmp_path: Path) -> Any:
    """Makes a recipe of four short training steps; overrides as on the command line."""
    from mamba_sft import Recipe

    def make(*overrides: str, name: str = "run") -> Any:
        text = f"""
output_dir: {tmp_path / name}
model: {{base: {tiny_base}, dtype: float32}}
data: {{sources: [{{path: {chats}}}], validation: 0, max_length: 96}}
adapter: {{r: 4}}
train:
  max_steps: 4
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 2
  learning_rate: 1.0e-2
  warmup_steps: 0
  save_steps: 2
"""
        return Recipe.from_text(text, "test.yaml", overrides)

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk with given options."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root")
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if subprocess.run(command, check=False, capture_output=True).returncode != 0:
            pytest.skip("mounting is not allowed here")
        mounted = True
        return place

    yield mount
    if mounted:
        subprocess.run(["umount", str(place)], check=True)
