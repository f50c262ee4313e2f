//! The whole model as plain f64 loops over the reference operator: one forward pass, no cache.

use crate::kit::{Checkpoint, Stored};
use nsa_core::model::{AttentionKind, ModelConfig, rope_frequencies};
use nsa_core::{CompressKind, CuSeqlens, NsaConfig, Packing};
use nsa_ref::compress::{self, Phi};
use nsa_ref::nsa::{Compressed, Inputs};
use nsa_ref::{Exact, Tensor, branch, dense, nsa};

/// Logits of every token, `[tokens, V]`.
pub fn logits(checkpoint: &Checkpoint, tokens: &[u32]) -> Vec<f64> {
    let config = &checkpoint.config;
    let mut x: Vec<Vec<f64>> = {
        let embed = checkpoint.get("model.embed_tokens.weight");
        tokens.iter().map(|&token| embed.row(&[token as usize]).to_vec()).collect()
    };
    for layer in 0..config.num_hidden_layers() {
        let prefix = format!("model.layers.{layer}");
        let h = norm(config, &x, &checkpoint.get(&format!("{prefix}.input_layernorm.weight")));
        let o = attention(checkpoint, &format!("{prefix}.self_attn"), &h);
        add(&mut x, &linear(&o, &checkpoint.get(&format!("{prefix}.self_attn.o_proj.weight"))));
        let h = norm(config, &x, &checkpoint.get(&format!("{prefix}.post_attention_layernorm.weight")));
        let part = |name: &str, x: &[Vec<f64>]| linear(x, &checkpoint.get(&format!("{prefix}.mlp.{name}_proj.weight")));
        let (mut gate, up) = (part("gate", &h), part("up", &h));
        for (gate, up) in gate.iter_mut().flatten().zip(up.iter().flatten()) {
            *gate *= up / (1.0 + (-*gate).exp());
        }
        add(&mut x, &part("down", &gate));
    }
    let h = norm(config, &x, &checkpoint.get("model.norm.weight"));
    let head = if config.tie_word_embeddings() { "model.embed_tokens.weight" } else { "lm_head.weight" };
    linear(&h, &checkpoint.get(head)).concat()
}

