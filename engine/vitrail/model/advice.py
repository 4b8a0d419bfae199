"""Methods of torch.nn.Module on a `Model`: `eval` works, others say what to do instead."""

from typing import TYPE_CHECKING, Any, Self

_MOVE = "a Model stays on its device and in its dtype; vitrail.load(..., device=, dtype=) sets them"
_TRAIN = "a Model has no parameters to train or to edit; load the checkpoint with transformers"
_MODULE = "a Model is not a torch.nn.Module; Model.as_module gives a tower as a module"
ADVICE = {
    **dict.fromkeys(("to", "cuda", "cpu", "half", "float", "bfloat16", "double", "type"), _MOVE),
    **dict.fromkeys(("train", "requires_grad_", "parameters", "named_parameters"), _TRAIN),
    **dict.fromkeys(("state_dict", "load_state_dict", "zero_grad"), _TRAIN),
    **dict.fromkeys(("modules", "children", "named_modules", "register_forward_hook"), _MODULE),
}
"""Methods of torch.nn.Module that a Model lacks, and what to do instead."""


class ModuleAdvice:
    """A base of `Model`."""

    def eval(self) -> Self:
        """The model itself, which is always in evaluation mode (no dropout, no gradients)."""
        return self

    if not TYPE_CHECKING:  # a type checker reports unknown attributes by itself

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(f"Model.{name}: {ADVICE.get(name, 'there is no such attribute')}")
