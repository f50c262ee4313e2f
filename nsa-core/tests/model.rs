//! The model's configuration: presets, rules, JSON, rotary frequencies.

use nsa_core::model::{
    AttentionKind, ModelConfig, ModelFields, NsaFields, PRESETS, RopeKind, RopeScaling, TokenizerKind, param_counts,
    rope_frequencies,
};
use nsa_core::{CompressKind, NsaConfig};
use serde_json::{Value, json};

fn preset(name: &str) -> ModelConfig {
    ModelConfig::preset(name).expect("a preset is valid")
}

/// A preset with some fields changed.
fn changed(name: &str, change: impl FnOnce(&mut ModelFields)) -> Result<ModelConfig, String> {
    let mut fields = preset(name).to_fields();
    change(&mut fields);
    ModelConfig::new(fields).map_err(|error| error.to_string())
}

#[track_caller]
fn refused(change: impl FnOnce(&mut ModelFields), message: &str) {
    assert_eq!(changed("tiny-1m", change).expect_err("the rule is broken"), format!("config field {message}"));
}

fn yarn() -> RopeScaling {
    RopeScaling {
        kind: RopeKind::Yarn,
        factor: 4.0,
        original_max_position_embeddings: 8192,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: None,
    }
}

#[test]
fn presets_have_the_sizes_that_they_name() {
    let total = |name| param_counts(&preset(name)).total;
    for (name, count) in [("tiny-1m", 1_228_976), ("bench-4m", 3_541_248), ("small-10m", 10_599_352)] {
        assert_eq!(total(name), count);
    }
    for (name, low, high) in [("medium-45m", 44e6, 46e6), ("large-350m", 345e6, 360e6)] {
        assert!((low..high).contains(&(total(name) as f64)), "{name}: {}", total(name));
    }
    // The published checkpoint's count.
    assert_eq!(total("smollm-135m"), 134_515_008);
    let paper = param_counts(&preset("paper-27b"));
    assert_eq!((paper.total, paper.active), (27_007_816_320, 5_370_122_880));
    for name in PRESETS {
        assert_eq!(preset(name).check_runnable().is_ok(), *name != "paper-27b");
    }
    let error = preset("paper-27b").check_runnable().expect_err("experts").to_string();
    assert_eq!(error, "config field `n_routed_experts` = 72: mixture of experts cannot be run yet");
    let error = ModelConfig::preset("huge").expect_err("no such preset").to_string();
    assert!(error.starts_with("config field `preset` = huge: must be one of tiny-1m, bench-4m"), "{error}");
}

#[test]
fn the_papers_preset_holds_the_papers_operator() {
    let config = preset("paper-27b");
    assert_eq!(config.nsa_config(), Some(NsaConfig::paper()));
    let moe = config.moe().expect("experts");
    assert_eq!((moe.routed, moe.shared, moe.per_token, moe.first_dense), (72, 2, 6, 1));
    assert_eq!((0..30).filter(|&layer| config.is_moe_layer(layer)).collect::<Vec<_>>(), (1..30).collect::<Vec<_>>());
    assert_eq!((config.num_hidden_layers(), config.hidden_size()), (30, 2560));
}