impl Checkpoint {
    fn get(&self, name: &str) -> Tensor {
        self.find(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    fn find(&self, name: &str) -> Option<Tensor> {
        self.tensors.get(name).map(|Stored { shape, data, .. }| Tensor::new(shape, data.clone()))
    }
}

fn attention(checkpoint: &Checkpoint, prefix: &str, h: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let config = &checkpoint.config;
    let (heads, kv_heads) = (config.num_attention_heads(), config.num_key_value_heads());
    let positions: Vec<usize> = (0..h.len()).collect();
    let project = |name: &str| linear(h, &checkpoint.get(&format!("{prefix}.{name}_proj.weight")));
    let keys = |name: &str, heads: usize| {
        let x = tensor(project(name), heads);
        rotate(config, head_norm(checkpoint, prefix, name, x), &positions)
    };
    let packing = Packing::new(CuSeqlens::single(h.len()).unwrap());
    let q = keys("q", heads);
    let o = match config.attention() {
        AttentionKind::Dense => {
            let (k, v) = (keys("k", kv_heads), tensor(project("v"), kv_heads));
            let operator = NsaConfig::builder(heads, kv_heads, config.head_dim(), config.v_head_dim())
                .compress_kind(CompressKind::Mean)
                .scale(config.scale())
                .build()
                .unwrap();
            dense::forward(&Exact, &operator, &packing, &branch::Inputs { q: &q, k: &k, v: &v }).unwrap().o
        }
        AttentionKind::Nsa => {
            let operator = config.nsa_config().unwrap();
            let bias = checkpoint.get(&format!("{prefix}.gate_proj.bias"));
            let mut gates = project("gate");
            for row in &mut gates {
                row.iter_mut().zip(&bias.data).for_each(|(x, b)| *x = 1.0 / (1.0 + (-*x - b).exp()));
            }
            let block = |side: &str| {
                let x = tensor(project(&format!("{side}_cmp")), kv_heads);
                let position = checkpoint.find(&format!("{prefix}.pe_{side}"));
                let phi = phi(checkpoint, &format!("{prefix}.phi_{side}"), &operator);
                compress::forward(&Exact, &operator, &packing, &x, position.as_ref(), &phi).unwrap()
            };
            let k_blocks = head_norm(checkpoint, prefix, "k_cmp", block("k"));
            let starts: Vec<usize> = (0..k_blocks.shape[0]).map(|i| i * operator.compress_stride()).collect();
            let inputs = Inputs {
                q,
                gates: Tensor::new(&[h.len(), heads, 3], gates.concat()),
                cmp: Compressed::Blocks { k: rotate(config, k_blocks, &starts), v: block("v") },
                k_slc: keys("k_slc", kv_heads),
                v_slc: tensor(project("v_slc"), kv_heads),
                k_win: keys("k_win", kv_heads),
                v_win: tensor(project("v_win"), kv_heads),
                block_indices: None,
            };
            nsa::forward(&Exact, &operator, &packing, &inputs).unwrap().o
        }
    };
    o.data.chunks(heads * config.v_head_dim()).map(<[f64]>::to_vec).collect()
}

fn phi(checkpoint: &Checkpoint, prefix: &str, operator: &NsaConfig) -> Phi {
    let get = |name: &str| checkpoint.get(&format!("{prefix}.{name}"));
    let find = |name: &str| checkpoint.find(&format!("{prefix}.{name}"));
    match operator.compress_kind() {
        CompressKind::Mean => Phi::Mean,
        CompressKind::Weighted => Phi::Weighted { weight: get("weight") },
        CompressKind::Linear => Phi::Linear { weight: get("weight") },
        CompressKind::Mlp => Phi::Mlp {
            weight1: get("0.weight"),
            bias1: find("0.bias"),
            weight2: get("2.weight"),
            bias2: find("2.bias"),
        },
    }
}

/// `[N, heads, D]`.
fn tensor(rows: Vec<Vec<f64>>, heads: usize) -> Tensor {
    let dim = rows[0].len() / heads;
    Tensor::new(&[rows.len(), heads, dim], rows.concat())
}

/// y_o = Σ_i w_oi·x_i.
fn linear(x: &[Vec<f64>], weight: &Tensor) -> Vec<Vec<f64>> {
    let dot = |row: &[f64], o: usize| weight.row(&[o]).iter().zip(row).map(|(w, x)| w * x).sum();
    x.iter().map(|row| (0..weight.shape[0]).map(|o| dot(row, o)).collect()).collect()
}

fn norm(config: &ModelConfig, x: &[Vec<f64>], weight: &Tensor) -> Vec<Vec<f64>> {
    let row = |row: &Vec<f64>| {
        let square = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
        let rstd = (square + config.rms_norm_eps()).sqrt().recip();
        row.iter().zip(&weight.data).map(|(x, w)| x * rstd * w).collect()
    };
    x.iter().map(row).collect()
}

/// The norm of each head, if the model has one.
fn head_norm(checkpoint: &Checkpoint, prefix: &str, name: &str, x: Tensor) -> Tensor {
    let Some(weight) = checkpoint.find(&format!("{prefix}.{name}_norm.weight")) else { return x };
    if x.data.is_empty() {
        return x;
    }
    let heads: Vec<Vec<f64>> = x.data.chunks(weight.data.len()).map(<[f64]>::to_vec).collect();
    Tensor::new(&x.shape, norm(&checkpoint.config, &heads, &weight).concat())
}

/// Rotates pairs (i, i + D/2) of each row by the row's position.
fn rotate(config: &ModelConfig, x: Tensor, positions: &[usize]) -> Tensor {
    let table = rope_frequencies(config);
    let half = x.shape[2] / 2;
    let mut y = x.clone();
    for (n, &position) in positions.iter().enumerate() {
        for head in 0..x.shape[1] {
            let (from, to) = (x.row(&[n, head]), y.row_mut(&[n, head]));
            for i in 0..half {
                let (sin, cos) = (position as f64 * table.inv_freq[i]).sin_cos();
                to[i] = table.attention_factor * (from[i] * cos - from[i + half] * sin);
                to[i + half] = table.attention_factor * (from[i + half] * cos + from[i] * sin);
            }
        }
    }
    y
}

fn add(x: &mut [Vec<f64>], y: &[Vec<f64>]) {
    x.iter_mut().flatten().zip(y.iter().flatten()).for_each(|(x, y)| *x += y);
}
