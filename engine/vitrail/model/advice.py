"""Advice for code that takes a `Model` for a torch.nn.Module."""

from __future__ import annotations

_MOVE = "a Model stays on its device and in its dtype; vitrail.load(..., device=, dtype=) sets them"
_WEIGHTS = (
    "a Model holds packed weights without gradients, not parameters; load the checkpoint with "
    "transformers to train or to edit it"
)

ADVICE = {
    **dict.fromkeys(("to", "cuda", "cpu", "half", "float", "bfloat16", "double", "type"), _MOVE),
    **dict.fromkeys(
        (
            "train",
            "requires_grad_",
            "zero_grad",
            "parameters",
            "named_parameters",
            "buffers",
            "named_buffers",
            "state_dict",
            "load_state_dict",
        ),
        _WEIGHTS,
    ),
    **dict.fromkeys(
        ("modules", "children", "named_modules", "register_forward_hook"),
        "a Model is no torch.nn.Module; as_module() gives a tower as one",
    ),
}
"""Methods of torch.nn.Module that a Model lacks, and what to do instead."""
