//! The model's tensors and its memory plan.

use nsa_core::model::{
    AttentionKind, Init, ModelConfig, ModelFields, ParamKind, ParamSpec, kv_cache_bytes, manifest, memory_plan,
    param_counts,
};
use nsa_core::{CompressKind, DType};
use std::collections::HashSet;

/// Name and shape of a tensor.
type Named<'a> = (&'a str, &'a [usize]);

/// Two layers with V, C, F = 256, 24, 40; 4 heads of Dk = 6, Dv = 10 on 2 KV heads; l, d, l' = 8, 4, 16; H = 5.
fn model(change: impl FnOnce(&mut ModelFields)) -> ModelConfig {
    let mut fields = ModelConfig::preset("tiny-1m").expect("a preset").to_fields();
    (fields.hidden_size, fields.intermediate_size, fields.num_hidden_layers) = (24, 40, 2);
    (fields.head_dim, fields.v_head_dim) = (Some(6), Some(10));
    let nsa = fields.nsa.as_mut().expect("a section");
    (nsa.compress_block, nsa.compress_stride, nsa.select_block, nsa.window) = (8, 4, 16, 12);
    (nsa.select_count, nsa.compress_hidden) = (4, Some(5));
    change(&mut fields);
    ModelConfig::new(fields).expect("valid")
}

/// Names and shapes of the tensors that belong to `prefix`, the prefix left out.
fn shapes(config: &ModelConfig, prefix: &str) -> Vec<(String, Vec<usize>)> {
    let within = |spec: &ParamSpec| Some((spec.name.strip_prefix(prefix)?.to_owned(), spec.shape.clone()));
    manifest(config).iter().filter_map(within).collect()
}

#[track_caller]
fn same(got: Vec<(String, Vec<usize>)>, expected: &[Named]) {
    let expected: Vec<_> = expected.iter().map(|(name, shape)| ((*name).to_owned(), shape.to_vec())).collect();
    assert_eq!(got, expected);
}

#[test]
fn sparse_models_have_these_tensors_in_this_order() {
    let config = model(|f| f.qk_norm = true);
    let specs = manifest(&config);
    let per_layer = specs.iter().filter(|spec| spec.name.starts_with("model.layers.1.")).count();
    assert_eq!(specs.len(), 3 + 2 * per_layer);
    assert_eq!((specs[0].name.as_str(), &specs[0].shape[..]), ("model.embed_tokens.weight", &[256, 24][..]));
    let first: Vec<_> = shapes(&config, "model.layers.0.");
    assert_eq!(first, shapes(&config, "model.layers.1."));
    same(shapes(&config, "model.norm."), &[("weight", &[24])]);
    same(shapes(&config, "lm_head."), &[("weight", &[256, 24])]);
    assert_eq!(specs.last().map(|spec| spec.name.as_str()), Some("lm_head.weight"));
    same(
        first,
        &[
            ("input_layernorm.weight", &[24]),
            ("self_attn.q_proj.weight", &[24, 24]),
            ("self_attn.k_cmp_proj.weight", &[12, 24]),
            ("self_attn.k_slc_proj.weight", &[12, 24]),
            ("self_attn.k_win_proj.weight", &[12, 24]),
            ("self_attn.v_cmp_proj.weight", &[20, 24]),
            ("self_attn.v_slc_proj.weight", &[20, 24]),
            ("self_attn.v_win_proj.weight", &[20, 24]),
            ("self_attn.gate_proj.weight", &[12, 24]),
            ("self_attn.gate_proj.bias", &[12]),
            ("self_attn.phi_k.0.weight", &[2, 48, 5]),
            ("self_attn.phi_k.0.bias", &[2, 5]),
            ("self_attn.phi_k.2.weight", &[2, 5, 6]),
            ("self_attn.phi_k.2.bias", &[2, 6]),
            ("self_attn.phi_v.0.weight", &[2, 80, 5]),
            ("self_attn.phi_v.0.bias", &[2, 5]),
            ("self_attn.phi_v.2.weight", &[2, 5, 10]),
            ("self_attn.phi_v.2.bias", &[2, 10]),
            ("self_attn.pe_k", &[8, 2, 6]),
            ("self_attn.pe_v", &[8, 2, 10]),
            ("self_attn.q_norm.weight", &[6]),
            ("self_attn.k_cmp_norm.weight", &[6]),
            ("self_attn.k_slc_norm.weight", &[6]),
            ("self_attn.k_win_norm.weight", &[6]),
            ("self_attn.o_proj.weight", &[24, 40]),
            ("post_attention_layernorm.weight", &[24]),
            ("mlp.gate_proj.weight", &[40, 24]),
            ("mlp.up_proj.weight", &[40, 24]),
            ("mlp.down_proj.weight", &[24, 40]),
        ],
    );
}

