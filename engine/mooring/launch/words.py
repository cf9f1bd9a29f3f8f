"""A command's words as one word of letters, digits, ``-``, ``_`` and ``=``, and the module that runs them.

``python -m mooring.launch.words ENCODED`` runs the module and arguments that were encoded, in this process:
for launchers that hand a command line to a shell on another machine.
"""

from __future__ import annotations

import base64
import json
import runpy
import sys
from collections.abc import Sequence


def encode_words(words: Sequence[str]) -> str:
    return base64.urlsafe_b64encode(json.dumps(list(words)).encode()).decode()


def decode_words(encoded: str) -> list[str]:
    """The words that ``encode_words`` was given.

    Raises:
        ValueError: something else was given.
    """
    words = json.loads(base64.urlsafe_b64decode(encoded))
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise ValueError(f"expected a list of words, got {words!r}")
    return words


def main(arguments: Sequence[str]) -> None:
    module, *words = decode_words(arguments[-1])
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
