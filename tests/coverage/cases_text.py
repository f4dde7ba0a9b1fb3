"""Encoders, decoders and encoder-decoders of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from architecture_case import Batch, Case
from text_models import (
    BART,
    GROUPED,
    SIZES,
    SPECIAL,
    T5,
    built,
    causal,
    causal_padded,
    classes,
    long_masked,
    masked,
    translation,
    translation_aligned,
    without_mask,
)


def encoder(
    name: str, head: str, config: str, batch: Callable[[int], Batch] = masked, note: str = "", **settings: Any
) -> Case:
    """A bidirectional encoder."""
    return Case(name, "encoders", built(head, config, **SIZES | settings), batch, note=note)


def decoder(
    name: str, head: str, config: str, batch: Callable[[int], Batch] = causal_padded, note: str = "", **settings: Any
) -> Case:
    """A causal language model with attention."""
    return Case(name, "decoders", built(head, config, **SIZES | settings), batch, note=note)


def seq2seq(name: str, head: str, config: str, note: str = "", **settings: Any) -> Case:
    """An encoder and a decoder."""
    return Case(name, "encoder-decoders", built(head, config, **settings), translation, note=note)


NO_MASKS = "its own code fails with any mask, in eager too, and transformers makes one while a model is captured"
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64}

ENCODERS = (
    encoder("BERT", "BertForMaskedLM", "BertConfig"),
    encoder("BERT classifier", "BertForSequenceClassification", "BertConfig", classes),
    encoder("RoBERTa", "RobertaForMaskedLM", "RobertaConfig"),
    encoder("RoBERTa pre-norm", "RobertaPreLayerNormForMaskedLM", "RobertaPreLayerNormConfig"),
    encoder("XLM-RoBERTa", "XLMRobertaForMaskedLM", "XLMRobertaConfig"),
    encoder("XLM-RoBERTa-XL", "XLMRobertaXLForMaskedLM", "XLMRobertaXLConfig"),
    encoder("CamemBERT", "CamembertForMaskedLM", "CamembertConfig"),
    encoder("DistilBERT", "DistilBertForMaskedLM", "DistilBertConfig", dim=32, hidden_dim=64, n_layers=2, n_heads=4),
    encoder("ALBERT", "AlbertForMaskedLM", "AlbertConfig", embedding_size=16),
    encoder("ELECTRA", "ElectraForMaskedLM", "ElectraConfig", embedding_size=16),
    encoder("DeBERTa", "DebertaForMaskedLM", "DebertaConfig", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    encoder(
        "DeBERTa-v2",
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        conv_kernel_size=3,
    ),
    encoder("MPNet", "MPNetForMaskedLM", "MPNetConfig"),
    encoder(
        "ModernBERT",
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        local_attention=8,
        global_attn_every_n_layers=2,
        **SPECIAL,
    ),
    Case(
        "Funnel",
        "encoders",
        built(
            "FunnelForMaskedLM",
            "FunnelConfig",
            vocab_size=100,
            block_sizes=[1, 1],
            num_decoder_layers=1,
            d_model=32,
            n_head=4,
            d_head=8,
            d_inner=64,
        ),
        masked,
    ),
    encoder("Longformer", "LongformerForMaskedLM", "LongformerConfig", attention_window=8),
    encoder("BigBird, full", "BigBirdForMaskedLM", "BigBirdConfig", attention_type="original_full"),
    encoder(
        "BigBird, sparse",
        "BigBirdForMaskedLM",
        "BigBirdConfig",
        long_masked,
        attention_type="block_sparse",
        block_size=4,
        num_random_blocks=1,
    ),
    encoder(
        "MobileBERT",
        "MobileBertForMaskedLM",
        "MobileBertConfig",
        embedding_size=16,
        true_hidden_size=32,
        intra_bottleneck_size=32,
    ),
    encoder("ConvBERT", "ConvBertForMaskedLM", "ConvBertConfig", embedding_size=16),
    encoder("SqueezeBERT", "SqueezeBertForMaskedLM", "SqueezeBertConfig", embedding_size=32),
    encoder("RoFormer", "RoFormerForMaskedLM", "RoFormerConfig", embedding_size=16),
    encoder("RemBERT", "RemBertForMaskedLM", "RemBertConfig", input_embedding_size=16, output_embedding_size=16),
    encoder(
        "ESM",
        "EsmForMaskedLM",
        "EsmConfig",
        position_embedding_type="rotary",
        token_dropout=False,
        pad_token_id=0,
        mask_token_id=3,
    ),
    encoder(
        "FNet",
        "FNetForMaskedLM",
        "FNetConfig",
        without_mask(masked),
    ),
    encoder(
        "Nystromformer",
        "NystromformerForMaskedLM",
        "NystromformerConfig",
        without_mask(masked),
        NO_MASKS,
        segment_means_seq_len=16,
        num_landmarks=4,
    ),
    encoder("Megatron-BERT", "MegatronBertForMaskedLM", "MegatronBertConfig"),
    encoder("Data2Vec text", "Data2VecTextForMaskedLM", "Data2VecTextConfig"),
    encoder("I-BERT", "IBertForMaskedLM", "IBertConfig"),
    encoder("EuroBERT", "EuroBertForMaskedLM", "EuroBertConfig", num_key_value_heads=2, **SPECIAL),
    Case(
        "XLNet",
        "encoders",
        built(
            "XLNetForSequenceClassification", "XLNetConfig", vocab_size=100, d_model=32, n_layer=2, n_head=4, d_inner=64
        ),
        classes,
    ),
    encoder("ERNIE", "ErnieForMaskedLM", "ErnieConfig"),
)

DECODERS = (
    decoder("GPT-2", "GPT2LMHeadModel", "GPT2Config", **GPT, **SPECIAL),
    decoder("GPT-2, eager attention", "GPT2LMHeadModel", "GPT2Config", attn_implementation="eager", **GPT, **SPECIAL),
    decoder("OpenAI GPT", "OpenAIGPTLMHeadModel", "OpenAIGPTConfig", causal, **GPT),
    decoder(
        "GPT-Neo",
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        **SPECIAL,
    ),
    decoder("GPT-NeoX", "GPTNeoXForCausalLM", "GPTNeoXConfig", rotary_pct=0.5),
    decoder("GPT-J", "GPTJForCausalLM", "GPTJConfig", rotary_dim=4, **GPT, **SPECIAL),
    decoder("GPT-BigCode", "GPTBigCodeForCausalLM", "GPTBigCodeConfig", **GPT, **SPECIAL),
    decoder("CodeGen", "CodeGenForCausalLM", "CodeGenConfig", rotary_dim=4, **GPT, **SPECIAL),
    decoder("OPT", "OPTForCausalLM", "OPTConfig", ffn_dim=64, word_embed_proj_dim=32),
    decoder("BLOOM", "BloomForCausalLM", "BloomConfig", n_layer=2, n_head=4, **SPECIAL),
    decoder("MPT", "MptForCausalLM", "MptConfig", d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=64),
    decoder("Falcon", "FalconForCausalLM", "FalconConfig", **SPECIAL),
    decoder("Llama", "LlamaForCausalLM", "LlamaConfig", **GROUPED),
    decoder("Llama, eager attention", "LlamaForCausalLM", "LlamaConfig", attn_implementation="eager", **GROUPED),
    decoder("Mistral", "MistralForCausalLM", "MistralConfig", sliding_window=8, **GROUPED),
    decoder("Ministral", "MinistralForCausalLM", "MinistralConfig", sliding_window=8, head_dim=8, **GROUPED),
    decoder("Qwen2", "Qwen2ForCausalLM", "Qwen2Config", **GROUPED),
    decoder("Qwen3", "Qwen3ForCausalLM", "Qwen3Config", head_dim=8, **GROUPED),
    decoder("Gemma", "GemmaForCausalLM", "GemmaConfig", head_dim=8, **GROUPED),
    decoder(
        "Gemma 2", "Gemma2ForCausalLM", "Gemma2Config", head_dim=8, query_pre_attn_scalar=8, sliding_window=8, **GROUPED
    ),
    decoder(
        "Gemma 3",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
        **GROUPED,
    ),
    decoder(
        "Gemma 3n",
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        head_dim=8,
        sliding_window=8,
        num_kv_shared_layers=0,
        vocab_size_per_layer_input=100,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        activation_sparsity_pattern=[0.5, 0.0],
        layer_types=["sliding_attention", "full_attention"],
        **GROUPED,
    ),
    decoder("Phi", "PhiForCausalLM", "PhiConfig", **GROUPED),
    decoder("Phi-3", "Phi3ForCausalLM", "Phi3Config", **GROUPED, **SPECIAL),
    decoder("StableLM", "StableLmForCausalLM", "StableLmConfig", **GROUPED),
    decoder("Cohere", "CohereForCausalLM", "CohereConfig", **GROUPED, **SPECIAL),
    decoder("Cohere 2", "Cohere2ForCausalLM", "Cohere2Config", sliding_window=8, **GROUPED, **SPECIAL),
    decoder("OLMo", "OlmoForCausalLM", "OlmoConfig", **GROUPED, **SPECIAL),
    decoder("OLMo 2", "Olmo2ForCausalLM", "Olmo2Config", **GROUPED, **SPECIAL),
    decoder("OLMo 3", "Olmo3ForCausalLM", "Olmo3Config", sliding_window=8, **GROUPED, **SPECIAL),
    decoder("Granite", "GraniteForCausalLM", "GraniteConfig", **GROUPED),
    decoder("SmolLM3", "SmolLM3ForCausalLM", "SmolLM3Config", **GROUPED, **SPECIAL),
    decoder("GLM", "GlmForCausalLM", "GlmConfig", head_dim=8, **GROUPED, **SPECIAL),
    decoder("GLM-4", "Glm4ForCausalLM", "Glm4Config", head_dim=8, **GROUPED, **SPECIAL),
    decoder("Starcoder2", "Starcoder2ForCausalLM", "Starcoder2Config", **GROUPED, **SPECIAL),
    decoder("Nemotron", "NemotronForCausalLM", "NemotronConfig", head_dim=8, **GROUPED),
    decoder("Persimmon", "PersimmonForCausalLM", "PersimmonConfig"),
    decoder("BioGPT", "BioGptForCausalLM", "BioGptConfig"),
    decoder("XGLM", "XGLMForCausalLM", "XGLMConfig", d_model=32, num_layers=2, attention_heads=4, ffn_dim=64),
    decoder("CTRL", "CTRLLMHeadModel", "CTRLConfig", dff=64, **GPT),
    decoder("DiffLlama", "DiffLlamaForCausalLM", "DiffLlamaConfig", **GROUPED),
    decoder("Helium", "HeliumForCausalLM", "HeliumConfig", head_dim=8, **GROUPED),
    decoder("EXAONE 4", "Exaone4ForCausalLM", "Exaone4Config", sliding_window=8, **GROUPED),
    decoder("Arcee", "ArceeForCausalLM", "ArceeConfig", **GROUPED),
    decoder("Seed-OSS", "SeedOssForCausalLM", "SeedOssConfig", head_dim=8, **GROUPED),
)

ENCODER_DECODERS = (
    seq2seq("T5", "T5ForConditionalGeneration", "T5Config", **T5),
    seq2seq("T5 v1.1", "T5ForConditionalGeneration", "T5Config", feed_forward_proj="gated-gelu", **T5),
    seq2seq("mT5", "MT5ForConditionalGeneration", "MT5Config", **T5),
    seq2seq("UMT5", "UMT5ForConditionalGeneration", "UMT5Config", **T5),
    seq2seq(
        "LongT5, local",
        "LongT5ForConditionalGeneration",
        "LongT5Config",
        local_radius=4,
        encoder_attention_type="local",
        **T5,
    ),
    seq2seq(
        "LongT5, global",
        "LongT5ForConditionalGeneration",
        "LongT5Config",
        local_radius=4,
        global_block_size=4,
        encoder_attention_type="transient-global",
        **T5,
    ),
    seq2seq("BART", "BartForConditionalGeneration", "BartConfig", **BART),
    seq2seq("mBART", "MBartForConditionalGeneration", "MBartConfig", **BART),
    seq2seq("Pegasus", "PegasusForConditionalGeneration", "PegasusConfig", **BART),
    seq2seq(
        "PEGASUS-X", "PegasusXForConditionalGeneration", "PegasusXConfig", block_size=8, num_global_tokens=4, **BART
    ),
    seq2seq("Marian", "MarianMTModel", "MarianConfig", **BART | {"pad_token_id": 0, "decoder_start_token_id": 0}),
    seq2seq("M2M100", "M2M100ForConditionalGeneration", "M2M100Config", **BART),
    seq2seq("Blenderbot", "BlenderbotForConditionalGeneration", "BlenderbotConfig", **BART),
    seq2seq("LED", "LEDForConditionalGeneration", "LEDConfig", attention_window=8, **BART),
    seq2seq(
        "ProphetNet",
        "ProphetNetForConditionalGeneration",
        "ProphetNetConfig",
        vocab_size=100,
        hidden_size=32,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
    ),
    Case(
        "FSMT",
        "encoder-decoders",
        built(
            "FSMTForConditionalGeneration",
            "FSMTConfig",
            langs=["en", "de"],
            src_vocab_size=100,
            tgt_vocab_size=100,
            **BART,
        ),
        translation_aligned,
    ),
)

CASES: tuple[Case, ...] = (*ENCODERS, *DECODERS, *ENCODER_DECODERS)
