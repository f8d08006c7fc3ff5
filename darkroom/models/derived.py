"""A row for a pipeline class that the table does not know, read off the class. Its requests run, but share no batch.

What cannot be read off is left out: widths and layouts are not checked, and which arguments have no batch dimension is
not known, which is why nothing is batched.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from darkroom.families import PROMPT, Encoding, Family

_NEEDED = (
    PROMPT,
    "num_inference_steps",
    "guidance_scale",
    "generator",
    "output_type",
    "return_dict",
    "width",
    "height",
)
_DENOISERS = ("unet", "transformer")
_NEGATIVE = "negative_"


class NotDerivable(Exception):
    """The class lacks something that Darkroom needs; the message says what."""


@functools.cache
def derived_family(kind: type) -> Family:
    """The row of a pipeline class. Raises NotDerivable with what is missing."""
    call = tuple(inspect.signature(kind.__call__).parameters)
    missing = [name for name in _NEEDED if name not in call]
    if missing:
        raise NotDerivable(f"its call takes no {' and no '.join(missing)}")
    denoisers = tuple(name for name in inspect.signature(kind).parameters if name.startswith(_DENOISERS))
    if not denoisers:
        raise NotDerivable("it has no component named unet or transformer")
    encode = getattr(kind, "encode_prompt", None)
    if encode is None:
        raise NotDerivable("it has no encode_prompt")
    returns = tuple(name if name in call else None for name in _returned_names(encode))
    if PROMPT not in returns:
        raise NotDerivable(f"what its encode_prompt returns is not known to hold {PROMPT}")
    return Family(
        pipeline=kind.__name__,
        denoisers=denoisers,
        encodings=(Encoding(returns=returns),),
        masks="",
        latents="",
        classifier_free=any(name.startswith(_NEGATIVE) for name in returns if name),
        equal_lengths=False,
        is_batched=False,
    )


def _returned_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the variables that the function's last `return` gives back, in order."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    returns = sorted((node for node in ast.walk(tree) if isinstance(node, ast.Return)), key=lambda node: node.lineno)
    returned = [node.value for node in returns[-1:]]
    values = returned[0].elts if returned and isinstance(returned[0], ast.Tuple) else returned
    return tuple(value.id if isinstance(value, ast.Name) else "" for value in values)
