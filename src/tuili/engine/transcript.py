"""From an engine's updates to what its user reads: text, log-probabilities, the end. One ``Transcript`` per choice."""

from __future__ import annotations

from dataclasses import replace

from tuili.core.plan import TopLogprobs
from tuili.core.request import FinishReason, Request, Update
from tuili.engine.detokenize import Detokenizer, StopStrings
from tuili.engine.outputs import Delta, TokenLogprob, TokenText, Usage
from tuili.engine.tokenizer import Tokenizer


class Transcript:
    """Choice ``index``: ``push`` turns each update into a Delta, or into None while there is nothing to tell.

    When ``done``, all has been said; if ``stopped`` as well, a stop string ended it and the engine has to be told.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, index: int = 0):
        params = request.params
        self.request = request
        self.index = index
        self.done = False
        self.stopped = False
        self.completion_tokens = 0
        #: As of the last update.
        self.cached = self.preemptions = 0
        self.timing = request.timing
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(
            tokenizer,
            request.tokens[: request.prompt_len],
            params.skip_special_tokens,
            params.spaces_between_special_tokens,
        )
        self._stops = StopStrings(params.stop or (), params.include_stop_str_in_output)
        #: Text goes out as it comes: nothing can stop it.
        self._plain = params.detokenize and not params.stop
        self._prompt_logprobs: list[TokenLogprob | None] | None = None if params.prompt_logprobs is None else [None]

    @property
    def usage(self) -> Usage:
        return Usage(self.request.prompt_len, self.completion_tokens, self.cached)

    def push(self, update: Update) -> Delta | None:
        self.cached, self.preemptions = update.cached, update.preemptions
        self.timing = update.timing or self.timing
        if self._prompt_logprobs is not None:
            self._prompt_logprobs += [self._logprob(entry) for entry in update.prompt_logprobs]
        text, count = self._read(update)
        self.stopped = self._stops.match is not None
        self.done = self.stopped or update.finish is not None
        if not count and not self.done:
            return None
        finish = FinishReason.STOP if self.stopped else update.finish
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        asked = self.request.params.logprobs is not None
        return Delta(
            self.index,
            text,
            update.tokens[:count],
            tuple(self._logprob(entry) for entry in update.logprobs[:count]) if asked else None,
            None if prompt_logprobs is None else tuple(prompt_logprobs),
            finish_reason=None if finish is None else str(finish),
            stop_reason=self._stops.match if self.stopped else update.stop_reason,
            usage=self.usage if self.done else None,
            timing=replace(self.timing) if self.done else None,
        )

    def _read(self, update: Update) -> tuple[str, int]:
        """The update's text, and how many of its tokens it took: none behind the one that completes a stop string."""
        params = self.request.params
        if self._plain and update.finish is None and len(update.tokens) == 1:
            self.completion_tokens += 1
            return self._detokenizer.push(update.tokens[0]), 1
        if not params.detokenize:
            self.completion_tokens += len(update.tokens)
            return "", len(update.tokens)
        # The token that ended the text (eos, stop id) is no part of it, unless asked for.
        silent = (
            len(update.tokens) - 1 if self._ended_by_token(update) and not params.include_stop_str_in_output else -1
        )
        pieces = []
        for number, token in enumerate(update.tokens):
            self.completion_tokens += 1
            if number != silent:
                armed = self.completion_tokens > params.min_tokens
                pieces.append(self._stops.push(self._detokenizer.push(token), armed))
                if self._stops.match is not None:
                    return "".join(pieces), number + 1
        if update.finish is not None:
            armed = self.completion_tokens > params.min_tokens
            pieces.append(self._stops.push(self._detokenizer.finish(), armed))
            if self._stops.match is None:
                pieces.append(self._stops.finish())
        return "".join(pieces), len(update.tokens)

    @staticmethod
    def _ended_by_token(update: Update) -> bool:
        return update.finish is FinishReason.STOP

    def _logprob(self, entry: TopLogprobs) -> TokenLogprob:
        top = tuple(self._text(id, logprob) for id, logprob in entry.top)
        return TokenLogprob(self._text(entry.token, entry.logprob), entry.rank, top)

    def _text(self, id: int, logprob: float) -> TokenText:
        return TokenText(id, logprob, self._tokenizer.token_text(id), self._tokenizer.token_bytes(id))
