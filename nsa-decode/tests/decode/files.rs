//! Checkpoints that are not what they should be: the error names the file and the tensor or field.

use crate::kit::{Checkpoint, Stored, bytes_of, small, small_dense, tokens, write_tensors};
use nsa_core::{CompressKind, DType};
use nsa_decode::{Error, Precision, WeightsError};
use std::collections::BTreeMap;
use std::error::Error as _;

const WEIGHTS: &str = "model.safetensors";

fn refusal(checkpoint: &Checkpoint) -> String {
    checkpoint.try_open().unwrap_err().to_string()
}

fn edited(edit: impl FnOnce(&mut BTreeMap<String, Stored>)) -> Checkpoint {
    let mut checkpoint = Checkpoint::new(small(CompressKind::Mlp), 60);
    edit(&mut checkpoint.tensors);
    checkpoint.write();
    checkpoint
}

#[test]
fn a_missing_tensor() {
    let name = "model.layers.1.self_attn.k_win_proj.weight";
    let message = refusal(&edited(|tensors| drop(tensors.remove(name))));
    assert!(message.ends_with(&format!("tensor `{name}` is missing, expected shape [16, 24]")), "{message}");
}

#[test]
fn a_wrong_shape() {
    let name = "model.layers.0.self_attn.phi_k.0.weight";
    let message = refusal(&edited(|tensors| {
        let tensor = tensors.get_mut(name).unwrap();
        tensor.shape = vec![2, 10, 64];
    }));
    assert!(message.contains(WEIGHTS), "{message}");
    assert!(message.ends_with(&format!("tensor `{name}` has shape [2, 10, 64], expected [2, 64, 10]")), "{message}");
}

#[test]
fn a_wrong_element_type() {
    let name = "model.norm.weight";
    let message = refusal(&edited(|tensors| tensors.get_mut(name).unwrap().dtype = DType::F64));
    assert!(message.ends_with("tensor `model.norm.weight` has dtype F64, expected F32, BF16 or F16"), "{message}");
}

#[test]
fn an_unknown_tensor() {
    let message = refusal(&edited(|tensors| {
        let tensor = tensors["model.norm.weight"].clone();
        tensors.insert("model.layers.2.extra".into(), tensor.clone());
        tensors.insert("model.layers.2.another".into(), tensor);
    }));
    let expected =
        "tensor `model.layers.2.another` is unknown to the configuration (2 such): the file belongs to another model";
    assert!(message.ends_with(expected), "{message}");
}

#[test]
fn a_configuration_of_another_model() {
    let checkpoint = Checkpoint::new(small_dense(), 61);
    let other = Checkpoint::new(small(CompressKind::Mean), 61);
    std::fs::copy(other.path().join("config.json"), checkpoint.path().join("config.json")).unwrap();
    let message = refusal(&checkpoint);
    assert!(message.contains("`model.layers.0.self_attn.k_cmp_proj.weight` is missing"), "{message}");
}

#[test]
fn a_file_cut_off_anywhere() {
    let checkpoint = Checkpoint::new(small(CompressKind::Mean), 62);
    let path = checkpoint.path().join(WEIGHTS);
    let whole = std::fs::read(&path).unwrap();
    for len in [0, 5, 8, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..len]).unwrap();
        let error = checkpoint.try_open().unwrap_err();
        assert!(matches!(&error, Error::Weights(WeightsError::Format { path: p, .. }) if *p == path), "{len}: {error}");
        assert!(error.to_string().contains(WEIGHTS), "{error}");
    }
    std::fs::write(&path, [whole.as_slice(), b"tail"].concat()).unwrap();
    assert!(matches!(checkpoint.try_open(), Err(Error::Weights(WeightsError::Format { .. }))));
    std::fs::write(&path, b"PK\x03\x04 not at all a tensor file, but long enough to have a header").unwrap();
    assert!(matches!(checkpoint.try_open(), Err(Error::Weights(WeightsError::Format { .. }))));
    std::fs::remove_file(&path).unwrap();
    let error = checkpoint.try_open().unwrap_err();
    let why = error.source().expect("the system's reason").to_string();
    assert!(error.to_string().contains(WEIGHTS) && why.contains("No such file"), "{error}: {why}");
}

#[test]
fn a_bad_configuration() {
    let checkpoint = Checkpoint::new(small(CompressKind::Mean), 63);
    let path = checkpoint.path().join("config.json");
    let json = std::fs::read_to_string(&path).unwrap();
    for (from, to, expected) in [
        ("\"hidden_size\"", "\"hidden_sizes\"", "hidden_sizes"),
        ("\"window\": 12", "\"window\": 0", "config field `window` = 0: must not be zero"),
        ("{", "", "config.json"),
    ] {
        std::fs::write(&path, json.replacen(from, to, 1)).unwrap();
        let message = refusal(&checkpoint);
        assert!(message.contains("config.json") && message.contains(expected), "{message}");
    }
    std::fs::remove_file(&path).unwrap();
    assert!(refusal(&checkpoint).contains("config.json"));
}

