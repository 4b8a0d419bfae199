"""The closed schema of Hugging Face ``config.json``: keys read, keys without effect, keys refused.

Sources: the config classes of transformers (``configuration_{vit,clip,dinov2,...}.py``), and for
the keys that transformers 4 wrote into every config, its ``PretrainedConfig.to_dict``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vitrail.errors import CheckpointError, show
from vitrail.zoo.fields import words

# Keys that make other libraries import code from the checkpoint. Refused wherever they stand.
CODE_KEYS = frozenset({"auto_map", "trust_remote_code", "custom_pipelines"})

# Read whatever the model type.
READ = frozenset({"architectures", "head_dim", "id2label", "model_type", "num_labels"})

# Describing, training, generating, or choosing an implementation: no effect on the numbers.
INERT = words(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _experts_implementation _experts_implementation_internal _name_or_path _num_labels
    _output_attentions attn_implementation begin_suppress_tokens bad_words_ids bos_token_id
    chunk_size_feed_forward decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id experts_implementation
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing initializer_range label2id length_penalty max_length min_length
    name_or_path no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_word_embeddings
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16
    use_cache use_return_dict xla_device
    """
)

# Without effect at these values only.
INERT_AT: Mapping[str, tuple[object, ...]] = {
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False, None),
    "is_encoder_decoder": (False, None),
    "per_layer_config": (None, {}),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "tie_encoder_decoder": (False, None),
    "tie_last_hidden_states": (None,),
}

_DINOV2_BACKBONE = words(
    """
    _out_features _out_indices apply_layernorm drop_path_rate layerscale_value out_features
    out_indices reshape_hidden_states stage_names use_mask_token
    """
)
_DROPOUT = frozenset({"attention_probs_dropout_prob", "hidden_dropout_prob"})
_CLIP_TOWER = frozenset({"attention_dropout", "dropout", "initializer_factor"})


@dataclass(frozen=True, slots=True)
class Schema:
    """The keys of one config class: ``defaults`` of those read, and those without effect."""

    defaults: Mapping[str, Any]
    inert: frozenset[str]
    inert_at: Mapping[str, tuple[object, ...]] = field(default_factory=dict)

    def check(self, values: Mapping[str, Any], where: str) -> None:
        """Refuses the keys outside the schema, in one CheckpointError: they may change anything."""
        unknown = [
            key
            for key in values
            if key not in self.defaults
            and key not in READ
            and key not in self.inert
            and key not in INERT
            and key not in self.inert_at
            and key not in INERT_AT
        ]
        if unknown:
            raise CheckpointError(
                f"{where}: unknown key {', '.join(map(repr, unknown[:20]))}: it may change the "
                f"network, and Vitrail does not know how; wanted only keys of this model type "
                "(take it out of the file if it does not describe the network)"
            )
        for key, allowed in {**INERT_AT, **self.inert_at}.items():
            if key in values and values[key] not in allowed:
                raise CheckpointError(
                    f"{where}: {key}: got {show(values[key])}, wanted "
                    f"{' or '.join(map(repr, allowed))}: anything else changes the network"
                )


_DINOV2: Mapping[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 224,
    "num_channels": 3,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
}

# Defaults are those of transformers' config class of each model type.
SCHEMAS: Mapping[str, Schema] = {
    # ViTConfig
    "vit": Schema(
        {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "image_size": 224,
            "patch_size": 16,
            "num_channels": 3,
            "qkv_bias": True,
            "pooler_output_size": None,
            "pooler_act": "tanh",
        },
        _DROPOUT | {"encoder_stride"},
    ),
    # Dinov2Config
    "dinov2": Schema(
        {**_DINOV2, "patch_size": 14},
        _DROPOUT | _DINOV2_BACKBONE,
        {"interpolate_antialias": (False,), "interpolate_offset": (0,)},
    ),
    # Dinov2WithRegistersConfig
    "dinov2_with_registers": Schema(
        {**_DINOV2, "patch_size": 16, "num_register_tokens": 4},
        _DROPOUT | _DINOV2_BACKBONE,
        {"interpolate_antialias": (True,), "interpolate_offset": (0,)},
    ),
    # CLIPConfig
    "clip": Schema(
        {
            "text_config": None,
            "text_config_dict": None,
            "vision_config": None,
            "vision_config_dict": None,
            "projection_dim": 512,
        },
        frozenset({"initializer_factor", "logit_scale_init_value"}),
    ),
    # CLIPTextConfig
    "clip_text_model": Schema(
        {
            "vocab_size": 49408,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "projection_dim": 512,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "max_position_embeddings": 77,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "eos_token_id": 49407,
        },
        _CLIP_TOWER,
    ),
    # CLIPVisionConfig
    "clip_vision_model": Schema(
        {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "projection_dim": 512,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_channels": 3,
            "image_size": 224,
            "patch_size": 32,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
        _CLIP_TOWER,
    ),
}


def refuse_code(where: str, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a key that asks for code from the checkpoint, at any depth."""
    pending: list[object] = [config]
    while pending:
        value = pending.pop()
        if isinstance(value, Mapping):
            found = CODE_KEYS.intersection(value)
            if found:
                raise CheckpointError(
                    f"{where}: got {', '.join(sorted(found))}, wanted a checkpoint without code: "
                    f"Vitrail runs no code from checkpoints"
                )
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
