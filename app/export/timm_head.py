"""Build timm's model of a run, with the run's separate head as classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from datamodules.errors import UsageError
from modules.adapters import adapter_state, adapters_disabled
from modules.adapters.state import state_problems

if TYPE_CHECKING:  # a run on text imports no timm
    from modules.image_classification import ImageClassifier

TOLERANCE = 1e-3  # relative to the largest logit, in float32; a different pooling exceeds this by far


def timm_model(module: ImageClassifier, compare: bool = True) -> Any:
    """Return timm's model of the backbone, in float32 and without adapters, with the module's head as classifier.

    Args:
        module: The module. For `compare`, its backbone must be in float32 on the CPU. `compare` sets eval mode.
        compare: Check that the model computes the module's logits.

    Raises:
        UsageError: If the head does not fit, or the logits would differ.
    """
    import timm
    from timm.models import get_model_args

    backbone, head, class_names = module.backbone, module.head, module.class_names
    assert head is not None
    assert class_names is not None  # a checkpoint has them
    name = module.hparams["backbone"]
    refusal = f"--format: timm's model {name} does not fit the head of this run"
    try:
        arguments = {**get_model_args(backbone), "num_classes": len(class_names)}
        model: Any = timm.create_model(name, pretrained=False, **arguments)
    except Exception as error:  # an architecture's constructor can raise anything
        raise UsageError(f"{refusal} ({type(error).__name__}: {error}).") from error
    names = model.pretrained_cfg.get("classifier") or ()
    factors = adapter_state(backbone)
    state: dict[str, Tensor] = {key: t for key, t in backbone.state_dict().items() if key not in factors}
    for classifier in (names,) if isinstance(names, str) else names:
        state |= {f"{classifier}.{key}": tensor for key, tensor in head.state_dict().items()}
    if problems := state_problems(model.state_dict(), state):
        raise UsageError(f"{refusal}: {'; '.join(problems)}.")
    model.load_state_dict(state)
    if not compare:
        return model
    image = torch.randn(2, *module.preprocessing["input_size"], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), adapters_disabled(backbone):
        expected, logits = head(backbone.eval()(image)), model.eval()(image)
    if not (logits - expected).abs().max() <= TOLERANCE * expected.abs().max():
        raise UsageError(f"{refusal}: the logits would differ.")
    return model