#[test]
fn every_size_has_its_rule() {
    refused(|f| f.vocab_size = 0, "`vocab_size` = 0: must not be zero");
    refused(|f| f.hidden_size = 0, "`hidden_size` = 0: must not be zero");
    refused(|f| f.intermediate_size = 0, "`intermediate_size` = 0: must not be zero");
    refused(|f| f.num_hidden_layers = 0, "`num_hidden_layers` = 0: must not be zero");
    refused(|f| f.num_attention_heads = 0, "`num_attention_heads` = 0: must not be zero");
    refused(|f| f.num_key_value_heads = 0, "`num_key_value_heads` = 0: must not be zero");
    refused(|f| f.max_position_embeddings = 0, "`max_position_embeddings` = 0: must not be zero");
    refused(|f| f.head_dim = Some(0), "`head_dim` = 0: must not be zero");
    refused(|f| f.v_head_dim = Some(0), "`v_head_dim` = 0: must not be zero");
    refused(|f| f.intermediate_size = 1 << 31, "`intermediate_size` = 2147483648: must fit an i32");
    refused(|f| f.head_dim = Some(31), "`head_dim` = 31: must be even: rotation works on pairs");
    refused(|f| f.hidden_size = 4 * 33, "`head_dim` = 33: must be even: rotation works on pairs");
    refused(|f| f.num_key_value_heads = 3, "`num_attention_heads` = 4: must be a multiple of num_key_value_heads = 3");
    refused(
        |f| f.hidden_size = 130,
        "`hidden_size` = 130: must be a multiple of num_attention_heads = 4 when head_dim is absent",
    );
    refused(|f| f.head_dim = Some(1 << 30), "`head_dim` = 1073741824: times num_attention_heads = 4 must fit an i32");
    refused(
        |f| f.v_head_dim = Some(1 << 30),
        "`v_head_dim` = 1073741824: times num_attention_heads = 4 must fit an i32",
    );
    let odd_values = changed("tiny-1m", |f| f.v_head_dim = Some(31)).expect("values are not rotated");
    assert_eq!((odd_values.head_dim(), odd_values.v_head_dim()), (32, 31));
    let free = changed("tiny-1m", |f| (f.hidden_size, f.head_dim) = (130, Some(32))).expect("head_dim is given");
    assert_eq!((free.head_dim(), free.v_head_dim()), (32, 32));
}

#[test]
fn every_factor_has_its_rule() {
    refused(|f| f.rms_norm_eps = 0.0, "`rms_norm_eps` = 0: must be positive and finite");
    refused(|f| f.initializer_range = f64::NAN, "`initializer_range` = NaN: must be positive and finite");
    refused(|f| f.scale = Some(-0.5), "`scale` = -0.5: must be positive and finite, as an f32 too");
    let dense = |f: &mut ModelFields| (f.attention, f.nsa, f.scale) = (AttentionKind::Dense, None, Some(1e300));
    refused(dense, &format!("`scale` = {}: must be positive and finite, as an f32 too", 1e300));
    refused(|f| f.rope_theta = 1.0, "`rope_theta` = 1: must be finite and above 1");
    refused(|f| f.rope_theta = f64::INFINITY, "`rope_theta` = inf: must be finite and above 1");
    let scaled = |scaling| move |f: &mut ModelFields| f.rope_scaling = Some(scaling);
    refused(
        scaled(RopeScaling { factor: 0.5, ..yarn() }),
        "`rope_scaling.factor` = 0.5: must be finite and at least 1",
    );
    refused(
        scaled(RopeScaling { original_max_position_embeddings: 0, ..yarn() }),
        "`rope_scaling.original_max_position_embeddings` = 0: must not be zero",
    );
    refused(
        scaled(RopeScaling { beta_slow: 0.0, ..yarn() }),
        "`rope_scaling.beta_slow` = 0: must be positive and finite",
    );
    refused(
        scaled(RopeScaling { beta_fast: -1.0, ..yarn() }),
        "`rope_scaling.beta_fast` = -1: must be positive and finite",
    );
    refused(
        scaled(RopeScaling { beta_slow: 40.0, ..yarn() }),
        "`rope_scaling.beta_fast` = 32: must be at least beta_slow = 40",
    );
    refused(
        scaled(RopeScaling { attention_factor: Some(0.0), ..yarn() }),
        "`rope_scaling.attention_factor` = 0: must be positive and finite",
    );
}

