//! Prefill in any chunking, decoding token by token and one full forward agree, with each other and with f64 loops.

use crate::kit::{Checkpoint, relative_error, small, small_dense, tokens};
use crate::reference;
use nsa_core::model::{ModelFields, NsaFields, RopeKind, RopeScaling};
use nsa_core::{CompressKind, DType};
use nsa_decode::{Model, Precision, SessionOptions};

/// Rounding in f32 through two layers; a wrong key, mask, rotation or gate moves logits by far more.
const TOLERANCE: f64 = 3e-5;

/// The same in bf16, whose units in the last place are 65,536 times as large (0.02 to 0.06 here). That decoding in bf16 is what
/// training in bf16 computes, nearer than that, is a test of `nsa-tests`.
const BF16_TOLERANCE: f64 = 0.1;

fn with_chunk(model: &Model, chunk: usize) -> nsa_decode::Session {
    model.session_with(SessionOptions { chunk, undo: 0 }).unwrap()
}

fn check(checkpoint: &Checkpoint, len: usize, chunks: &[usize]) {
    let (model, tokens) = (checkpoint.open(), tokens(11, len));
    let vocab = checkpoint.config.vocab_size();
    let expected = reference::logits(checkpoint, &tokens);
    let near = |got: &[f32], expected: &[f64], what: &str| {
        let error = relative_error(got, expected);
        assert!(error < TOLERANCE, "{what}: error {error:e}");
    };
    near(&with_chunk(&model, len).append_all(&tokens).unwrap(), &expected, "one pass");
    for &chunk in chunks {
        let mut session = with_chunk(&model, chunk);
        near(&session.append_all(&tokens).unwrap(), &expected, &format!("chunks of {chunk}"));
        near(session.logits().unwrap(), &expected[(len - 1) * vocab..], "last logits");
    }
    // A prompt, then token by token.
    for prompt in [1, len / 3] {
        let mut session = with_chunk(&model, len);
        session.push(&tokens[..prompt - 1]).unwrap();
        for (t, token) in tokens.iter().enumerate().skip(prompt - 1) {
            let logits = session.append(&[*token]).unwrap();
            near(logits, &expected[t * vocab..(t + 1) * vocab], &format!("token {t} after a prompt of {prompt}"));
        }
        let steps = session.reads().steps as usize;
        assert!(steps >= len - prompt && steps <= len - prompt + 1, "{steps} steps");
    }
}

fn nsa(fields: &mut ModelFields) -> &mut NsaFields {
    fields.nsa.as_mut().unwrap()
}

#[test]
fn mean() {
    check(&Checkpoint::new(small(CompressKind::Mean), 1), 61, &[1, 2, 7, 16, 60]);
}

#[test]
fn weighted_one_head_a_group() {
    let mut fields = small(CompressKind::Weighted);
    fields.num_key_value_heads = 4;
    check(&Checkpoint::new(fields, 2), 50, &[3, 8, 13]);
}

#[test]
fn linear_four_heads_a_group_and_a_stride_far_below_the_block() {
    let mut fields = small(CompressKind::Linear);
    fields.num_key_value_heads = 1;
    let nsa = nsa(&mut fields);
    (nsa.compress_block, nsa.compress_stride, nsa.select_block, nsa.window) = (12, 2, 14, 5);
    (nsa.select_initial, nsa.select_local, nsa.select_count) = (0, 1, 3);
    check(&Checkpoint::new(fields, 3), 53, &[1, 5, 12, 17]);
}

#[test]
fn mlp_with_everything() {
    let mut fields = small(CompressKind::Mlp);
    (fields.qk_norm, fields.tie_word_embeddings, fields.scale) = (true, true, Some(0.3));
    fields.rope_scaling = Some(RopeScaling {
        kind: RopeKind::Yarn,
        factor: 4.0,
        original_max_position_embeddings: 32,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: None,
    });
    check(&Checkpoint::new(fields, 4), 57, &[4, 9, 31]);
}

#[test]
fn mlp_without_biases_and_positions() {
    let mut fields = small(CompressKind::Mlp);
    let nsa = nsa(&mut fields);
    (nsa.compress_bias, nsa.compress_position, nsa.window) = (false, false, 1);
    (nsa.compress_block, nsa.compress_stride) = (4, 4);
    check(&Checkpoint::new(fields, 5), 40, &[1, 6]);
}

#[test]
fn normed_keys_of_every_kind() {
    for kind in [CompressKind::Mean, CompressKind::Weighted, CompressKind::Linear] {
        let fields = ModelFields { qk_norm: true, ..small(kind) };
        check(&Checkpoint::new(fields, 6), 33, &[5]);
    }
}

#[test]
fn contexts_across_pages() {
    // 256 rows a page of tokens, 64 of blocks: both are crossed after 256 tokens.
    check(&Checkpoint::new(small(CompressKind::Mean), 7), 300, &[1, 100, 257]);
}

#[test]
fn dense() {
    check(&Checkpoint::new(small_dense(), 8), 40, &[1, 7, 39]);
    check(&Checkpoint::new(ModelFields { qk_norm: true, num_key_value_heads: 1, ..small_dense() }, 9), 270, &[50]);
}

#[test]
fn weights_of_every_type_are_used_as_stored() {
    for dtype in [DType::Bf16, DType::F16] {
        let checkpoint = Checkpoint::with_dtype(small(CompressKind::Mlp), 10, |_| dtype);
        check(&checkpoint, 35, &[6]);
        assert_eq!(checkpoint.open().weights_info().dtypes.len(), 1);
    }
    let mixed = |name: &str| match name {
        name if name.contains("norm") || name.contains("bias") => DType::F32,
        name if name.contains("mlp") => DType::F16,
        _ => DType::Bf16,
    };
    check(&Checkpoint::with_dtype(small(CompressKind::Mlp), 11, mixed), 35, &[6]);
}

/// In bf16 a model differs from the loops by its rounding, prefill and steps from each other by as much; caches take half of the
/// bytes, whatever type the file has its numbers in.
#[test]
fn bf16_is_near() {
    for (kind, stored) in [
        (CompressKind::Mean, DType::F32),
        (CompressKind::Weighted, DType::Bf16),
        (CompressKind::Linear, DType::F16),
        (CompressKind::Mlp, DType::F32),
    ] {
        let mut fields = small(kind);
        fields.qk_norm = kind == CompressKind::Mlp;
        let checkpoint = Checkpoint::with_dtype(fields, 21, |_| stored);
        let (model, wide) = (checkpoint.open_in(Precision::Bf16), checkpoint.open_in(Precision::F32));
        assert_eq!([model.precision(), wide.precision()], [Precision::Bf16, Precision::F32]);
        let (tokens, vocab) = (tokens(12, 61), checkpoint.config.vocab_size());
        let expected = reference::logits(&checkpoint, &tokens);
        let mut session = with_chunk(&model, 17);
        let chunks = session.append_all(&tokens).unwrap();
        let error = relative_error(&chunks, &expected);
        assert!((1e-4..BF16_TOLERANCE).contains(&error), "{kind:?}: {error:e}");
        let mut other = with_chunk(&wide, 17);
        other.append_all(&tokens).unwrap();
        assert_eq!(2 * session.cache_bytes(), other.cache_bytes());
        let mut session = with_chunk(&model, 7);
        for (t, &token) in tokens.iter().enumerate() {
            let error = relative_error(session.append(&[token]).unwrap(), &expected[t * vocab..(t + 1) * vocab]);
            assert!(error < BF16_TOLERANCE, "{kind:?} {stored}, token {t}: {error:e}");
        }
    }
}
