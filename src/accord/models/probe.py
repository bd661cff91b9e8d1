"""Try a foreign chat template and a foreign tokenizer's patterns, in a process of their own that may die.

`accord.models.inspection` runs this file as a script with `python -I`: it gets JSON on standard input, prints why
something is refused, and ends with status 0. A process that ends otherwise has met its limit. It imports nothing of
Accord, and neither torch nor transformers, so that it starts in a fraction of a second.

Jinja's sandbox keeps a template from the interpreter, but bounds neither its time nor its memory: only one call of
`range` is limited, not loops within loops, a macro that calls itself, or a text that is doubled forty times. The
regular expressions of a tokenizer are matched by an engine that tries every way, which may be exponentially many.
"""

from __future__ import annotations

import itertools
import json
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

CPU_SECONDS = 1.0
MEMORY = 128 * 2**20
"""Bytes beyond what the process has when it begins to try; where there is no /proc, time alone is limited."""

MAX_PROMPT = 10**6
"""Characters that a template may make of a short conversation."""

_SHORT = [{"role": "user", "content": "What is it?"}]
_SEEN = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
_LONG = [{"role": "system", "content": "Be brief."}, *(20 * [*_SHORT, {"role": "assistant", "content": "A cat."}])]


class _Generation(jinja2.ext.Extension):
    """Know the tag `generation`, by which templates mark what the model says."""

    tags = {"generation"}  # noqa: RUF012  (Jinja reads it from the class)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return what stands within the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def try_template(source: str) -> str:
    """Return why a chat template is refused; empty where it is not. Without limits of its own."""

    def stop(message: str) -> str:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **_: json.dumps(value)
    environment.globals |= {"raise_exception": stop, "strftime_now": lambda _form: "2000-01-01"}
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as error:
        return f"is no template ({error})"
    for messages, ask in itertools.product((_SHORT, _SEEN, _LONG), (True, False)):
        length = 0
        try:
            for piece in template.generate(
                messages=messages, add_generation_prompt=ask, tools=None, bos_token="<s>", eos_token="</s>"
            ):
                length += len(piece)
                if length > MAX_PROMPT:
                    return f"makes more than {MAX_PROMPT:,} characters of a short conversation"
        except (jinja2.exceptions.SecurityError, RecursionError, OverflowError) as error:
            return f"does what no template may ({error})"
        except MemoryError:
            raise
        except Exception:  # a template may refuse a conversation, or need what is not here
            continue
    return ""


def try_pattern(pattern: str) -> str:
    """Return why a tokenizer's regular expression is refused; empty where it is not. Without limits of its own."""
    from tokenizers import Regex, pre_tokenizers

    try:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
    except Exception as error:  # whatever the engine says of what it cannot read
        return f"has a pattern that is no regular expression ({error})"
    for character in sorted({*"a0 \n.中", *pattern}):
        try:
            split.pre_tokenize_str(500 * character + "\x01")
        except BaseException as error:  # where the engine gives up it panics, which is no Exception
            return f"has a pattern that cannot be matched ({error})"
    return ""


def _try(templates: Sequence[str], patterns: Sequence[str]) -> str:
    """Return the first reason to refuse, under the limits; empty where there is none."""
    statistics = Path("/proc/self/statm")
    if statistics.is_file():
        used = int(statistics.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # nobody handles its signal, which ends the process
    try:
        found = itertools.chain(map(try_template, templates), map(try_pattern, patterns))
        return next(filter(None, found), "")
    except MemoryError:
        return f"takes more than {MEMORY >> 20} MiB for a short conversation"


if __name__ == "__main__":
    given = json.load(sys.stdin)
    if given["patterns"]:
        import tokenizers  # noqa: F401  (before the limits)
    json.dump(_try(given["templates"], given["patterns"]), sys.stdout)