#[test]
fn vocabulary_and_section_have_their_rules() {
    refused(|f| f.vocab_size = 320, "`vocab_size` = 320: must be 256 when tokenizer is `bytes`");
    refused(|f| f.eos_token_id = Some(256), "`eos_token_id` = 256: must be below vocab_size = 256");
    refused(|f| f.bos_token_id = Some(300), "`bos_token_id` = 300: must be below vocab_size = 256");
    refused(|f| f.nsa = None, "`nsa` = null: attention `nsa` needs it");
    let nsa = |change: fn(&mut NsaFields)| move |f: &mut ModelFields| change(f.nsa.as_mut().expect("a section"));
    refused(nsa(|n| n.compress_stride = 5), "`compress_block` = 16: must be a multiple of compress_stride = 5");
    refused(nsa(|n| n.compress_hidden = None), "`compress_hidden` = null: compress_kind `mlp` needs it");
    refused(
        nsa(|n| n.compress_hidden = Some(1 << 30)),
        "`compress_hidden` = 1073741824: times num_key_value_heads = 2 must fit an i32",
    );
    refused(
        nsa(|n| n.compress_block = 1 << 27),
        "`compress_block` = 134217728: times the head dimension 32 must fit an i32",
    );
    let dense = changed("tiny-1m", |f| (f.attention, f.nsa) = (AttentionKind::Dense, None)).expect("needs no section");
    assert_eq!((dense.nsa_config(), dense.compress_bias(), dense.compress_position()), (None, false, false));
    // A twin keeps its section, which stays checked.
    let twin = changed("tiny-1m", |f| f.attention = AttentionKind::Dense).expect("a twin");
    assert_eq!((twin.nsa_config(), twin.compress_bias(), twin.compress_position()), (None, false, false));
    let broken = changed("tiny-1m", |f| {
        f.attention = AttentionKind::Dense;
        f.nsa.as_mut().expect("a section").window = 0;
    });
    assert_eq!(broken, Err("config field `window` = 0: must not be zero".to_owned()));
    let linear = changed("tiny-1m", |f| f.nsa.as_mut().expect("a section").compress_kind = CompressKind::Linear);
    assert!(!linear.expect("valid").compress_bias(), "only the mlp has biases");
    let scaled = changed("tiny-1m", |f| f.scale = Some(0.25)).expect("valid");
    assert_eq!((scaled.scale(), scaled.nsa_config().map(|nsa| nsa.scale())), (0.25, Some(0.25)));
    assert_eq!(preset("tiny-1m").scale(), 32f64.sqrt().recip());
}

#[test]
fn experts_have_their_rules() {
    let all = |f: &mut ModelFields| {
        f.n_routed_experts = Some(8);
        f.n_shared_experts = Some(0);
        f.num_experts_per_tok = Some(8);
        f.moe_intermediate_size = Some(64);
        f.first_k_dense_replace = Some(4);
    };
    let config = changed("tiny-1m", all).expect("the widest that is valid");
    assert!((0..4).all(|layer| !config.is_moe_layer(layer)) && config.check_runnable().is_err());
    let with = |change: fn(&mut ModelFields)| {
        move |f: &mut ModelFields| {
            all(f);
            change(f);
        }
    };
    let together = "the fields of a mixture of experts are given all or none";
    refused(with(|f| f.n_routed_experts = None), &format!("`n_routed_experts` = null: {together}"));
    refused(with(|f| f.n_shared_experts = None), &format!("`n_shared_experts` = null: {together}"));
    refused(with(|f| f.num_experts_per_tok = None), &format!("`num_experts_per_tok` = null: {together}"));
    refused(with(|f| f.moe_intermediate_size = None), &format!("`moe_intermediate_size` = null: {together}"));
    refused(with(|f| f.first_k_dense_replace = None), &format!("`first_k_dense_replace` = null: {together}"));
    refused(with(|f| f.n_routed_experts = Some(0)), "`n_routed_experts` = 0: must not be zero");
    refused(with(|f| f.num_experts_per_tok = Some(0)), "`num_experts_per_tok` = 0: must not be zero");
    refused(with(|f| f.moe_intermediate_size = Some(0)), "`moe_intermediate_size` = 0: must not be zero");
    refused(with(|f| f.n_shared_experts = Some(1 << 31)), "`n_shared_experts` = 2147483648: must fit an i32");
    refused(
        with(|f| f.num_experts_per_tok = Some(9)),
        "`num_experts_per_tok` = 9: must be at most n_routed_experts = 8",
    );
    refused(
        with(|f| f.first_k_dense_replace = Some(5)),
        "`first_k_dense_replace` = 5: must be at most num_hidden_layers = 4",
    );
}