#[test]
fn a_mixture_of_experts_is_refused_before_its_weights() {
    let checkpoint = Checkpoint::new(small(CompressKind::Mean), 64);
    let path = checkpoint.path().join("config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for (field, value) in [
        ("n_routed_experts", 4),
        ("n_shared_experts", 1),
        ("num_experts_per_tok", 2),
        ("moe_intermediate_size", 16),
        ("first_k_dense_replace", 1),
    ] {
        json[field] = value.into();
    }
    std::fs::write(&path, serde_json::to_vec(&json).unwrap()).unwrap();
    assert!(refusal(&checkpoint).contains("mixture of experts cannot be run yet"));
}

#[test]
fn shards_are_one_model() {
    let checkpoint = Checkpoint::new(small(CompressKind::Mlp), 65);
    let expected = checkpoint.open().session().append_all(&tokens(1, 20)).unwrap();
    std::fs::remove_file(checkpoint.path().join(WEIGHTS)).unwrap();
    let (first, second) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    let is_first = |name: &&String| name.contains("layers.0");
    write_tensors(&checkpoint.path().join(first), checkpoint.tensors.iter().filter(|(name, _)| is_first(name)));
    write_tensors(&checkpoint.path().join(second), checkpoint.tensors.iter().filter(|(name, _)| !is_first(name)));
    let map: BTreeMap<&String, &str> =
        checkpoint.tensors.keys().map(|name| (name, if is_first(&name) { first } else { second })).collect();
    let index = checkpoint.path().join("model.safetensors.index.json");
    let write = |map: &BTreeMap<&String, &str>| {
        let json = serde_json::json!({ "metadata": { "total_size": 0 }, "weight_map": map });
        std::fs::write(&index, serde_json::to_vec(&json).unwrap()).unwrap();
    };
    write(&map);
    assert_eq!(checkpoint.open().session().append_all(&tokens(1, 20)).unwrap(), expected);
    // A tensor in both files; a file elsewhere; an index that is none.
    write_tensors(&checkpoint.path().join(second), &checkpoint.tensors);
    assert!(matches!(checkpoint.try_open(), Err(Error::Weights(WeightsError::Duplicate { .. }))));
    let name = "model.norm.weight".to_owned();
    let mut outside = map.clone();
    outside.insert(&name, "../model.safetensors");
    write(&outside);
    let message = refusal(&checkpoint);
    assert!(message.contains("`model.norm.weight` = `../model.safetensors`"), "{message}");
    write(&BTreeMap::new());
    assert!(refusal(&checkpoint).contains("`weight_map` names no file"));
    std::fs::write(&index, b"[]").unwrap();
    assert!(refusal(&checkpoint).contains("model.safetensors.index.json"));
}

/// What is copied, of files in a type and models that compute in one.
#[test]
fn weights_in_another_type_are_copied() {
    let sizes = |stored, precision| {
        let checkpoint = Checkpoint::with_dtype(small(CompressKind::Linear), 67, |_| stored);
        let of = |names: &[&str]| -> u64 {
            let named = |name: &String| names.iter().any(|part| name.contains(part));
            let tensors = checkpoint.tensors.iter().filter(|(name, _)| named(name));
            tensors.map(|(_, tensor)| (tensor.data.len() * tensor.dtype.size_bytes()) as u64).sum()
        };
        let info = checkpoint.open_in(precision).weights_info().clone();
        assert_eq!(info.mapped_bytes + info.copied_bytes, of(&[""]));
        (info.copied_bytes, of(&["norm", "self_attn.gate_proj"]), of(&["phi_", "pe_"]), of(&[""]))
    };
    let (copied, ..) = sizes(DType::F32, Precision::F32);
    assert_eq!(copied, 0);
    // In f32: norms and gates; φ in the type that is computed in; matrices as they are, unless they are wider than that.
    let (copied, small, phi, _) = sizes(DType::Bf16, Precision::F32);
    assert_eq!(copied, small + phi);
    let (copied, small, _, _) = sizes(DType::Bf16, Precision::Bf16);
    assert_eq!(copied, small);
    let (copied, small, phi, _) = sizes(DType::F16, Precision::Bf16);
    assert_eq!(copied, small + phi);
    let (copied, small, _, all) = sizes(DType::F32, Precision::Bf16);
    assert_eq!(copied, all - small);
}

/// A safetensors file whose data starts at an odd offset.
#[test]
fn misaligned_tensors_are_copied() {
    let checkpoint = Checkpoint::new(small(CompressKind::Mlp), 66);
    let model = checkpoint.open();
    assert_eq!(model.weights_info().copied_bytes, 0);
    let expected = model.session().append_all(&tokens(1, 20)).unwrap();
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, tensor) in &checkpoint.tensors {
        let (_, bytes) = bytes_of(tensor);
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert(
            name.clone(),
            serde_json::json!({ "dtype": "F32", "shape": tensor.shape, "data_offsets": offsets }),
        );
        data.extend(bytes);
    }
    let mut json = serde_json::to_vec(&header).unwrap();
    while json.len() % 2 == 0 {
        json.push(b' ');
    }
    let file = [&(json.len() as u64).to_le_bytes(), json.as_slice(), &data].concat();
    std::fs::write(checkpoint.path().join(WEIGHTS), file).unwrap();
    let model = checkpoint.open();
    assert_eq!((model.weights_info().mapped_bytes, model.weights_info().copied_bytes), (0, data.len() as u64));
    assert_eq!(model.session().append_all(&tokens(1, 20)).unwrap(), expected);
}