#[test]
fn dense_models_have_these_tensors_in_this_order() {
    let config = model(|f| (f.attention, f.qk_norm, f.tie_word_embeddings) = (AttentionKind::Dense, true, true));
    same(
        shapes(&config, "model.layers.0.self_attn."),
        &[
            ("q_proj.weight", &[24, 24]),
            ("k_proj.weight", &[12, 24]),
            ("v_proj.weight", &[20, 24]),
            ("q_norm.weight", &[6]),
            ("k_norm.weight", &[6]),
            ("o_proj.weight", &[24, 40]),
        ],
    );
    assert_eq!(manifest(&config).last().map(|spec| spec.name.clone()), Some("model.norm.weight".to_owned()));
    let plain = model(|f| f.attention = AttentionKind::Dense);
    assert!(shapes(&plain, "model.layers.0.self_attn.").iter().all(|(name, _)| !name.contains("norm")));
}

#[test]
fn every_phi_has_its_tensors() {
    let phi = |kind, bias, position| {
        let config = model(|f| {
            let nsa = f.nsa.as_mut().expect("a section");
            (nsa.compress_kind, nsa.compress_bias, nsa.compress_position) = (kind, bias, position);
        });
        let all = shapes(&config, "model.layers.0.self_attn.");
        all.into_iter().filter(|(name, _)| name.starts_with("phi") || name.starts_with("pe")).collect::<Vec<_>>()
    };
    let (pe_k, pe_v): (Named, Named) = (("pe_k", &[8, 2, 6]), ("pe_v", &[8, 2, 10]));
    same(phi(CompressKind::Mean, true, false), &[]);
    same(phi(CompressKind::Mean, true, true), &[pe_k, pe_v]);
    let weighted: [Named; 2] = [("phi_k.weight", &[8, 2]), ("phi_v.weight", &[8, 2])];
    same(phi(CompressKind::Weighted, true, true), &[weighted[0], weighted[1], pe_k, pe_v]);
    let linear: [Named; 2] = [("phi_k.weight", &[2, 48, 6]), ("phi_v.weight", &[2, 80, 10])];
    same(phi(CompressKind::Linear, true, false), &linear);
    let bare: [Named; 4] = [
        ("phi_k.0.weight", &[2, 48, 5]),
        ("phi_k.2.weight", &[2, 5, 6]),
        ("phi_v.0.weight", &[2, 80, 5]),
        ("phi_v.2.weight", &[2, 5, 10]),
    ];
    same(phi(CompressKind::Mlp, false, false), &bare);
}

/// Two layers, of which the second has 3 routed experts, 2 visited, and 2 shared ones, of width 7.
fn experts() -> ModelConfig {
    model(|f| {
        (f.n_routed_experts, f.n_shared_experts, f.num_experts_per_tok) = (Some(3), Some(2), Some(2));
        (f.moe_intermediate_size, f.first_k_dense_replace) = (Some(7), Some(1));
    })
}