#[test]
fn json_round_trips() {
    for name in PRESETS {
        let text = serde_json::to_string(&preset(name)).expect("serializes");
        assert_eq!(serde_json::from_str::<ModelConfig>(&text).expect("its own JSON"), preset(name));
    }
    let long = changed("tiny-1m", |f| {
        f.rope_scaling = Some(yarn());
        (f.eos_token_id, f.bos_token_id, f.qk_norm) = (Some(0), Some(255), true);
    })
    .expect("valid");
    let value = serde_json::to_value(&long).expect("serializes");
    assert_eq!(value["rope_scaling"]["type"], "yarn");
    assert_eq!(serde_json::from_value::<ModelConfig>(value).expect("its own JSON"), long);
}

/// The least that a configuration says.
fn minimal() -> Value {
    json!({
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "nsa": { "compress_hidden": 8 }
    })
}

#[test]
fn json_has_defaults() {
    let config: ModelConfig = serde_json::from_value(minimal()).expect("defaults fill the rest");
    assert_eq!((config.rms_norm_eps(), config.rope_theta(), config.initializer_range()), (1e-5, 1e4, 0.02));
    assert_eq!((config.head_dim(), config.v_head_dim(), config.scale()), (16, 16, 0.25));
    assert_eq!((config.tie_word_embeddings(), config.qk_norm()), (false, false));
    assert_eq!((config.attention(), config.tokenizer()), (AttentionKind::Nsa, TokenizerKind::Bytes));
    assert_eq!((config.eos_token_id(), config.bos_token_id(), config.moe()), (None, None, None));
    assert!(config.compress_bias() && config.compress_position() && config.rope_scaling().is_none());
    let expected = NsaConfig::builder(4, 2, 16, 16).compress_hidden(8).build().expect("valid");
    assert_eq!(config.nsa_config(), Some(expected));
    let mut nulls = minimal();
    for field in ["rope_scaling", "scale", "head_dim", "v_head_dim", "eos_token_id", "n_routed_experts"] {
        nulls[field] = Value::Null;
    }
    assert_eq!(serde_json::from_value::<ModelConfig>(nulls).expect("null is absent"), config);
    let mut long = minimal();
    long["rope_scaling"] = json!({ "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192,
                                   "attention_factor": null });
    let long: ModelConfig = serde_json::from_value(long).expect("defaults of YaRN");
    assert_eq!(long.rope_scaling(), Some(&yarn()));
}

#[test]
fn json_errors_say_what_is_wrong() {
    let error_of = |change: &dyn Fn(&mut Value)| {
        let mut value = minimal();
        change(&mut value);
        serde_json::from_value::<ModelConfig>(value).expect_err("broken").to_string()
    };
    for (error, part) in [
        (error_of(&|v| v["hidden_sise"] = json!(1)), "unknown field `hidden_sise`"),
        (error_of(&|v| v["nsa"]["windows"] = json!(1)), "unknown field `windows`"),
        (error_of(&|v| v["rope_scaling"] = json!({"type": "linear", "factor": 2})), "unknown variant `linear`"),
        (error_of(&|v| drop(v.as_object_mut().expect("an object").remove("vocab_size"))), "missing field `vocab_size`"),
        (error_of(&|v| v["attention"] = json!("full")), "unknown variant `full`"),
        (error_of(&|v| v["tokenizer"] = json!("bpe")), "unknown variant `bpe`"),
        (error_of(&|v| *v = json!([256, 64, 96, 2, 4, 2, null, null, 512])), "sequence, expected an object"),
        (error_of(&|v| v["nsa"] = json!([32, 16, 64, 16, 1, 2, 512, "mean"])), "sequence, expected an object"),
        (error_of(&|v| v["rope_scaling"] = json!(["yarn", 4.0, 8192])), "sequence, expected an object"),
        (error_of(&|v| v["num_key_value_heads"] = json!(3)), "config field `num_attention_heads` = 4"),
    ] {
        assert!(error.contains(part), "`{error}` does not say `{part}`");
    }
}

