"""Write code that loads an export without this program. On the machine of the export, the code runs unchanged."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from datamodules.contract import ImageModel, TextModel
from modules.base import AdaptedModule

if TYPE_CHECKING:  # a run on text imports no timm
    from modules.image_classification import ImageClassifier

LOCAL = "local-dir:"  # timm's prefix for a local directory


Code = tuple[list[str], list[str], list[str]]  # Imports, variables that a reader sets, and the code that predicts.


class Loader(Protocol):
    """A function that returns the code or the command for loading an export.

    Args:
        place: Directory of the export, or its name on the hub.
        shared: True for other readers: local paths are cut to their last part.
    """

    def __call__(self, place: str, shared: bool = False) -> str:
        """Return the code or the command."""


AUTO_CLASSES = {  # by PEFT's name of the task
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
}


def is_timm(module: AdaptedModule) -> bool:
    """Return True if a module's backbone is timm's, and False for one of transformers."""
    return isinstance(module, ImageModel)


def merged_transformers_loader(module: AdaptedModule) -> Loader:
    """Return the loader of a directory that transformers reads: code that loads the model and predicts for a text."""
    model = f"model = transformers.{type(module.backbone).__name__}.from_pretrained(MODEL)"
    tokenizer = "tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)"
    imports, text, code = _text_code(module)

    def load(place: str, shared: bool = False) -> str:
        return _program(["transformers", *imports], f"MODEL = {place!r}", *text, "", model, tokenizer, *code)

    return load


def _text_code(module: AdaptedModule, generation: Mapping[str, Any] | None = None) -> Code:
    """Return imports, the variable of a text, and the code that prints the prediction for the text.

    A decoder without a prompt template, such as one for multiple choice, gets no such code.

    Args:
        module: A module of texts.
        generation: Arguments of `generate` that the loaded model does not know.
    """
    generate = f"tokens = {_call('model.generate', _Expression('**inputs'), **(generation or {}))}"
    if module.class_names is not None:
        answer = ['print(f"{logits[0]:.5g}")  # in the units of the labels']
        if module.class_names:
            answer = [
                "probabilities = logits.softmax(-1)",
                'print(model.config.id2label[int(probabilities.argmax())], f"{probabilities.max():.3f}")',
            ]
        code = [
            'inputs = tokenizer(*TEXTS, truncation=True, return_tensors="pt")',
            "with torch.inference_mode():",
            "    logits = model(**inputs).logits[0].float()",
        ]
        text = ["TEXTS = ['Write a text here.']  # Set a text here, or the two texts of a pair."]
        return ["torch"], text, [*code, *answer]
    if module.peft_task == "SEQ_2_SEQ_LM":
        text = ["TEXT = 'Write a text here.'  # Set a text here. Begin with data.source_prefix, if the run has one."]
        code = ['inputs = tokenizer(TEXT, truncation=True, return_tensors="pt")', generate]
        return [], text, [*code, "print(tokenizer.decode(tokens[0], skip_special_tokens=True))"]
    if module.hparams.get("prompt_template") is None:
        return [], [], []
    code = [
        "inputs = tokenizer.apply_chat_template(",
        '    MESSAGES, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ")",
        generate,
        'print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return [], ["MESSAGES = [{'role': 'user', 'content': 'Write a message here.'}]  # Set a message here."], code


def _generation_keys(module: AdaptedModule) -> dict[str, Any]:
    """Return the arguments of `generate` that the run set; empty for classifiers.

    An encoder-decoder has its special tokens from the backbone. A decoder's end tokens come from its template too.
    """
    if module.class_names is not None:
        return {}
    left_out = "_token_id" if module.peft_task == "SEQ_2_SEQ_LM" else "bos_token_id"
    keys = cast(Any, module.backbone).generation_config.to_diff_dict().items()
    return {key: value for key, value in keys if key != "transformers_version" and not key.endswith(left_out)}


def merged_timm_loader(module: ImageClassifier) -> Loader:
    """Return the loader of a directory that timm reads: code that loads the model and classifies an image file."""
    imports, image, code = _image_code(module)

    def load(place: str, shared: bool = False) -> str:
        model = f"model = timm.create_model({f'{LOCAL}{place}'!r}, pretrained=True).eval()"
        labels = 'LABELS = model.pretrained_cfg["label_names"]'
        return _program(["timm", *imports], *image, "", model, labels, *code)

    return load


def _image_code(module: ImageClassifier) -> Code:
    """Return imports, the variable of an image file, and the code that prepares and classifies the image."""
    transform = _call("timm.data.create_transform", **module.preprocessing)
    code = [
        f"transform = {transform}",
        'image = transform(PIL.ImageOps.exif_transpose(PIL.Image.open(IMAGE)).convert("RGB"))',
        "with torch.inference_mode():",
        "    probabilities = model(image[None]).softmax(-1)[0]",
        'print(LABELS[probabilities.argmax()], f"{probabilities.max():.3f}")',
    ]
    return ["PIL.Image", "PIL.ImageOps", "torch"], ["IMAGE = 'photo.jpg'  # Set the path of an image here."], code


def peft_loader(module: AdaptedModule) -> Loader:
    """Return the loader of a PEFT directory: code that builds the run's frozen backbone and adds the adapter.

    The code also predicts for an image file or a text.

    The code begins with variables for the names that a reader may have to change. A backbone with `weights: none` is
    drawn again from `torch.initial_seed()`, so seed the process with the run's seed before the call.

    A comment has the call of PEFT's auto class. That class reads the backbone's name from adapter_config.json, but
    not the names of the labels.
    """
    imports, lines = _timm_base(cast("ImageClassifier", module)) if is_timm(module) else _transformers_base(module)
    if module.class_names == [] and module.backbone_dtype != torch.float32:
        lines.append("base = base.float()  # Frozen weights as in training. The head of a regression needs float32.")
    code = [*lines, "model = peft.PeftModel.from_pretrained(base, ADAPTER)"]
    prediction: Code = [], [], []
    if is_timm(module):
        prediction = _image_code(cast("ImageClassifier", module))
    elif isinstance(module, TextModel):
        code.append("tokenizer = transformers.AutoTokenizer.from_pretrained(ADAPTER)")
        prediction = _text_code(module, _generation_keys(module))
    more_imports, variables, prediction_code = prediction
    imports, code = [*imports, *more_imports], [*code, *prediction_code, *_auto_call(module)]
    sources = {"BACKBONE": _source(module)[0]}
    if (weights := module.hparams["weights"]) not in ("pretrained", "none"):
        sources["WEIGHTS"] = absolute_name(weights)
    labels = [f"LABELS = {module.class_names!r}"] if module.class_names else []

    def load(place: str, shared: bool = False) -> str:
        names = [f"ADAPTER = {place!r}", *(_assignment(name, path, shared) for name, path in sources.items())]
        names += [*variables, *labels]
        return _program(["peft", *imports], *names, "", *code)

    return load


def _source(module: AdaptedModule) -> tuple[str, dict[str, str]]:
    """Return the backbone's name, repository or directory, and the arguments that select its file."""
    name = absolute_name(module.hparams["backbone"])
    if is_timm(module):
        return name, {}
    from modules.backbones.gguf import repository_and_file

    return repository_and_file(name)


