"""What a model's own ``generation_config`` asks of its outputs, beside how tokens are chosen.

A summariser's folder says, for instance, that no three words may come twice, or with which token every
output begins. ``generate`` of Transformers follows that, and so do we, with the same processors in
the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    GenerationConfig,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)


def output_rules(
    config: GenerationConfig | None,
    *,
    ends: Sequence[int],
    max_new_tokens: int,
    sources: torch.Tensor,
) -> LogitsProcessorList:
    """Processors to be called with (tokens [rows, so far], logits [rows, vocabulary]) before a token is
    chosen; ``tokens`` begins with the decoder's start token.

    Args:
        ends: the tokens that end an output.
        sources: [rows, width], the encoder's input of the same rows.
    """
    rules = LogitsProcessorList()
    if config is None:
        return rules
    device, end = str(sources.device), list(ends)
    read = cast(torch.LongTensor, sources)
    if (penalty := config.encoder_repetition_penalty or 1.0) != 1.0:
        rules.append(EncoderRepetitionPenaltyLogitsProcessor(penalty, read))
    if (penalty := config.repetition_penalty or 1.0) != 1.0:
        rules.append(RepetitionPenaltyLogitsProcessor(penalty))
    if size := config.no_repeat_ngram_size:
        rules.append(NoRepeatNGramLogitsProcessor(size))
    if size := config.encoder_no_repeat_ngram_size:
        rules.append(EncoderNoRepeatNGramLogitsProcessor(size, read))
    if config.bad_words_ids is not None:
        rules.append(NoBadWordsLogitsProcessor(config.bad_words_ids, end))
    if end and config.min_new_tokens:
        least = config.min_new_tokens
        rules.append(MinNewTokensLengthLogitsProcessor(1, least, end, device=device))
    elif end and config.min_length:
        rules.append(MinLengthLogitsProcessor(config.min_length, end, device=device))
    if config.forced_bos_token_id is not None:
        rules.append(ForcedBOSTokenLogitsProcessor(config.forced_bos_token_id))
    if config.forced_eos_token_id is not None:
        forced = config.forced_eos_token_id
        rules.append(ForcedEOSTokenLogitsProcessor(1 + max_new_tokens, forced, device=device))
    if config.suppress_tokens is not None:
        rules.append(SuppressTokensLogitsProcessor(config.suppress_tokens, device=device))
    if config.begin_suppress_tokens is not None:
        begin = 1 if config.forced_bos_token_id is None else 2
        rules.append(
            SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, begin, device=device)
        )
    return rules
