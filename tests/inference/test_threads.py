"""No call changes a model while it runs: many threads, base and tuned mixed, get the answers one gets."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from mamba_sft.inference.chat_model import ChatModel, load_chat_model, split_chat_model
from mamba_sft.inference.evaluating import evaluation_mode
from mamba_sft.inference.generation import State, answers, stream
from mamba_sft.inference.sampling import Sampling
from mamba_sft.inference.sessions import ChatSession
from mamba_sft.model.tensor_files import one_thread
from mamba_sft.run import Run
from tests.inference.conftest import make_run

THREADS, PROMPTS, LENGTH = 4, 20, 12


def prompt(number: int) -> list[int]:
    generator = torch.Generator().manual_seed(number)
    length = 3 + number % 7
    return torch.randint(12, 500, (length,), generator=generator).tolist()


def answer(side: ChatModel, number: int) -> tuple[list[int], list[float]]:
    """The ids of one answer, and the scores after it: a wrong state shows there even where no id changes."""
    state = State()
    ids = list(stream(side.model, prompt(number), state, sampling=Sampling(LENGTH), stop_ids=frozenset()))
    return ids, state.logits[0].tolist()


@pytest.fixture(params=["float32", "bfloat16"])
def sides(request: pytest.FixtureRequest, run: Run) -> tuple[ChatModel, ChatModel]:
    chat_model = load_chat_model(run)
    chat_model.model.to(getattr(torch, request.param))
    return split_chat_model(chat_model)


def test_four_threads_answer_as_one_does(sides: tuple[ChatModel, ChatModel]) -> None:
    asked = [(sides[(thread + number) % 2], number) for thread in range(THREADS) for number in range(PROMPTS)]
    expected = [answer(side, number) for side, number in asked]
    base, tuned = expected[0], expected[PROMPTS]
    assert base != tuned  # the two sides do differ, so a mix-up would show

    start = threading.Barrier(THREADS)

    def work(thread: int) -> list[Any]:
        start.wait()
        mine = asked[thread * PROMPTS : (thread + 1) * PROMPTS]
        return [answer(side, number) for side, number in mine]

    with ThreadPoolExecutor(THREADS) as pool:
        found = [one for answers_of_thread in pool.map(work, range(THREADS)) for one in answers_of_thread]
    assert [one[0] for one in found] == [one[0] for one in expected]
    assert found == expected


def test_conversations_of_four_threads_are_what_they_are_one_after_the_other(
    sides: tuple[ChatModel, ChatModel],
) -> None:
    """From text to text: template, tokenizer and state are shared as well as the weights."""

    def talk(number: int) -> list[str]:
        session = ChatSession(sides[number % 2], sampling=Sampling(6))
        return [
            "".join(session.send(f"{text} {number}")) for text in ("hello", "the <|im_end|> fox", "again")
        ]

    expected = [talk(number) for number in range(THREADS * 3)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(talk, range(THREADS * 3)))
    finally:
        sys.setswitchinterval(before)
    assert found == expected


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_models_answer_all_threads_from_their_first_call_on(
    quantization: Any, tmp_path: Path, base: Path
) -> None:
    run = make_run(tmp_path / "run", base)
    alone = split_chat_model(load_chat_model(run, quantization=quantization))
    expected = [answer(alone[number % 2], number) for number in range(8)]
    sides = split_chat_model(load_chat_model(run, quantization=quantization))
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda number: answer(sides[number % 2], number), range(8)))
    assert [one[0] for one in found] == [one[0] for one in expected]


def snapshot(model: Any) -> dict[str, Any]:
    """Everything a call could change: which objects hang where, their settings, and each value."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_modules", "_parameters", "_buffers"):
                seen[f"{name}.{key}"] = {k: id(v) for k, v in value.items()}
            elif key != "_hf_hook":
                seen[f"{name}.{key}"] = str(value) if isinstance(value, dict | list | set) else id(value)
    return seen | {name: value.clone() for name, value in model.state_dict().items()}


def test_no_call_leaves_a_trace_or_shows_one_while_it_runs(sides: tuple[ChatModel, ChatModel]) -> None:
    tuned = sides[1].model
    before = snapshot(tuned)
    looks: list[bool] = []

    def look(module: Any, *_: Any) -> None:
        """In the middle of a call: the biases are where they belong, and the adapters are on."""
        layers = [m for m in tuned.modules() if hasattr(m, "A_log")]
        looks.append(all(layer.dt_proj.bias is not None for layer in layers))
        looks.append(not any(m.disable_adapters for m in tuned.modules() if isinstance(m, BaseTunerLayer)))

    first = tuned.get_base_model().backbone.layers[0].mixer.dt_proj
    hook = first.register_forward_hook(look)
    for side in sides:
        answer(side, 1)
        answers(side.model, side.tokenizer, [prompt(2)], sampling=Sampling(4), stop_ids=frozenset())
    hook.remove()
    assert len(looks) > 20
    assert all(looks)
    after = snapshot(tuned)
    assert after.keys() == before.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]
        assert same, name


def test_a_model_in_training_goes_back_after_the_last_user() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval()).train()
    model[1].eval()
    first, second = evaluation_mode(model), evaluation_mode(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not model[0].training
    second.__exit__(None, None, None)
    assert model.training
    assert model[0].training
    assert not model[1].training


def test_overlapping_blocks_on_one_core_put_the_threads_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = one_thread(), one_thread()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_num_threads() == 1
        second.__exit__(None, None, None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