def _assignment(variable: str, name: str, shared: bool) -> str:
    """Return the line that assigns a source of weights. A shared local path gets a comment to set the reader's path."""
    if not (shared and is_local(name)):
        return f"{variable} = {name!r}"
    kind = "backbone was" if variable == "BACKBONE" else "weights were"
    return f"{variable} = {short_name(name)!r}  # The {kind} read from a local path: set its path here."


def _program(imports: Sequence[str], *lines: str) -> str:
    return "\n".join([*(f"import {name}" for name in sorted({*imports})), "", *lines])


def _call(function: str, *positional: Any, **keys: Any) -> str:
    arguments = [*(repr(value) for value in positional), *(f"{key}={value!r}" for key, value in keys.items())]
    return f"{function}({', '.join(arguments)})"


class _Expression(str):
    """Code that `_call` inserts without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


# variables of the printed code
ADAPTER, BACKBONE, WEIGHTS = _Expression("ADAPTER"), _Expression("BACKBONE"), _Expression("WEIGHTS")
BASE, NATIVE_STATE = _Expression("base"), _Expression("native.state_dict()")


def absolute_name(name: str) -> str:
    """Return an existing path as an absolute path, also after timm's `local-dir:`; return any other name unchanged."""
    path = name.removeprefix(LOCAL)
    return name.removesuffix(path) + os.path.abspath(path) if os.path.exists(path) else name