#[test]
fn experts_have_their_tensors_and_count_as_active_when_visited() {
    let config = experts();
    assert_eq!(shapes(&config, "model.layers.0.mlp.").len(), 3);
    let expected: Vec<(String, Vec<usize>)> = std::iter::once(("gate.weight".to_owned(), vec![3, 24]))
        .chain([("experts.0", 7), ("experts.1", 7), ("experts.2", 7), ("shared_experts", 14)].into_iter().flat_map(
            |(name, width)| {
                [("gate", [width, 24]), ("up", [width, 24]), ("down", [24, width])]
                    .map(|(part, shape)| (format!("{name}.{part}_proj.weight"), shape.to_vec()))
            },
        ))
        .collect();
    assert_eq!(shapes(&config, "model.layers.1.mlp."), expected);
    let counts = param_counts(&config);
    assert_eq!(counts.total - counts.active, 3 * 24 * 7);
    assert_eq!(counts.mlp - counts.active_mlp, 3 * 24 * 7);
    assert_eq!(counts.mlp, 3 * 24 * 40 + 3 * 24 + 5 * 3 * 24 * 7);
    assert_eq!(counts.embedding, 2 * 256 * 24);
    let norms = 2 * 2 * 24 + 24;
    assert_eq!(counts.total, counts.embedding + counts.attention + counts.mlp + norms);
    let attention: usize =
        shapes(&config, "model.layers.0.self_attn.").iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    assert_eq!(counts.attention, 2 * attention as u64);
}

#[test]
fn kinds_and_initial_values() {
    for kind in [CompressKind::Mean, CompressKind::Weighted, CompressKind::Linear, CompressKind::Mlp] {
        let config = model(|f| {
            f.qk_norm = true;
            f.initializer_range = 0.5;
            f.nsa.as_mut().expect("a section").compress_kind = kind;
        });
        let specs = manifest(&config);
        assert_eq!(specs.iter().map(|spec| &spec.name).collect::<HashSet<_>>().len(), specs.len(), "names differ");
        for spec in &specs {
            let name = spec.name.rsplit("self_attn.").next().expect("a name");
            let weighted = kind == CompressKind::Weighted && name.starts_with("phi");
            let vector = weighted || name.contains("norm") || name.ends_with("bias") || name.starts_with("pe_");
            assert_eq!(spec.kind.decays(), !vector, "{name}");
            assert_eq!(spec.kind == ParamKind::Embedding, name == "model.embed_tokens.weight", "{name}");
            let expected = match name {
                _ if weighted => Init::Constant(1.0 / 8.0),
                _ if name.ends_with("bias") => Init::Constant(0.0),
                _ if name.contains("norm") => Init::Constant(1.0),
                _ if name.contains("o_proj") || name.contains("down_proj") => Init::Normal { std: 0.5 / 2.0 },
                "phi_k.weight" | "phi_k.0.weight" => Init::Normal { std: 48f64.sqrt().recip() },
                "phi_v.weight" | "phi_v.0.weight" => Init::Normal { std: 80f64.sqrt().recip() },
                "phi_k.2.weight" | "phi_v.2.weight" => Init::Normal { std: 5f64.sqrt().recip() },
                _ => Init::Normal { std: 0.5 },
            };
            assert_eq!(spec.init, expected, "{name}");
        }
    }
}

/// What one sequence's cache holds, token by token: rows of K and V of each kind.
fn cache_rows(context: usize) -> usize {
    let mut complete_blocks = 0;
    for t in 0..context {
        complete_blocks += usize::from(t + 1 >= 8 && (t + 1 - 8) % 4 == 0);
    }
    let (block_ring, window_ring) = (8, 12);
    context + complete_blocks + block_ring + window_ring
}

