"""What each field of a PEFT configuration means to the compiler. Imports neither torch nor peft.

One entry for every field of PEFT 0.21's ``LoraConfig`` and ``AdaLoraConfig`` (a test holds the
table against the installed version). ``USED`` fields enter the computation or say which modules it
is about; ``IGNORED`` ones cannot change what a trained adapter computes; ``REFUSED`` ones change it
in a way the canonical algebra does not express, so any value but "off" is an error that names them.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

from manylora_store.errors import AdapterUnsupportedError


class Decision(enum.Enum):
    """What the compiler does with a field."""

    USED = "used"
    IGNORED = "ignored"
    REFUSED = "refused"


FIELDS: Mapping[str, tuple[Decision, str]] = {
    "peft_type": (Decision.USED, "selects the algebra"),
    "r": (Decision.USED, "rank"),
    "init_r": (Decision.USED, "AdaLoRA: rank at creation and divisor of the scaling"),
    "lora_alpha": (Decision.USED, "scaling"),
    "rank_pattern": (Decision.USED, "LoRA: rank by module; AdaLoRA: which ranks were kept"),
    "alpha_pattern": (Decision.USED, "scaling by module"),
    "use_rslora": (Decision.USED, "scaling is alpha / sqrt(r)"),
    "use_dora": (Decision.USED, "output scale from the magnitude vector"),
    "lora_bias": (Decision.USED, "lora_B has a bias"),
    "bias": (Decision.USED, "base biases come with the adapter"),
    "target_modules": (Decision.USED, "modules adapted"),
    "exclude_modules": (Decision.USED, "modules left alone"),
    "layers_to_transform": (Decision.USED, "modules adapted, by layer index"),
    "layers_pattern": (Decision.USED, "where the layer index stands in a module's name"),
    "modules_to_save": (Decision.USED, "modules replaced outright"),
    "ensure_weight_tying": (Decision.USED, "the output head shares the embedding's adapter"),
    "init_lora_weights": (Decision.USED, "some initialisations rewrite the base's weights"),
    "base_model_name_or_path": (Decision.USED, "shown in the adapter's record"),
    "fan_in_fan_out": (Decision.IGNORED, "PEFT itself overrides it by the module's class"),
    "lora_dropout": (Decision.IGNORED, "training only"),
    "loftq_config": (Decision.IGNORED, "initialisation; init_lora_weights decides"),
    "eva_config": (Decision.IGNORED, "initialisation of A only"),
    "corda_config": (Decision.IGNORED, "initialisation; init_lora_weights decides"),
    "lora_ga_config": (Decision.IGNORED, "initialisation; init_lora_weights decides"),
    "runtime_config": (Decision.IGNORED, "where the computation runs; PEFT drops it on load"),
    "qalora_group_size": (Decision.IGNORED, "only read with use_qalora"),
    "megatron_core": (Decision.IGNORED, "only read with megatron_config"),
    "auto_mapping": (Decision.IGNORED, "informational"),
    "inference_mode": (Decision.IGNORED, "training only"),
    "peft_version": (Decision.IGNORED, "informational"),
    "revision": (Decision.IGNORED, "informational"),
    "task_type": (Decision.IGNORED, "informational"),
    "target_r": (Decision.IGNORED, "AdaLoRA budget; its outcome is rank_pattern"),
    "tinit": (Decision.IGNORED, "AdaLoRA training schedule"),
    "tfinal": (Decision.IGNORED, "AdaLoRA training schedule"),
    "deltaT": (Decision.IGNORED, "AdaLoRA training schedule"),
    "total_step": (Decision.IGNORED, "AdaLoRA training schedule"),
    "beta1": (Decision.IGNORED, "AdaLoRA importance score"),
    "beta2": (Decision.IGNORED, "AdaLoRA importance score"),
    "orth_reg_weight": (Decision.IGNORED, "AdaLoRA training loss"),
    "merge_weights": (Decision.IGNORED, "PEFT before 0.4: merge when evaluating; same result"),
    "trainable_token_indices": (Decision.REFUSED, "replaces single embedding rows"),
    "layer_replication": (Decision.REFUSED, "repeats layers of the base"),
    "target_parameters": (Decision.REFUSED, "adapts bare parameters (experts), not modules"),
    "use_qalora": (Decision.REFUSED, "pools the input before lora_A"),
    "use_bdlora": (Decision.REFUSED, "factors are stored block-diagonal"),
    "alora_invocation_tokens": (Decision.REFUSED, "applies to a part of the sequence only"),
    "arrow_config": (Decision.REFUSED, "routes tokens between adapters"),
    "kasa_config": (Decision.REFUSED, "truncates the base's weights"),
    "monteclora_config": (Decision.REFUSED, "samples the adapter's weights"),
    "velora_config": (Decision.REFUSED, "stores projections of its own beside lora_A and lora_B"),
    "megatron_config": (Decision.REFUSED, "adapts Megatron's parallel layers"),
}

SAFE_INITIALISATIONS = frozenset({"true", "false", "gaussian", "eva", "orthogonal", "mica"})
"""Values of ``init_lora_weights``, in lower case, that leave the base's weights alone."""

REWRITING_INITIALISATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values (by prefix) under which the adapter was trained on top of a base that PEFT rewrote.

On load ``PeftModel.from_pretrained`` runs the initialisation again and subtracts its factors from
the base (PiSSA, OLoRA, LoftQ), raises because its statistics are gone (CorDA), or forgets that the
base was changed (LoRA-GA). Nothing of it is in the file, ``pissa_niter_N`` is random, and the base
here is shared and read-only, so the result could not be PEFT's. PEFT's own conversion
(``save_pretrained(path_initial_model_for_weight_conversion=...)``) writes ``true`` instead.
"""


def refuse_unsupported_fields(raw: Mapping[str, Any]) -> None:
    """Check every key of ``raw`` against the table.

    Raises:
        AdapterUnsupportedError: a ``REFUSED`` field is on, a key is unknown and not empty, or
            ``init_lora_weights`` names an initialisation that rewrites the base or is unknown.
    """
    for key in sorted(raw):
        value = raw[key]
        if key not in FIELDS:
            if value:
                raise AdapterUnsupportedError(
                    f"adapter_config.json: unknown field {key!r} = {value!r}; this server follows"
                    " PEFT 0.21 and cannot tell what the field changes"
                )
            continue
        decision, why = FIELDS[key]
        if decision is Decision.REFUSED and value not in (None, False, []):
            raise AdapterUnsupportedError(
                f"adapter_config.json: {key} = {value!r} is not supported: {why}"
            )
    _refuse_rewriting_initialisation(raw.get("init_lora_weights", True))


def _refuse_rewriting_initialisation(value: Any) -> None:
    name = str(value).lower()
    if name in SAFE_INITIALISATIONS or value is None:
        return
    if name.startswith(REWRITING_INITIALISATIONS):
        raise AdapterUnsupportedError(
            f"adapter_config.json: init_lora_weights = {value!r} is not supported: the adapter was"
            " trained on a rewritten base; save it with"
            " save_pretrained(path_initial_model_for_weight_conversion=...), which converts it to"
            " plain LoRA"
        )
    raise AdapterUnsupportedError(
        f"adapter_config.json: init_lora_weights = {value!r} is unknown; known are"
        f" {', '.join(sorted(SAFE_INITIALISATIONS))}"
    )