def is_local(name: str) -> bool:
    """Return True for an absolute path, also after timm's `local-dir:`."""
    return os.path.isabs(name.removeprefix(LOCAL))


def short_name(name: str) -> str:
    """Return the last part of an absolute path; return any other name unchanged."""
    path = name.removeprefix(LOCAL)
    return name.removesuffix(path) + Path(path).name if is_local(name) else name


# ----------------------------------------------------------------------------------------------------------------- timm


def _timm_base(module: ImageClassifier) -> tuple[list[str], list[str]]:
    from timm.models import get_model_args

    from modules.backbones.timm_backbone import CONVERSION

    assert module.class_names is not None  # a checkpoint has them
    weights, classes = module.hparams["weights"], len(module.class_names)
    arguments = {key: value for key, value in get_model_args(module.backbone).items() if key != "num_classes"}
    imports, after = ["timm"], []
    if weights == "none":  # the run draws the backbone without a head, so a head here would change the weights
        imports.append("torch")
        lines = [f"torch.manual_seed({torch.initial_seed()})"]
        lines.append(f"base = {_call('timm.create_model', BACKBONE, pretrained=False, num_classes=0, **arguments)}")
        after = [f"base.reset_classifier({classes})"]
    else:
        if weights != "pretrained":  # timm loads and resizes this file like its own weights
            overlay = {"file": WEIGHTS, "custom_load": False, "num_classes": 0, "source": "timm"}
            arguments["pretrained_cfg_overlay"] = overlay
        lines = [f"base = {_call('timm.create_model', BACKBONE, pretrained=True, num_classes=classes, **arguments)}"]
        if "img_size" in arguments and "dinov2" in module.hparams["backbone"]:
            family = type(module.backbone).__module__
            native = {key: value for key, value in arguments.items() if key != "img_size"}
            resized = {key: value for key, value in arguments.items() if key != "pretrained_cfg_overlay"}
            convert = _call(f"{family}.checkpoint_filter_fn", NATIVE_STATE, BASE, **CONVERSION["dinov2"])
            imports.append(family)
            lines = [
                "# Positions are resized without antialiasing, as in training. timm itself resizes with antialiasing.",
                f"native = {_call('timm.create_model', BACKBONE, pretrained=True, num_classes=classes, **native)}",
                f"base = {_call('timm.create_model', BACKBONE, num_classes=classes, **resized)}",
                f"base.load_state_dict({convert})",
            ]
    if module.backbone_dtype == torch.bfloat16:
        after.append("base = base.bfloat16().float()  # frozen weights rounded as in training")
    return imports, [*lines, *after]


# --------------------------------------------------------------------------------------------------------- transformers


