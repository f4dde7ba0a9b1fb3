"""Small local folders under the names that Accelerate's examples load from the hub, so that they run unchanged without a network.

transformers, datasets and evaluate all take a folder of the working directory before they ask the hub: `bert-base-cased` becomes a
two-layer BERT with random weights, without dropout, so that engines can be compared; its words are those of the rows that
Accelerate's own tests bring along, which are also what `nyu-mll/glue` is made of.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

CLASSIFIER = "bert-base-cased"
LANGUAGE_MODEL = "HuggingFaceTB/SmolLM-360M"
PAIRS = "nyu-mll/glue"
TEXTS = "Salesforce/wikitext"
METRIC = "glue"
ROWS = {"train": 40, "validation": 22, "test": 22}  # 22: the last batch is never whole
_LABELS = ("not_equivalent", "equivalent")
_LONGEST = 128
_CARD = """---
configs:
- config_name: {config}
  data_files:
  - {{split: train, path: train.jsonl}}
  - {{split: validation, path: validation.jsonl}}
  - {{split: test, path: test.jsonl}}
dataset_info:
  config_name: {config}
  features:
{features}---
"""
_PAIRS = """  - {name: idx, dtype: int32}
  - {name: sentence1, dtype: string}
  - {name: sentence2, dtype: string}
  - name: label
    dtype: {class_label: {names: {'0': not_equivalent, '1': equivalent}}}
"""
_TEXTS = "  - {name: text, dtype: string}\n"
_METRIC = '''"""Accuracy and F1 of two classes."""
import datasets
import evaluate


class Glue(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        pairs = list(zip(predictions, references, strict=True))
        hits = sum(p == r == 1 for p, r in pairs)
        wrong = sum(p != r for p, r in pairs)
        return {"accuracy": 1 - wrong / len(pairs), "f1": 2 * hits / (2 * hits + wrong) if hits else 0.0}
'''


def make_stand_ins(samples: Path, folder: Path) -> None:
    """Write all of them into `folder`. `samples` holds Accelerate's train.csv and dev.csv (label, sentence1, sentence2)."""
    rows = [row for file in ("train.csv", "dev.csv") for row in csv.DictReader((samples / file).open(newline=""))]
    _write_pairs(rows, folder / PAIRS)
    (folder / METRIC).mkdir(exist_ok=True)
    (folder / METRIC / "glue.py").write_text(_METRIC)
    texts = [row[name] for row in rows for name in ("sentence1", "sentence2")]
    _write_texts(texts, folder / TEXTS)
    _write_classifier(texts, folder / CLASSIFIER)
    _write_language_model(texts, folder / LANGUAGE_MODEL)


def _write_pairs(rows: list[dict[str, str]], folder: Path) -> None:
    draw = random.Random(0)
    splits = {split: [draw.choice(rows) for _ in range(count)] for split, count in ROWS.items()}
    made = {
        split: [{**row, "idx": index, "label": _LABELS.index(row["label"])} for index, row in enumerate(drawn)]
        for split, drawn in splits.items()
    }
    _write_dataset(folder, _CARD.format(config="mrpc", features=_PAIRS), made)


def _write_texts(texts: list[str], folder: Path) -> None:
    """Most lines are empty, as in the original; the examples take the first 500 of "train" and leave the empty ones out."""
    lines = [{"text": text} for text in texts]
    splits = {"train": lines + [{"text": ""}] * (500 - len(lines)), "validation": lines[:7], "test": lines[:7]}
    _write_dataset(folder, _CARD.format(config="wikitext-2-v1", features=_TEXTS), splits)


def _write_dataset(folder: Path, card: str, splits: Mapping[str, Sequence[Mapping[str, object]]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(card)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _tokenizer(texts: list[str], folder: Path, **special: str) -> int:
    """Write a tokenizer trained on the texts; the size of its vocabulary."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordPiece(unk_token=special["unk_token"]))
    made.normalizer = normalizers.BertNormalizer(lowercase=False)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=400, special_tokens=list(special.values())))
    if "cls_token" in special:
        cls, sep = special["cls_token"], special["sep_token"]
        ends = [(cls, made.token_to_id(cls)), (sep, made.token_to_id(sep))]
        made.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} $B:1 {sep}:1", special_tokens=ends
        )
    PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=_LONGEST, **special).save_pretrained(folder)
    return int(made.get_vocab_size())


def _write_classifier(texts: list[str], folder: Path) -> None:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    size = _tokenizer(texts, folder, **names)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=_LONGEST,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,  # wide enough for predictions that differ between sentences
    )
    BertForSequenceClassification(config).save_pretrained(folder)


def _write_language_model(texts: list[str], folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = _tokenizer(texts, folder, eos_token="<|endoftext|>", bos_token="<|im_start|>", unk_token="<unk>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        max_position_embeddings=_LONGEST,
        bos_token_id=1,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