#[test]
fn the_cache_is_what_the_specification_keeps() {
    let sparse = model(|_| ());
    let row = 2 * (6 + 10) * 2;
    for context in [0, 1, 7, 8, 11, 12, 100] {
        assert_eq!(kv_cache_bytes(&sparse, context, DType::F32), (cache_rows(context) * row * 4) as u64);
        assert_eq!(kv_cache_bytes(&sparse, context, DType::Bf16), (cache_rows(context) * row * 2) as u64);
    }
    let dense = model(|f| f.attention = AttentionKind::Dense);
    assert_eq!(kv_cache_bytes(&dense, 100, DType::F32), (100 * row * 4) as u64);
    let plan = memory_plan(&sparse, 1);
    assert_eq!((plan.context, plan.kv_cache_bytes), (1024, kv_cache_bytes(&sparse, 1024, DType::F32)));
    assert_eq!(2 * plan.kv_cache_bf16_bytes, plan.kv_cache_bytes);
    // On average over a stride.
    let growth = kv_cache_bytes(&sparse, 1004, DType::F32) - kv_cache_bytes(&sparse, 1000, DType::F32);
    assert_eq!(4 * plan.kv_cache_bytes_per_token, growth);
    assert_eq!(memory_plan(&dense, 1).kv_cache_bytes_per_token, (row * 4) as u64);
}

#[test]
fn activations_are_the_tensors_that_backward_needs() {
    let tokens = 50;
    let blocks = (tokens - 8) / 4 + 1;
    let sparse_attention: usize = [
        tokens * 4 * 6,                  // q
        3 * tokens * 2 * (6 + 10),       // keys and values of the branches
        4 * tokens * 4 * 10,             // outputs of the branches, and joined
        tokens * 4 * 3 + tokens * 4 * 3, // lse, gates
        tokens * 2 * 4,                  // block indices
        blocks * 2 * (6 + 10),           // compressed keys and values
        blocks * 2 * 2 * 2 * 5,          // φ of both, before and after GELU
    ]
    .iter()
    .sum();
    let dense_attention = tokens * 4 * 6 + tokens * 2 * (6 + 10) + tokens * 4 * 10 + tokens * 4;
    let streams = tokens * 4 * 24;
    let mlp = tokens * 3 * 40;
    let outer = tokens * (2 * 24 + 1);
    let activations = |config: &ModelConfig| memory_plan(config, tokens).activations_bytes;
    assert_eq!(activations(&model(|_| ())), (4 * (2 * (sparse_attention + streams + mlp) + outer)) as u64);
    let dense = model(|f| f.attention = AttentionKind::Dense);
    assert_eq!(activations(&dense), (4 * (2 * (dense_attention + streams + mlp) + outer)) as u64);
    let visited = tokens * (3 * (2 + 2) * 7 + 3);
    assert_eq!(activations(&experts()), (4 * (2 * (sparse_attention + streams) + mlp + visited + outer)) as u64);
}

#[test]
fn the_plan_adds_up_and_prints() {
    let config = ModelConfig::preset("paper-27b").expect("a preset");
    let plan = memory_plan(&config, 8192);
    let total = plan.params.total;
    assert_eq!((plan.weights_bytes, plan.gradients_bytes, plan.optimizer_bytes), (4 * total, 4 * total, 8 * total));
    assert_eq!(plan.training_bytes(), 16 * total + plan.activations_bytes);
    let table = plan.to_string();
    for line in ["parameters 27.01B", "active for one token 5.37B", "weights (f32) 100.61 GiB"] {
        let found = table.lines().any(|row| row.split_whitespace().collect::<Vec<_>>().join(" ") == line);
        assert!(found, "no line `{line}` in\n{table}");
    }
    let widths: HashSet<usize> = table.lines().map(|row| row.chars().count()).collect();
    assert_eq!(widths.len(), 1, "the figures stand in one column:\n{table}");
    // Sizes that no machine has saturate instead of wrapping.
    let absurd = model(|f| {
        (f.intermediate_size, f.num_hidden_layers) = (i32::MAX as usize, 3);
        f.hidden_size = i32::MAX as usize;
    });
    assert_eq!(memory_plan(&absurd, usize::MAX).training_bytes(), u64::MAX);
}
