"""The closed schema of Hugging Face ``config.json``: keys read, keys without effect, keys refused.

A family's own keys are in its file. The keys here are those that transformers 4 wrote into every
config (``PretrainedConfig.to_dict``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vitrail.errors import CheckpointError, show
from vitrail.zoo.fields import words

# Keys that make other libraries import code from the checkpoint. Refused at any depth.
CODE_KEYS = frozenset({"auto_map", "trust_remote_code", "custom_pipelines"})

# Read for every model type.
READ = frozenset({"architectures", "head_dim", "id2label", "model_type", "num_labels"})

# Keys that describe, train, generate or choose an implementation: no effect on the numbers.
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

# No effect at these values only.
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

DROPOUT = frozenset({"attention_probs_dropout_prob", "hidden_dropout_prob"})


@dataclass(frozen=True, slots=True)
class Schema:
    """The keys of a config class.

    ``defaults``: the keys that are read, with their defaults in transformers. ``inert``: keys
    without effect; ``inert_at``: keys without effect at these values.
    """

    defaults: Mapping[str, Any]
    inert: frozenset[str]
    inert_at: Mapping[str, tuple[object, ...]] = field(default_factory=dict)

    def check(self, values: Mapping[str, Any], location: str) -> None:
        """Raises CheckpointError for keys outside the schema: they may change anything."""
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
                f"{location}: unknown key {', '.join(map(repr, unknown[:20]))}: it may change the "
                f"network, and Vitrail does not know how; wanted only keys of this model type "
                "(take it out of the file if it does not describe the network)"
            )
        for key, allowed in {**INERT_AT, **self.inert_at}.items():
            if key in values and values[key] not in allowed:
                raise CheckpointError(
                    f"{location}: {key}: got {show(values[key])}, wanted "
                    f"{' or '.join(map(repr, allowed))}: anything else changes the network"
                )


def refuse_code(location: str, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a key that asks for code from the checkpoint, at any depth."""
    pending: list[object] = [config]
    while pending:
        value = pending.pop()
        if isinstance(value, Mapping):
            code_keys = CODE_KEYS.intersection(value)
            if code_keys:
                raise CheckpointError(
                    f"{location}: got {', '.join(sorted(code_keys))}, wanted a checkpoint without "
                    "code: Vitrail runs no code from checkpoints"
                )
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