#[track_caller]
fn close(got: f64, expected: f64) {
    assert!((got / expected - 1.0).abs() < 1e-12, "{got} is not {expected}");
}

#[test]
fn frequencies_fall_geometrically() {
    let table = rope_frequencies(&preset("paper-27b"));
    assert_eq!((table.inv_freq.len(), table.attention_factor), (96, 1.0));
    for (i, &freq) in table.inv_freq.iter().enumerate() {
        close(freq, 1e4_f64.powf(-(i as f64) / 96.0));
    }
}

#[test]
fn yarn_keeps_fast_pairs_and_interpolates_slow_ones() {
    let with = |dim, scaling| {
        changed("tiny-1m", |f| (f.head_dim, f.rope_scaling) = (Some(dim), Some(scaling))).expect("valid")
    };
    let table = rope_frequencies(&with(64, yarn()));
    close(table.attention_factor, 1.138_629_436_111_989);
    // Worked out from the paper's equations with pairs 12 and 25 as the ends of the ramp.
    for (i, freq) in [
        (0, 1.0),
        (9, 0.074_989_420_933_245_56),
        (10, 0.056_234_132_519_034_91),
        (16, 0.007_692_307_692_307_693),
        (24, 0.000_307_692_307_692_307_65),
        (25, 0.000_187_473_552_333_113_96),
        (31, 3.333_803_580_408_31e-5),
    ] {
        close(table.inv_freq[i], freq);
    }
    let short =
        RopeScaling { factor: 8.0, original_max_position_embeddings: 512, attention_factor: Some(1.0), ..yarn() };
    let table = rope_frequencies(&with(16, short));
    assert_eq!(table.attention_factor, 1.0);
    let expected = [
        1.0,
        0.247_052_942_200_654_63,
        0.056_25,
        0.010_870_329_456_828_804,
        0.001_25,
        0.000_395_284_707_521_047_4,
        0.000_125,
        3.952_847_075_210_474e-5,
    ];
    table.inv_freq.iter().zip(expected).for_each(|(&got, expected)| close(got, expected));
    assert_eq!(table.inv_freq.len(), expected.len());
    // A factor of 1 changes nothing; a context in which every pair is slow divides all but the first.
    let same = rope_frequencies(&with(64, RopeScaling { factor: 1.0, ..yarn() }));
    assert_eq!(same.attention_factor, 1.0);
    same.inv_freq.iter().enumerate().for_each(|(i, &freq)| close(freq, 1e4_f64.powf(-(i as f64) / 32.0)));
    // A ramp from pair 6 to pair 10, past the last pair.
    let long = RopeScaling { original_max_position_embeddings: 1 << 18, ..yarn() };
    close(rope_frequencies(&with(16, long)).inv_freq[7], 1e4_f64.powf(-14.0 / 16.0) * (0.75 + 0.25 / 4.0));
    let tiny = rope_frequencies(&with(8, RopeScaling { original_max_position_embeddings: 1, ..yarn() }));
    assert_eq!((tiny.inv_freq[0], tiny.inv_freq[1]), (1.0, 0.1 / 4.0));
}
