"""A local transformers text encoder: texts in, one vector each out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mooring.errors import DataError, require

_BATCH = 64


@torch.inference_mode()
def encode_texts(folder: Path, texts: Sequence[str]) -> Tensor:
    """One vector per text, [N, d] float32, not normalised.

    A CLIP-like model gives its projected text embedding, any other the mean over its last hidden states that
    are no padding. Only files of ``folder`` are read: safetensors, no code from it, no network.

    Args:
        folder: a transformers model folder (config.json, model.safetensors, tokenizer files).
        texts: prompts.

    Raises:
        DataError: the folder holds no such model.
    """
    transformers = require("transformers", needed_for="class-name features (method.text)")
    transformers.utils.logging.disable_progress_bar()  # loading a small local model is no news
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        projects = str(config.model_type).startswith(("clip", "siglip"))
        loader = (
            transformers.CLIPTextModelWithProjection
            if config.model_type.startswith("clip")
            else transformers.AutoModel
        )
        model = loader.from_pretrained(folder, use_safetensors=True, **options).eval().float()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, ImportError) as err:
        reason = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise DataError(
            f"method.text: {folder} is not a transformers text encoder with safetensors weights ({reason})"
        ) from err
    rows = []
    for start in range(0, len(texts), _BATCH):
        tokens = tokenizer(
            list(texts[start : start + _BATCH]), padding=True, truncation=True, return_tensors="pt"
        )
        if projects and hasattr(model, "get_text_features"):
            rows.append(model.get_text_features(**tokens))
            continue
        output = model(**tokens)
        if projects:
            rows.append(output.text_embeds)
            continue
        mask = tokens["attention_mask"][:, :, None].float()
        rows.append((output.last_hidden_state * mask).sum(1) / mask.sum(1).clamp_min(1))
    return torch.cat([row.clone() for row in rows]).float()
