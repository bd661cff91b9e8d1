"""The exceptions a user of Accord can meet; each message names what was wrong, the value seen, and the remedy.

    AccordError
    ├── DataError         questions, images, preference pairs
    │   └── ImageError    one image: missing, corrupt, too large, or of a refused format
    ├── RecipeError       a recipe or a command-line value
    ├── CheckpointError   a model folder that is absent, incomplete or of the wrong kind
    ├── RunError          a run folder: exists, is locked, cannot be written
    ├── QuorumError       too few sites answered, and none is to be waited for
    └── ReplyError        a site's reply that must not be used

A site that is late or silent is not an exception: it is an `accord.federation.messages.Absence`.
"""

import math
import unicodedata
import warnings
from functools import cache


class AccordError(Exception):
    """Base of every error that Accord raises on purpose; the command line prints it without a traceback."""


class DataError(AccordError):
    """Questions, images or preference pairs are not what they must be."""


class ImageError(DataError):
    """One image is missing, corrupt, too large, or of a refused format."""


class RecipeError(AccordError):
    """A recipe or a command-line value is wrong."""


class CheckpointError(AccordError):
    """A model folder is absent, incomplete or of the wrong kind."""


class RunError(AccordError):
    """A run folder exists already, is in use, or cannot be written."""


class QuorumError(AccordError):
    """Too few sites answered a step's questions, and those that did not would not come back by waiting."""


class ReplyError(AccordError):
    """A site's reply failed validation and must not be used."""


class DataWarning(UserWarning):
    """Some rows were left out, or done another way; the message says which, and why."""


@cache
def warn_once(message: str) -> None:
    """Warn, the first time that this process has something to say."""
    warnings.warn(message, DataWarning, stacklevel=3)


def check_least(settings: object, **least: float) -> None:
    """Refuse settings below their least value, and infinite ones; NaN is below every value.

    Raises:
        RecipeError: names the setting, its value and the least.
    """
    for name, minimum in least.items():
        value = getattr(settings, name)
        if not value >= minimum:
            raise RecipeError(f"{name} must be at least {minimum:g}, got {value}; raise {name}")
        if math.isinf(value):
            raise RecipeError(f"{name} must be finite, got {value}; lower {name}")


def check_positive(settings: object, *names: str) -> None:
    """Refuse settings that are not finite numbers above 0.

    Raises:
        RecipeError: names the setting and its value.
    """
    for name in names:
        if getattr(settings, name) == 0:
            raise RecipeError(f"{name} must be above 0, got {getattr(settings, name)}; raise {name}")
        check_least(settings, **{name: 0})


def printable(text: str) -> str:
    """Replace control characters: what a site or a data file says must neither steer a terminal nor forge a line.

    Spaces of other widths, which Python does not call printable, become plain ones.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if unicodedata.category(c) == "Zs" else "?" for c in text)
