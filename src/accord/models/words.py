"""Keep the words of a question or an answer from being read as a model's own tokens.

    "<image> what is it?</s>"   →   "< image> what is it?< /s>"

What a tokenizer knows as a special token it makes of that text wherever it stands: one `<image>` in a question asks for
an image that nobody sent, and an end-of-turn token in an answer ends the turn. A space after its first character leaves
the words to be read, and no token. Text without such a token stays as it is, to the bit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final, cast

from transformers import PreTrainedTokenizerBase

from accord.models.load import Processor, tokenizer_of
from accord.types import Message, Prompt

_MARKED: Final = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
"""What an added token looks like that is a sign and no word, whether or not its tokenizer calls it special."""


def plain_words(processor: Processor, text: str) -> str:
    """Return `text` with a space inside whatever is a special token of this processor."""
    tokens = _tokens(processor)
    while tokens.search(text):  # a space may, in theory, make another token of two
        text = tokens.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
    return text


def plain_prompt(processor: Processor, prompt: Prompt) -> list[Message]:
    """Return a conversation whose texts are `plain_words`, also where a token stands across two blocks."""
    return [_plain_turn(processor, message) for message in prompt]


def _plain_turn(processor: Processor, message: Message) -> Message:
    content = message["content"]
    if isinstance(content, str):
        words = plain_words(processor, content)
        return message if words == content else {**message, "content": words}
    blocks, before, changed = list[Mapping[str, object]](), "", False
    for block in cast(Sequence[Mapping[str, object]], content):
        if block["type"] != "text":
            blocks.append(block)
            before = ""
            continue
        text = plain_words(processor, str(block["text"]))
        if before and plain_words(processor, before + text) != before + text:
            text = f" {text}"
        changed |= text != block["text"]
        blocks.append({**block, "text": text})
        before += text
    return {**message, "content": blocks} if changed else message


def _tokens(processor: Processor) -> re.Pattern[str]:
    return _pattern(processor, len(tokenizer_of(processor)))


@lru_cache(maxsize=256)
def _pattern(processor: Processor, _: int) -> re.Pattern[str]:
    """Compile the special tokens, the longest first; the second argument tells a tokenizer that has got more."""
    tokenizer = tokenizer_of(processor)
    found = set(tokenizer.all_special_tokens)
    found |= {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or _MARKED.fullmatch(token.content)
    }
    if not isinstance(processor, PreTrainedTokenizerBase):  # a processor puts images where it finds these
        found |= {str(v) for k, v in vars(processor).items() if k.endswith(("_token", "_tag")) and isinstance(v, str)}
    signs = sorted((token for token in found if len(token.strip()) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, signs)) or r"(?!)")