def _transformers_base(module: AdaptedModule) -> tuple[list[str], list[str]]:
    backbone: Any = module.backbone
    weights = module.hparams["weights"]
    _, file = _source(module)
    keys = _config_changes(module) | file
    dtype = str(module.backbone_dtype).removeprefix("torch.")
    library_class = f"transformers.{type(backbone).__name__}"
    if weights == "none":
        return _drawn_base(module, keys)
    if weights != "pretrained":
        config = _Expression(_call("transformers.AutoConfig.from_pretrained", BACKBONE, **keys))
        state = _Expression(_call("safetensors.torch.load_file", WEIGHTS))
        options = {"config": config, "state_dict": state, "dtype": dtype, **_head_options(module)}
        lines = [f"base = {_call(f'{library_class}.from_pretrained', None, **options)}"]
        return ["safetensors.torch", "transformers"], lines
    if file:
        keys["quantization_config"] = _Expression("transformers.GgufConfig(dequantize=True)")
    options = {**keys, "dtype": dtype, **_head_options(module)}
    return ["transformers"], [f"base = {_call(f'{library_class}.from_pretrained', BACKBONE, **options)}"]


def _auto_call(module: AdaptedModule) -> list[str]:
    """Return a comment with the call of PEFT's auto class, if the backbone has one and its name says all of it."""
    if not isinstance(module, TextModel) or module.hparams["weights"] != "pretrained" or _source(module)[1]:
        return []
    auto_class = AUTO_CLASSES[str(module.peft_task)].replace("Auto", "peft.AutoPeft")
    dtype = torch.float32 if module.class_names == [] else module.backbone_dtype
    options = _config_changes(module) | {"dtype": str(dtype).removeprefix("torch.")}
    call = _call(f"{auto_class}.from_pretrained", ADAPTER, **options, **_head_options(module))
    return ["", "# In one line, where PEFT finds the backbone that adapter_config.json names:", f"# model = {call}"]


def _config_changes(module: AdaptedModule) -> dict[str, Any]:
    """Return the configuration keys that differ from the backbone's repository: `backbone_args`, classes, padding."""
    changes: dict[str, Any] = dict(module.hparams.get("backbone_args") or {})
    if module.class_names is not None:
        changes |= _label_keys(module)
        changes["pad_token_id"] = cast(Any, module.backbone).config.pad_token_id  # decoders classify the last token
    return changes


def _label_keys(module: AdaptedModule) -> dict[str, Any]:
    """Return transformers' configuration keys for the classes: their names, or one output for regression."""
    if not module.class_names:
        return {"num_labels": 1}
    names = {"id2label": "dict(enumerate(LABELS))", "label2id": "{name: i for i, name in enumerate(LABELS)}"}
    return {key: _Expression(value) for key, value in names.items()}


def _head_options(module: AdaptedModule) -> dict[str, bool]:
    """Return the option that replaces a loaded head if its number of classes differs."""
    return {"ignore_mismatched_sizes": True} if module.class_names is not None else {}


def _drawn_base(module: AdaptedModule, keys: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the code that draws the run's random backbone again, and then gives the head the data's classes."""
    labels = _label_keys(module) if module.class_names is not None else {}
    config_keys = {key: value for key, value in keys.items() if key not in labels}
    config = _Expression(_call("transformers.AutoConfig.from_pretrained", BACKBONE, **config_keys))
    drawn_in = torch.float32 if module.head_names else module.backbone_dtype
    auto_class = f"transformers.{AUTO_CLASSES[str(module.peft_task)]}"
    lines = [
        f"torch.manual_seed({torch.initial_seed()})",
        f"base = {_call(f'{auto_class}.from_config', config, dtype=_Expression(str(drawn_in)))}",
    ]
    for head in (name.removeprefix("backbone.") for name in module.head_names):
        for name, layer in module.backbone.get_submodule(head).named_modules(prefix=head):
            if isinstance(layer, torch.nn.Linear):
                sizes = _call("torch.nn.Linear", layer.in_features, layer.out_features, bias=layer.bias is not None)
                lines.append(f"base.set_submodule({name!r}, {sizes})")
    lines += [f"base.config.{key} = {value!r}" for key, value in labels.items()]
    if drawn_in != module.backbone_dtype:
        lines.append(f"base = base.to({module.backbone_dtype})")
    return ["torch", "transformers"], lines
