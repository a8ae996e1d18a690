"""Which tensor of a checkpoint becomes which parameter of the model, as transformers has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    rename_source_key,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from manylora_server.core.errors import InvalidRequestError
from manylora_server.model.deferred_compiler import compiler_deferred


class Naming:
    """The model that a ``config.json`` describes, without memory for its weights, and its names.

    transformers loads some checkpoints under other names than they have there, and puts some
    parameters together of several tensors (the experts of a mixture).
    """

    def __init__(self, config: Mapping[str, Any], folder: Path) -> None:
        """Raises ``InvalidRequestError`` for a configuration of no causal language model."""
        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        try:
            with compiler_deferred(), torch.device("meta"):
                hf_config = CONFIG_MAPPING[plain["model_type"]].from_dict(plain)
                self.model: Any = AutoModelForCausalLM.from_config(hf_config)
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise InvalidRequestError(
                f"MODEL: config.json in {folder} describes no causal language model that "
                f"transformers knows: {error}",
                param="model",
            ) from error
        self.parameters: dict[str, torch.Tensor] = dict(
            self.model.named_parameters(remove_duplicate=False)
        )
        self._state = self.model.state_dict()
        transforms = get_model_conversion_mapping(self.model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]

    def parameter_of(self, key: str) -> tuple[str, bool]:
        """Return what tensor ``key`` is loaded into, and whether it is as it is, by itself."""
        name, pattern = rename_source_key(
            key, self._renamings, self._converters, self.model.base_model_prefix, self._state
        )
        return str(name), pattern is None

    def key_of(self, parameter: str) -> str:
        """Return the name under which a new checkpoint may hold ``parameter``."""
        back = [transform.reverse_transform() for transform in reversed(self._renamings)]
        renamed = str(apply_renamings(parameter, back))
        # Only if a loader finds its way back from there.
        return renamed if self.parameter_of(renamed) == (parameter, True) else parameter
