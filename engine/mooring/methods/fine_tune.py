"""Plain fine-tuning: encoder and a new head, cross-entropy, nothing that holds the encoder back."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel

from mooring.config.method_settings import FineTuneSettings
from mooring.methods.base import Method, Needs


class FineTune(Method):
    """``L = mean_i CE(W f(x_i) + b, y_i)`` over all parameters."""

    Config: ClassVar[type[BaseModel]] = FineTuneSettings
    name: ClassVar[str] = "fine_tune"
    needs: ClassVar[Needs] = Needs(encoder_in_parts=True)
