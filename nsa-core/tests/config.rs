//! The rules of the operator's configuration, its JSON, and the element types.

use half::{bf16, f16};
use nsa_core::{CompressKind, ConfigError, DType, Element, FileError, NsaConfig, NsaConfigBuilder, Real, read_json};
use serde_json::{Value, json};

#[track_caller]
fn refused(change: impl FnOnce(NsaConfigBuilder) -> NsaConfigBuilder, message: &str) {
    let error: ConfigError = change(NsaConfig::small().to_builder()).build().expect_err(message);
    assert_eq!(error.to_string(), message);
}

#[test]
fn every_rule_names_field_value_and_rule() {
    let with_heads = |heads, groups, dim_k, dim_v| {
        move |_| NsaConfig::builder(heads, groups, dim_k, dim_v).compress_kind(CompressKind::Mean)
    };
    refused(with_heads(0, 1, 8, 8), "config field `num_heads` = 0: must not be zero");
    refused(with_heads(4, 0, 8, 8), "config field `num_kv_heads` = 0: must not be zero");
    refused(with_heads(4, 2, 0, 8), "config field `head_dim_qk` = 0: must not be zero");
    refused(with_heads(4, 2, 8, 0), "config field `head_dim_v` = 0: must not be zero");
    refused(with_heads(5, 2, 8, 8), "config field `num_heads` = 5: must be a multiple of num_kv_heads = 2");
    refused(|c| c.compress_block(0), "config field `compress_block` = 0: must not be zero");
    refused(|c| c.compress_stride(0), "config field `compress_stride` = 0: must not be zero");
    refused(|c| c.select_block(0), "config field `select_block` = 0: must not be zero");
    refused(|c| c.select_count(0), "config field `select_count` = 0: must not be zero");
    refused(|c| c.select_local(0), "config field `select_local` = 0: must not be zero");
    refused(|c| c.window(0), "config field `window` = 0: must not be zero");
    refused(|c| c.window(1 << 31), "config field `window` = 2147483648: must fit an i32");
    refused(|c| c.compress_block(10), "config field `compress_block` = 10: must be a multiple of compress_stride = 4");
    refused(|c| c.select_block(18), "config field `select_block` = 18: must be a multiple of compress_stride = 4");
    refused(|c| c.compress_block(20), "config field `compress_block` = 20: must be at most select_block = 16");
    refused(
        |c| c.select_initial(3),
        "config field `select_count` = 4: must be at least select_initial + select_local = 5",
    );
    refused(
        |c| c.compress_kind(CompressKind::Mlp),
        "config field `compress_hidden` = null: compress_kind `mlp` needs it",
    );
    refused(|c| c.compress_hidden(0), "config field `compress_hidden` = 0: must not be zero");
    refused(|c| c.compress_hidden(1 << 31), "config field `compress_hidden` = 2147483648: must fit an i32");
    refused(|c| c.scale(0.0), "config field `scale` = 0: must be positive and finite, as an f32 too");
    refused(|c| c.scale(-1.0), "config field `scale` = -1: must be positive and finite, as an f32 too");
    refused(
        |c| c.scale(1e39),
        "config field `scale` = 1000000000000000000000000000000000000000: must be positive and finite, as an f32 too",
    );
    refused(|c| c.scale(f64::INFINITY), "config field `scale` = inf: must be positive and finite, as an f32 too");
    refused(|c| c.scale(f64::NAN), "config field `scale` = NaN: must be positive and finite, as an f32 too");
}

#[test]
fn what_no_rule_forbids_is_valid() {
    let small = || NsaConfig::small().to_builder();
    for config in [
        small().select_initial(0),
        small().select_initial(2),
        small().compress_block(4),
        small().compress_block(16),
        small().select_count(1000),
        small().window(1),
        NsaConfig::builder(7, 1, 3, 5).compress_hidden(1),
        NsaConfig::builder(1, 1, 1, 1).compress_kind(CompressKind::Linear).scale(2.0),
    ] {
        config.build().expect("a valid configuration");
    }
}

