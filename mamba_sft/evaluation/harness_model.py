"""Our model as lm-eval asks it: its own tokens and limits, our reading and our generation.

`HFLM` (lm-eval 0.4.13, read 2026-11-27) turns requests into token ids, cuts what is too long and keeps count;
all of that stays. What is replaced is what comes after: log-likelihoods are computed where each beginning is
read once (`prefix_scoring`), and answers by our generation, which carries states and stops rows one by one.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from mamba_sft.evaluation.prefix_scoring import Likelihood, score_continuations
from mamba_sft.inference.answer import Answer
from mamba_sft.inference.chat_model import ChatModel
from mamba_sft.inference.generation import answers
from mamba_sft.inference.sampling import Sampling

logger = logging.getLogger(__name__)

_SAMPLING = {"do_sample", "temperature", "top_p", "top_k", "until", "max_gen_toks"}
"""What our generation takes of a request's settings; with others `HFLM`'s own answers."""


class HarnessModel(HFLM):  # type: ignore[misc]
    """A loaded model for lm-eval.

    Args:
        chat_model: The model, with our mixer.
        max_length: Longest text in tokens; always said, since base and tuned may have tokenizers that differ.
        batch_size: Texts at a time; changes no score.
        on_request: Called as each request is done.
    """

    def __init__(
        self,
        chat_model: ChatModel,
        *,
        max_length: int,
        batch_size: int,
        on_request: Callable[[], None] | None = None,
    ):
        super().__init__(
            pretrained=chat_model.model,
            tokenizer=copy.deepcopy(chat_model.tokenizer),  # a padding token may be put into it
            backend="causal",
            max_length=max_length,
            batch_size=batch_size,
        )
        self._stop_ids = chat_model.stop_ids
        self._on_request = on_request or (lambda: None)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Does what `HFLM` does, without a bar for each task: `on_request` tells how far it is."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """What `HFLM` asks for tokenized requests, `(texts, context ids, continuation ids)`."""

        def tell(number: int, likelihood: Likelihood) -> None:
            texts = requests[number][0]
            if texts is not None:  # a window of a longer text, which counts when it is whole
                self.cache_hook.add_partial("loglikelihood", texts, tuple(likelihood))
            self._on_request()

        found = score_continuations(
            self.model,
            [(context, continuation) for _, context, continuation in requests],
            max_length=self.max_length,
            batch_size=override_bs or self.batch_size,
            on_score=tell,
        )
        logger.debug("%s tokens read for texts of %s", f"{found.tokens_read:,}", f"{found.tokens_in_all:,}")
        return [(one.log_likelihood, one.is_greedy) for one in found.likelihoods]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns an answer to each request, which says with what settings."""
        found: dict[int, str] = {}
        alike = sorted(range(len(requests)), key=lambda number: _settings(requests[number]))
        for _, group in groupby(alike, key=lambda number: _settings(requests[number])):
            numbers = list(group)
            texts = self._answers([requests[number] for number in numbers])
            found.update(zip(numbers, texts, strict=True))
        return [found[number] for number in range(len(requests))]

    def _answers(self, requests: list[Any]) -> list[str]:
        """Answers requests with the same settings."""
        given = requests[0].args[1]
        settings = normalize_gen_kwargs(given, self.max_gen_toks)
        if unknown := set(settings) - _SAMPLING:
            logger.warning("answers with `%s` are computed by transformers", "`, `".join(sorted(unknown)))
            answered: list[str] = super().generate_until(requests, disable_tqdm=True)
            return answered
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(settings.get("until"), eos=eos)
        texts: dict[int, str] = {}

        def take(number: int, answer: Answer) -> None:
            texts[number] = postprocess_generated_text(answer.text, stop=until, think_end_token=None)
            self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
            self._on_request()

        longest = settings["max_gen_toks"]
        answers(
            self.model,
            self.tokenizer,
            [
                self.tok_encode(request.args[0], left_truncate_len=self.max_length - longest)
                for request in requests
            ],
            sampling=Sampling(
                max_new_tokens=longest,
                temperature=settings["temperature"] if settings["do_sample"] else 0.0,
                top_p=settings.get("top_p", 1.0),
                top_k=settings.get("top_k", 0),
                seed=0,
                stop_strings=[text for text in until if text],
            ),
            stop_ids=self._stop_ids,
            batch_size=self.batch_size,
            on_answer=take,
        )
        return [texts[number] for number in range(len(requests))]


def _settings(request: Any) -> str:
    return json.dumps(request.args[1], sort_keys=True, default=str)
