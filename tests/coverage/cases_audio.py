"""Audio models of transformers with random weights: speech recognition (CTC and attention), classification, representation, codecs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from architecture_case import Batch, Case, own_loss
from cases_vision import made

CONVOLUTIONS: dict[str, Any] = {
    "conv_dim": (16, 16, 16), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2), "num_feat_extract_layers": 3,
}  # fmt: skip
LAYERS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
WAVES: dict[str, Any] = LAYERS | CONVOLUTIONS | {
    "vocab_size": 20, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "layerdrop": 0.0, "apply_spec_augment": False,
    "num_adapter_layers": 1, "ctc_loss_reduction": "mean", "ctc_zero_infinity": True, "classifier_proj_size": 16, "num_labels": 5,
}  # fmt: skip
NO_MASKING = "apply_spec_augment=False: its masks are drawn by numpy in forward, and polyaccel refuses that"


def transcribed(length: int = 1600, vocab: int = 20) -> Callable[[int], Batch]:
    """Sound waves (2, length) with the text of each; the second is shorter."""

    def batch(step: int) -> Batch:
        labels = torch.randint(1, vocab, (2, 6))
        labels[1, 4:] = -100
        return {"input_values": torch.randn(2, length), "labels": labels}

    return batch


def padded(step: int) -> Batch:
    """Sound waves of two lengths with their text."""
    batch = transcribed()(step)
    mask = torch.ones(2, 1600, dtype=torch.long)
    mask[1, 1200:] = 0
    return batch | {"attention_mask": mask, "input_values": batch["input_values"] * mask}


def classes(step: int) -> Batch:
    """Sound waves with a class each."""
    return {"input_values": torch.randn(2, 1600), "labels": torch.randint(0, 5, (2,))}


def waves(step: int) -> Batch:
    """Sound waves alone."""
    return {"input_values": torch.randn(2, 1600)}


def hidden(outputs: Any, batch: Batch) -> torch.Tensor:
    """Bring the last hidden state to 1."""
    return F.mse_loss(outputs.last_hidden_state, torch.ones_like(outputs.last_hidden_state))


def _case(
    name: str,
    build: Any,
    batch: Callable[[int], Batch],
    loss: Callable[[Any, Batch], torch.Tensor] = own_loss,
    note: str = "",
) -> Case:
    return Case(name, "audio", build, batch, loss, note)


def _features(step: int) -> Batch:
    return {"input_features": torch.randn(2, 60, 16), "labels": torch.randint(3, 50, (2, 8))}


CASES = (
    _case("wav2vec2 (CTC)", made("Wav2Vec2ForCTC", "Wav2Vec2Config", **WAVES), transcribed(), note=NO_MASKING),
    _case("wav2vec2 (CTC, padded)", made("Wav2Vec2ForCTC", "Wav2Vec2Config", **WAVES | {"feat_extract_norm": "layer"}), padded,
          note=NO_MASKING),
    _case("wav2vec2 (CTC, stable layer norm)", made("Wav2Vec2ForCTC", "Wav2Vec2Config", **WAVES, do_stable_layer_norm=True,
                                                    feat_extract_norm="layer", ), transcribed(), note=NO_MASKING),
    _case("wav2vec2 (classification)", made("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **WAVES), classes, note=NO_MASKING),
    _case("HuBERT (CTC)", made("HubertForCTC", "HubertConfig", **WAVES), transcribed(), note=NO_MASKING),
    _case("WavLM (CTC)", made("WavLMForCTC", "WavLMConfig", **WAVES), transcribed(), note=NO_MASKING),
    _case("UniSpeech (CTC)", made("UniSpeechForCTC", "UniSpeechConfig", **WAVES), transcribed(), note=NO_MASKING),
    _case("UniSpeech-SAT (classification)", made("UniSpeechSatForSequenceClassification", "UniSpeechSatConfig", **WAVES), classes,
          note=NO_MASKING),
    _case("Data2VecAudio (CTC)", made("Data2VecAudioForCTC", "Data2VecAudioConfig", **{k: v for k, v in WAVES.items()
          if k != "num_conv_pos_embeddings"}, num_conv_pos_embeddings=2, conv_pos_kernel_size=3), transcribed(), note=NO_MASKING),
    _case("SEW (CTC)", made("SEWForCTC", "SEWConfig", **WAVES, squeeze_factor=2), transcribed(), note=NO_MASKING),
    _case("SEW-D (CTC)", made("SEWDForCTC", "SEWDConfig", **WAVES, squeeze_factor=2, position_buckets=8, max_position_embeddings=64),
          transcribed(), note=NO_MASKING),
    _case("wav2vec2-conformer (CTC)", made("Wav2Vec2ConformerForCTC", "Wav2Vec2ConformerConfig", **WAVES, conv_depthwise_kernel_size=3,
                                           max_source_positions=200), transcribed(), note=NO_MASKING),
    _case("wav2vec2-BERT (CTC)", made("Wav2Vec2BertForCTC", "Wav2Vec2BertConfig", **LAYERS, vocab_size=20, feature_projection_input_dim=16,
                                      layerdrop=0.0, apply_spec_augment=False, conv_depthwise_kernel_size=3, ctc_zero_infinity=True),
          lambda step: {"input_features": torch.randn(2, 40, 16), "labels": torch.randint(1, 20, (2, 6))}, note=NO_MASKING),
    _case("Whisper", made("WhisperForConditionalGeneration", "WhisperConfig", d_model=32, encoder_layers=2, decoder_layers=2,
                          encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=60,
                          num_mel_bins=16, max_source_positions=30, max_target_positions=24, pad_token_id=0, bos_token_id=1,
                          eos_token_id=2, decoder_start_token_id=1),
          lambda step: {"input_features": torch.randn(2, 16, 60), "labels": torch.randint(3, 60, (2, 8))}),
    _case("Whisper (classification)", made("WhisperForAudioClassification", "WhisperConfig", d_model=32, encoder_layers=2,
                                           decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
                                           decoder_ffn_dim=64, vocab_size=60, num_mel_bins=16, max_source_positions=30,
                                           classifier_proj_size=16, num_labels=5, pad_token_id=0, bos_token_id=1, eos_token_id=2),
          lambda step: {"input_features": torch.randn(2, 16, 60), "labels": torch.randint(0, 5, (2,))}),
    _case("Speech2Text", made("Speech2TextForConditionalGeneration", "Speech2TextConfig", d_model=32, encoder_layers=2, decoder_layers=2,
                              encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=60,
                              input_feat_per_channel=16, conv_channels=16, num_conv_layers=2, conv_kernel_sizes=(3, 3),
                              max_source_positions=100, max_target_positions=50, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                              decoder_start_token_id=1), _features),
    _case("AST", made("ASTForAudioClassification", "ASTConfig", **LAYERS, patch_size=8, max_length=32, num_mel_bins=16, frequency_stride=8,
                      time_stride=8, num_labels=5),
          lambda step: {"input_values": torch.randn(2, 32, 16), "labels": torch.randint(0, 5, (2,))}),
    _case("SpeechT5 (recognition)", made("SpeechT5ForSpeechToText", "SpeechT5Config", **CONVOLUTIONS, hidden_size=32, encoder_layers=2,
                                         decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
                                         decoder_ffn_dim=64, vocab_size=40, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
                                         apply_spec_augment=False, encoder_layerdrop=0.0, decoder_layerdrop=0.0,
                                         encoder_max_relative_position=16),
          lambda step: {"input_values": torch.randn(2, 1600), "labels": torch.randint(3, 40, (2, 6))}, note=NO_MASKING),
    _case("EnCodec", made("EncodecModel", "EncodecConfig", audio_channels=1, num_filters=8, hidden_size=16, codebook_size=16,
                          codebook_dim=16, upsampling_ratios=[4, 2], num_lstm_layers=1,
                          target_bandwidths=[24.0], sampling_rate=24000),
          lambda step: {"input_values": torch.randn(2, 1, 256)},
          lambda outputs, batch: F.l1_loss(outputs.audio_values, batch["input_values"]), "reconstruction"),
    _case("DAC", made("DacModel", "DacConfig", encoder_hidden_size=8, downsampling_ratios=[2, 2], decoder_hidden_size=32, hidden_size=16,
                      n_codebooks=2, codebook_size=16, codebook_dim=4),
          lambda step: {"input_values": torch.randn(2, 1, 128)},
          lambda outputs, batch: F.l1_loss(outputs.audio_values, batch["input_values"]) + outputs.loss.mean(),
          "reconstruction and codebooks"),
    _case("CLAP audio", made("ClapAudioModelWithProjection", "ClapAudioConfig", window_size=4, num_mel_bins=32, spec_size=64,
                             patch_size=4, patch_stride=[4, 4], num_classes=5, hidden_size=32, projection_dim=16, depths=[1, 1],
                             num_attention_heads=[2, 2], patch_embeds_hidden_size=16, enable_fusion=False),
          lambda step: {"input_features": torch.randn(2, 1, 128, 32)},
          lambda outputs, batch: (outputs.audio_embeds.sum() - 1).square()),
)  # fmt: skip