#[test]
fn json_round_trips_and_has_the_defaults_of_the_paper() {
    for config in [NsaConfig::paper(), NsaConfig::small(), NsaConfig::small().to_builder().scale(0.1).build().unwrap()]
    {
        let text = serde_json::to_string(&config).expect("serializes");
        assert_eq!(serde_json::from_str::<NsaConfig>(&text).expect("its own JSON"), config);
    }
    let minimal = json!({"num_heads": 64, "num_kv_heads": 4, "head_dim_qk": 192, "head_dim_v": 128,
                         "compress_hidden": 192, "scale": null});
    let config: NsaConfig = serde_json::from_value(minimal).expect("defaults fill the rest");
    assert_eq!(config, NsaConfig::paper());
    assert_eq!(config.scale(), 192f64.sqrt().recip());
    let blocks = [config.compress_block(), config.compress_stride(), config.select_block(), config.window()];
    assert_eq!((blocks, config.group_size()), ([32, 16, 64, 512], 16));
    assert_eq!((config.select_count(), config.select_initial(), config.select_local()), (16, 1, 2));
}

#[test]
fn json_errors_say_what_is_wrong() {
    let valid = serde_json::to_value(NsaConfig::small()).expect("serializes");
    let error_of = |change: &dyn Fn(&mut serde_json::Map<String, Value>)| {
        let mut value = valid.clone();
        change(value.as_object_mut().expect("an object"));
        serde_json::from_value::<NsaConfig>(value).expect_err("broken").to_string()
    };
    let unknown = error_of(&|map| drop(map.insert("num_head".to_owned(), json!(4))));
    assert!(unknown.contains("unknown field `num_head`"), "{unknown}");
    let missing = error_of(&|map| drop(map.remove("head_dim_v")));
    assert!(missing.contains("missing field `head_dim_v`"), "{missing}");
    let rule = error_of(&|map| drop(map.insert("window".to_owned(), json!(0))));
    assert_eq!(rule, "config field `window` = 0: must not be zero");
    let kind = error_of(&|map| drop(map.insert("compress_kind".to_owned(), json!("max"))));
    assert!(kind.contains("unknown variant `max`"), "{kind}");
    let negative = error_of(&|map| drop(map.insert("window".to_owned(), json!(-1))));
    assert!(negative.contains("-1"), "{negative}");
}

#[test]
fn a_file_error_names_the_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("nsa.json");
    let error = read_json::<NsaConfig>(&path).expect_err("no such file");
    // The reason is the error's source, so that who prints both prints it once.
    assert!(error.to_string().ends_with("nsa.json: cannot be read"), "{error}");
    assert!(std::error::Error::source(&error).is_some_and(|source| source.to_string().contains("No such file")));
    assert!(matches!(error, FileError::Read { path: named, .. } if named == path));
    std::fs::write(&path, serde_json::to_string(&NsaConfig::paper()).expect("serializes")).expect("writes");
    assert_eq!(read_json::<NsaConfig>(&path).expect("valid"), NsaConfig::paper());
    let error_of = |text: &str| {
        std::fs::write(&path, text).expect("writes");
        read_json::<NsaConfig>(&path).expect_err("no such configuration").to_string()
    };
    let short = error_of("{\"num_heads\": 4");
    assert!(short.ends_with("nsa.json: ends early, at line 1 column 15"), "{short}");
    for cut in ["", "{", "{\"num_heads\"", "{\"num_heads\":", "{\"num_heads\": 4,"] {
        let short = error_of(cut);
        assert!(short.contains("nsa.json: ends early, at line 1 column") && !short.contains('`'), "{short}");
    }
    let comma = error_of("{\"num_heads\": 4,}");
    assert!(comma.contains("nsa.json: trailing comma"), "{comma}");
    let unknown = error_of("{\"num_head\": 4}");
    assert!(unknown.contains("nsa.json: `num_head`: unknown field `num_head`"), "{unknown}");
    let field = error_of("{\"num_heads\": 4, \"window\": \"7\"}");
    assert!(field.contains("`window`: invalid type: string \"7\", expected usize"), "{field}");
    let paper = serde_json::to_string(&NsaConfig::paper()).expect("serializes");
    let rule = error_of(&paper.replace("\"window\":512", "\"window\":0"));
    assert!(rule.contains("nsa.json: config field `window` = 0: must not be zero"), "{rule}");
    let more = error_of(&format!("{paper} {{}}"));
    assert!(more.contains("trailing characters"), "{more}");
}

