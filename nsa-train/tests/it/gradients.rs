//! The gradient of every parameter against central differences, in f64 through the code that trains.

use crate::kit;
use half::bf16;
use nsa_core::CompressKind;
use nsa_core::model::{ModelConfig, ModelFields, TokenizerKind};
use nsa_train::model::{Batch, Capacity, Model, Workspace};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const VOCAB: usize = 23;
const STEP: f64 = 1e-5;
/// Parameters checked of each tensor.
const SAMPLES: usize = 5;

/// A model with a small vocabulary, Dk ≠ Dv and large, irregular parameters.
fn model(change: impl FnOnce(&mut ModelFields)) -> Model<f64> {
    let config = kit::config(|fields| {
        (fields.vocab_size, fields.tokenizer) = (VOCAB, TokenizerKind::File);
        (fields.hidden_size, fields.intermediate_size) = (10, 7);
        fields.v_head_dim = Some(5);
        fields.initializer_range = 0.4;
        change(fields);
    });
    let mut model = Model::<f64>::new(&kit::backend(), config, 11).unwrap();
    let mut values = params(&model);
    let mut rng = ChaCha8Rng::seed_from_u64(12);
    values.iter_mut().for_each(|value| *value += rng.random_range(-0.2..0.2));
    model.change_params(|params| Ok(params.write(&values)?)).unwrap();
    model
}

fn params(model: &Model<f64>) -> Vec<f64> {
    let mut values = vec![0.0; model.params().len()];
    model.params().read(&mut values).unwrap();
    values
}

/// Documents of 19, 1, 4, 0 and 11 tokens; some tokens without a target.
fn batch() -> Batch {
    let mut rng = ChaCha8Rng::seed_from_u64(13);
    let mut batch = Batch::default();
    for (inputs, unscored) in [(19, 0), (1, 0), (4, 2), (0, 0), (11, 0)] {
        let tokens: Vec<u32> = (0..inputs + 1).map(|_| rng.random_range(0..VOCAB as u32)).collect();
        batch.push_scored(&tokens, inputs, unscored);
    }
    batch.finish().unwrap();
    batch
}

/// Blocks that every layer selected.
fn selections(model: &Model<f64>, workspace: &Workspace<f64>) -> Vec<Option<Vec<i32>>> {
    let layers = model.config().num_hidden_layers();
    (0..layers).map(|layer| workspace.selected_blocks(model, layer).unwrap()).collect()
}

/// Checks every tensor of `model`; selection is piecewise constant, so differences across a flip do not count.
fn check(mut model: Model<f64>, name: &str) {
    let batch = batch();
    let capacity = Capacity { tokens: batch.tokens().len() + 3, longest: batch.longest() };
    let mut workspace = Workspace::for_training(&model, capacity).unwrap();
    let scale = 1.0 / batch.num_targets() as f64;
    let mut grads = model.new_gradients();
    model.loss_and_gradients(&mut workspace, &batch, scale, &mut grads).unwrap();
    let mut gradient = vec![0.0; grads.len()];
    grads.read(&mut gradient).unwrap();
    let chosen = selections(&model, &workspace);

    let manifest = model.manifest().to_vec();
    let values = params(&model);
    let mut rng = ChaCha8Rng::seed_from_u64(14);
    let (mut offset, mut flips, mut checks) = (0, 0, 0);
    for spec in &manifest {
        let part = &gradient[offset..offset + spec.numel()];
        let used = |i: usize| !is_unseen(&batch, &model, &spec.name, i);
        let zero = (0..spec.numel()).find(|&i| part[i] == 0.0 && used(i));
        assert_eq!(zero, None, "{name}: {}: parameter without a gradient", spec.name);
        for _ in 0..SAMPLES {
            let i = rng.random_range(0..spec.numel());
            let mut loss = |shift: f64| {
                let mut shifted = values.clone();
                shifted[offset + i] += shift;
                model.change_params(|params| Ok(params.write(&shifted)?)).unwrap();
                let loss = model.loss(&mut workspace, &batch).unwrap().sum * scale;
                (loss, selections(&model, &workspace) == chosen)
            };
            let ((above, same_above), (below, same_below)) = (loss(STEP), loss(-STEP));
            checks += 1;
            if !(same_above && same_below) {
                flips += 1;
                continue;
            }
            let (numeric, analytic) = ((above - below) / (2.0 * STEP), part[i]);
            let allowed = 1e-9 + 1e-6 * numeric.abs().max(analytic.abs());
            let difference = (numeric - analytic).abs();
            assert!(difference <= allowed, "{name}: {}[{i}]: {analytic} against {numeric}", spec.name);
        }
        offset += spec.numel();
    }
    assert!(flips * 10 <= checks, "{name}: {flips} of {checks} differences cross a selection");
}

/// Whether parameter `i` belongs to the embedding of a token that does not occur.
fn is_unseen(batch: &Batch, model: &Model<f64>, name: &str, i: usize) -> bool {
    let token = (i / model.config().hidden_size()) as u32;
    name == "model.embed_tokens.weight" && !model.config().tie_word_embeddings() && !batch.tokens().contains(&token)
}

fn kind(fields: &mut ModelFields, kind: CompressKind) {
    fields.nsa.as_mut().unwrap().compress_kind = kind;
}

