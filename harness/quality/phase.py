"""What a lossy run does after its timed passes: scores the sample while its engine is loaded, then asks for the reference.

Nothing that goes wrong here costs the run its figures: it becomes a note, which the run tells as a warning.
"""

import logging
import time
from collections.abc import Sequence
from typing import Any

from flexllmgen.errors import OffloadError
from harness.job import Job
from harness.prompts import PromptSet
from harness.quality.figures import loss_of, match_tokens, perplexity
from harness.quality.reference import find_reference
from harness.quality.sample import Sample, draw_sample
from harness.quality.words import changes_kv
from harness.results import QualityRecord
from strategies.base import Engine, Plan, Scores

log = logging.getLogger(__name__)

COMPARED_ROWS = 32
"""Prompts whose tokens are compared: the first of the run."""


class Quality:
    """The quality of one lossy run, as far as it is known.

    Args:
        plan: what the engine really runs.
    """

    def __init__(self, job: Job, plan: Plan, prompts: PromptSet, tokenizer: Any) -> None:
        self.job, self.plan, self.prompts, self.tokenizer = job, plan, prompts, tokenizer
        self.metrics: dict[str, float] = {}
        self.record = QualityRecord()
        self._sample: Sample | None = None
        self._loss: float | None = None
        self._possible = False

    @property
    def notes(self) -> Sequence[str]:
        """Why figures are missing."""
        return self.record.notes

    def score(self, engine: Engine) -> None:
        """Measure the lossy model's perplexity; the engine is between blocks."""
        if self.plan.request.model.weights == "random":
            self._note(
                "with random weights neither perplexity nor equal tokens mean anything; they are not measured"
            )
            return
        config = self.job.common
        started = time.perf_counter()
        try:
            self._sample = draw_sample(
                self.tokenizer,
                input_len=config.input_len,
                batch_size=self.plan.request.batch_size,
            )
            self._describe(self._sample)
            self._possible = True
            if not isinstance(engine, Scores):
                self._note(f"strategy {self.plan.strategy} cannot score a text: no perplexity")
                return
            self._loss = loss_of(engine, self._sample, by_steps=changes_kv(self.plan.as_dict()))
            self.metrics["perplexity"] = perplexity(self._loss)
        except OffloadError as error:
            self._note(f"no perplexity: {error}")
        except Exception as error:
            log.exception("perplexity")
            self._note(f"no perplexity: {type(error).__name__}: {_first_line(error)}")
        finally:
            self.metrics["quality_s"] = time.perf_counter() - started

    def compare(self, output_ids: Sequence[Sequence[int]]) -> None:
        """Hold perplexity and tokens against the lossless model's. The lossy engine is closed by now.

        Args:
            output_ids: what the run generated, a row per prompt.
        """
        if not self._possible or self._sample is None:
            return
        rows = self.prompts.prompts[: min(COMPARED_ROWS, len(output_ids))]
        started = time.perf_counter()
        try:
            found = find_reference(
                self.job,
                self.plan.request,
                self._sample,
                [prompt.token_ids for prompt in rows],
                self.prompts.pad_token_id,
            )
        except OffloadError as error:
            self._note(f"nothing lossless to compare with: {error}")
            return
        except Exception as error:
            log.exception("the lossless reference")
            self._note(f"nothing lossless to compare with: {type(error).__name__}: {_first_line(error)}")
            return
        finally:
            self.metrics["quality_s"] += time.perf_counter() - started
        matched = match_tokens(output_ids[: len(rows)], found.reference.output_ids)
        self.metrics |= {
            "perplexity_lossless": perplexity(found.reference.loss),
            "token_match_share": matched.share,
            "equal_prefix_tokens": matched.prefix_tokens,
        }
        if self._loss is not None:
            self.metrics["perplexity_ratio"] = perplexity(self._loss - found.reference.loss)
        self.record = self.record.model_copy(
            update={
                "compared_sequences": matched.sequences,
                "compared_tokens": matched.tokens,
                "reference": found.origin,
            }
        )

    def _describe(self, sample: Sample) -> None:
        self.record = self.record.model_copy(
            update={
                "text": sample.text,
                "split": sample.split,
                "revision": sample.revision,
                "digest": sample.digest,
                "windows": len(sample.windows),
                "window_tokens": len(sample.windows[0]),
                "scored_tokens": sample.scored_tokens,
            }
        )

    def _note(self, text: str) -> None:
        log.warning("quality: %s", text)
        self.record = self.record.model_copy(update={"notes": [*self.record.notes, text]})


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