#[test]
fn a_configuration_is_an_object() {
    let list = "[4, 2, 16, 16, 8, 4, 16, 4, 1, 2, 32, \"mean\", null, null]";
    let error = serde_json::from_str::<NsaConfig>(list).expect_err("a list").to_string();
    assert!(error.starts_with("invalid type: sequence, expected an object"), "{error}");
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("nsa.json");
    for text in [list, "[]", "7", "\"small\"", "null"] {
        std::fs::write(&path, text).expect("writes");
        let error = read_json::<NsaConfig>(&path).expect_err("no object").to_string();
        assert!(error.contains("nsa.json: invalid type: ") && error.contains("expected an object"), "{error}");
    }
}

/// Rounding to nearest, ties to even, found among the neighbours of the rounded value.
fn rounds_to_nearest<T: Element>(x: f64, next: impl Fn(T) -> [T; 2]) {
    let rounded = T::from_f64(x);
    let distance = (rounded.to_f64() - x).abs();
    for neighbour in next(rounded) {
        assert!(distance <= (neighbour.to_f64() - x).abs(), "{x} rounded to {rounded:?}, but {neighbour:?} is nearer");
    }
}

#[test]
fn elements_widen_exactly_and_round_to_nearest() {
    for (dtype, name, bytes) in
        [(DType::Bf16, "bf16", 2), (DType::F16, "f16", 2), (DType::F32, "f32", 4), (DType::F64, "f64", 8)]
    {
        assert_eq!((dtype.to_string().as_str(), dtype.size_bytes()), (name, bytes));
        assert_eq!(serde_json::to_value(dtype).expect("serializes"), json!(name));
    }
    assert_eq!((f32::DTYPE, f64::DTYPE, bf16::DTYPE, f16::DTYPE), (DType::F32, DType::F64, DType::Bf16, DType::F16));
    // Every finite number of the two half types survives both ways.
    for bits in 0..=u16::MAX {
        let (b, h) = (bf16::from_bits(bits), f16::from_bits(bits));
        if b.is_finite() {
            assert_eq!((bf16::from_acc(b.to_acc()), bf16::from_f64(Element::to_f64(b))), (b, b));
        }
        if h.is_finite() {
            assert_eq!((f16::from_acc(h.to_acc()), f16::from_f64(Element::to_f64(h))), (h, h));
        }
    }
    for i in 1..2000 {
        let x = f64::from(i) * 0.017_3;
        rounds_to_nearest::<bf16>(x, |r| [bf16::from_bits(r.to_bits() - 1), bf16::from_bits(r.to_bits() + 1)]);
        rounds_to_nearest::<f16>(x, |r| [f16::from_bits(r.to_bits() - 1), f16::from_bits(r.to_bits() + 1)]);
        rounds_to_nearest::<f32>(x, |r| [r.next_down(), r.next_up()]);
    }
    // 1 + 2⁻⁸ lies between two numbers of bf16: the even one wins; 1 + 3·2⁻⁸ likewise, upwards.
    assert_eq!(bf16::from_acc(1.0 + 1.0 / 256.0).to_acc(), 1.0);
    assert_eq!(bf16::from_acc(1.0 + 3.0 / 256.0).to_acc(), 1.0 + 4.0 / 256.0);
    assert_eq!((<f32 as Real>::of(0.1), <f64 as Real>::of(0.1)), (0.1_f32, 0.1_f64));
    assert!((Real::erfc(0.5_f64) - 0.479_500_122_186_953_5).abs() < 1e-15);
    assert!((Real::erfc(0.5_f32) - 0.479_500_1).abs() < 1e-6);
    assert!((Real::erfc(5.0_f32) / 1.537_459_8e-12 - 1.0).abs() < 1e-5);
}