#[test]
fn nsa_with_every_compression() {
    check(model(|fields| kind(fields, CompressKind::Mean)), "mean");
    check(model(|fields| kind(fields, CompressKind::Weighted)), "weighted");
    check(model(|fields| kind(fields, CompressKind::Linear)), "linear");
    check(model(|fields| kind(fields, CompressKind::Mlp)), "mlp");
}

#[test]
fn nsa_with_qk_norm_and_a_tied_head() {
    for compress in [CompressKind::Mean, CompressKind::Weighted, CompressKind::Linear, CompressKind::Mlp] {
        let change = |fields: &mut ModelFields| {
            kind(fields, compress);
            (fields.qk_norm, fields.tie_word_embeddings) = (true, true);
        };
        check(model(change), &format!("{compress:?} with QK-norm, tied"));
    }
}

#[test]
fn nsa_without_biases_and_position() {
    let change = |fields: &mut ModelFields| {
        let nsa = fields.nsa.as_mut().unwrap();
        (nsa.compress_bias, nsa.compress_position) = (false, false);
    };
    check(model(change), "without biases and position");
}

#[test]
fn nsa_with_every_block_selected() {
    let change = |fields: &mut ModelFields| {
        let nsa = fields.nsa.as_mut().unwrap();
        (nsa.select_count, nsa.window) = (9, 64);
        fields.num_key_value_heads = 1;
    };
    check(model(change), "every block selected");
}

#[test]
fn full_attention() {
    check(model(kit::dense), "dense");
    check(
        model(|fields| {
            kit::dense(fields);
            (fields.qk_norm, fields.tie_word_embeddings, fields.scale) = (true, true, Some(0.3));
        }),
        "dense with QK-norm, tied",
    );
}

#[test]
fn inference_in_one_layers_memory_is_the_training_forward() {
    for config in [model(|_| {}).config().clone(), model(kit::dense).config().clone()] {
        let model = Model::<f64>::new(&kit::backend(), ModelConfig::clone(&config), 3).unwrap();
        let batch = batch();
        let capacity = Capacity { tokens: 40, longest: 40 };
        let mut training = Workspace::for_training(&model, capacity).unwrap();
        let mut inference = Workspace::for_inference(&model, capacity).unwrap();
        let expected = model.logits(&mut training, &batch).unwrap();
        assert_eq!(expected, model.logits(&mut inference, &batch).unwrap());
        assert_eq!(expected.len(), batch.tokens().len() * VOCAB);
        let error = model.loss_and_gradients(&mut inference, &batch, 1.0, &mut model.new_gradients());
        assert!(error.is_err(), "no memory for gradients");
    }
}

#[test]
fn a_batch_that_does_not_fit_is_an_error() {
    let model = model(|_| {});
    let mut workspace = Workspace::for_training(&model, Capacity { tokens: 8, longest: 4 }).unwrap();
    for (tokens, message) in [(9, "the workspace holds 8"), (5, "the workspace holds 4")] {
        let batch = Batch::next_token(&[&vec![1; tokens]]).unwrap();
        let error = model.loss(&mut workspace, &batch).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    let batch = Batch::next_token(&[&[1, VOCAB as u32, 2]]).unwrap();
    let error = model.loss(&mut workspace, &batch).unwrap_err().to_string();
    assert!(error.contains("position 1"), "{error}");
}

/// The gradients of all tensors in a type, from the same parameters.
fn gradient<T: nsa_kernels::Element<Acc = f32>>(config: &ModelConfig, params: &[f32], batch: &Batch) -> Vec<f32> {
    let model = Model::<T>::with_params(&kit::backend(), config.clone(), params).unwrap();
    let capacity = Capacity { tokens: batch.tokens().len(), longest: batch.longest() };
    let mut workspace = Workspace::for_training(&model, capacity).unwrap();
    let mut grads = model.new_gradients();
    model.loss_and_gradients(&mut workspace, batch, 1.0 / batch.num_targets() as f64, &mut grads).unwrap();
    let mut values = vec![0.0; grads.len()];
    grads.read(&mut values).unwrap();
    values
}

#[test]
fn gradients_in_bf16_are_those_in_f32_but_for_rounding() {
    // How much rounding moves these gradients is seen by rounding the parameters alone, in f32. With the activations and
    // the gradients there are three such sources of independent errors, the later ones with several roundings a parameter.
    const ALLOWED: f64 = 2.0;
    let every_block = |fields: &mut ModelFields| fields.nsa.as_mut().unwrap().select_count = 9;
    for (name, model) in [("dense", model(kit::dense)), ("every block selected", model(every_block))] {
        let params: Vec<f32> = params(&model).iter().map(|&x| x as f32).collect();
        let batch = batch();
        let single = gradient::<f32>(model.config(), &params, &batch);
        let half = gradient::<bf16>(model.config(), &params, &batch);
        let rounded: Vec<f32> = params.iter().map(|&x| bf16::from_f32(x).to_f32()).collect();
        let moved = gradient::<f32>(model.config(), &rounded, &batch);
        let distance =
            |other: &[f32]| single.iter().zip(other).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt();
        let (error, yardstick) = (distance(&half), distance(&moved));
        println!("{name}: {:.3}", error / yardstick);
        assert!(error < ALLOWED * yardstick && error > 0.0, "{name}: {error} against {yardstick}");
    }
}
