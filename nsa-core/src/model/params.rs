//! The model's tensors: names, shapes, order, initial values, counts.

use super::config::{AttentionKind, ModelConfig};
use crate::{CompressKind, NsaConfig};

/// What a parameter is to the optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ParamKind {
    /// The token embedding, `[V, C]`: a matrix whose rows are looked up.
    Embedding,
    /// Learned products: projections, the head, φ of kind `linear` and `mlp`.
    Matrix,
    /// Everything else: norms, biases, position embeddings, φ of kind `weighted`.
    Vector,
}

impl ParamKind {
    /// Whether weight decay applies: to matrices, the embedding among them.
    pub fn decays(self) -> bool {
        self != Self::Vector
    }
}

/// Initial value of a parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Independent normal numbers of mean 0.
    Normal {
        /// Their standard deviation.
        std: f64,
    },
    /// One number everywhere.
    Constant(f64),
}

/// One tensor of the model.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamSpec {
    /// Name in the safetensors file.
    pub name: String,
    /// Shape, outermost first; matrices are `[out, in]`.
    pub shape: Vec<usize>,
    /// What it is to the optimizer.
    pub kind: ParamKind,
    /// Its initial value.
    pub init: Init,
}

impl ParamSpec {
    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it belongs to φ, its position embedding included: a decoding step needs it only where a compression block becomes
    /// complete.
    pub fn is_of_phi(&self) -> bool {
        [".self_attn.phi_", ".self_attn.pe_"].into_iter().any(|part| self.name.contains(part))
    }

    /// Whether it belongs to a routed expert, which only some tokens visit.
    fn is_routed_expert(&self) -> bool {
        self.name.contains(".mlp.experts.")
    }
}

/// The tensors of a model, in the order of every flat buffer (weights, gradients, optimizer state).
///
/// Initial values: matrices N(0, `initializer_range`), those that write to the residual stream (`o_proj`, `down_proj`)
/// divided by √(2·layers) so that its variance does not grow with depth; φ of kind `linear` and `mlp`
/// N(0, 1/√fan-in), which keeps the scale of the keys; φ of kind `weighted` starts as the mean; norms are 1, biases 0.
///
/// ```
/// use nsa_core::model::{ModelConfig, manifest};
/// let tensors = manifest(&ModelConfig::preset("bench-4m")?);
/// assert_eq!(tensors[0].name, "model.embed_tokens.weight");
/// assert_eq!(tensors.iter().map(|tensor| tensor.numel()).sum::<usize>(), 3_541_248);
/// # Ok::<(), nsa_core::ConfigError>(())
/// ```
pub fn manifest(config: &ModelConfig) -> Vec<ParamSpec> {
    let mut list = List { config, specs: Vec::new() };
    let (vocab, width) = (config.vocab_size(), config.hidden_size());
    let std = config.initializer_range();
    list.add("model.embed_tokens.weight", &[vocab, width], ParamKind::Embedding, Init::Normal { std });
    for layer in 0..config.num_hidden_layers() {
        let prefix = format!("model.layers.{layer}");
        list.norm(format!("{prefix}.input_layernorm.weight"), width);
        list.attention(&format!("{prefix}.self_attn"));
        list.norm(format!("{prefix}.post_attention_layernorm.weight"), width);
        list.mlp(&format!("{prefix}.mlp"), layer);
    }
    list.norm("model.norm.weight", width);
    if !config.tie_word_embeddings() {
        list.matrix("lm_head.weight", vocab, width);
    }
    list.specs
}

/// The manifest while it grows.
struct List<'a> {
    config: &'a ModelConfig,
    specs: Vec<ParamSpec>,
}

impl List<'_> {
    fn add(&mut self, name: impl Into<String>, shape: &[usize], kind: ParamKind, init: Init) {
        self.specs.push(ParamSpec { name: name.into(), shape: shape.to_vec(), kind, init });
    }

    fn norm(&mut self, name: impl Into<String>, width: usize) {
        self.add(name, &[width], ParamKind::Vector, Init::Constant(1.0));
    }

    fn matrix(&mut self, name: impl Into<String>, rows: usize, columns: usize) {
        let std = self.config.initializer_range();
        self.add(name, &[rows, columns], ParamKind::Matrix, Init::Normal { std });
    }

    /// A matrix whose product is added to the residual stream, twice a layer.
    fn residual_matrix(&mut self, name: String, columns: usize) {
        let writes = 2.0 * self.config.num_hidden_layers() as f64;
        let std = self.config.initializer_range() / writes.sqrt();
        self.add(name, &[self.config.hidden_size(), columns], ParamKind::Matrix, Init::Normal { std });
    }

    fn attention(&mut self, prefix: &str) {
        let config = self.config;
        let (heads, groups) = (config.num_attention_heads(), config.num_key_value_heads());
        let (dim_k, dim_v, width) = (config.head_dim(), config.v_head_dim(), config.hidden_size());
        let branches: &[&str] = match config.attention() {
            AttentionKind::Nsa => &["_cmp", "_slc", "_win"],
            AttentionKind::Dense => &[""],
        };
        self.matrix(format!("{prefix}.q_proj.weight"), heads * dim_k, width);
        for branch in branches {
            self.matrix(format!("{prefix}.k{branch}_proj.weight"), groups * dim_k, width);
        }
        for branch in branches {
            self.matrix(format!("{prefix}.v{branch}_proj.weight"), groups * dim_v, width);
        }
        if let Some(nsa) = config.nsa_config() {
            self.matrix(format!("{prefix}.gate_proj.weight"), 3 * heads, width);
            self.add(format!("{prefix}.gate_proj.bias"), &[3 * heads], ParamKind::Vector, Init::Constant(0.0));
            self.compression(prefix, &nsa);
        }
        if config.qk_norm() {
            self.norm(format!("{prefix}.q_norm.weight"), dim_k);
            for branch in branches {
                self.norm(format!("{prefix}.k{branch}_norm.weight"), dim_k);
            }
        }
        self.residual_matrix(format!("{prefix}.o_proj.weight"), heads * dim_v);
    }

    fn compression(&mut self, prefix: &str, nsa: &NsaConfig) {
        let sides = [("k", nsa.head_dim_qk()), ("v", nsa.head_dim_v())];
        for (side, dim) in sides {
            self.phi(&format!("{prefix}.phi_{side}"), nsa, dim);
        }
        if self.config.compress_position() {
            let init = Init::Normal { std: self.config.initializer_range() };
            for (side, dim) in sides {
                let shape = [nsa.compress_block(), nsa.num_kv_heads(), dim];
                self.add(format!("{prefix}.pe_{side}"), &shape, ParamKind::Vector, init);
            }
        }
    }

    fn phi(&mut self, prefix: &str, nsa: &NsaConfig, dim: usize) {
        let (block, groups) = (nsa.compress_block(), nsa.num_kv_heads());
        let zero = Init::Constant(0.0);
        let products = |fan_in: usize| Init::Normal { std: (fan_in as f64).sqrt().recip() };
        match nsa.compress_kind() {
            CompressKind::Mean => {}
            CompressKind::Weighted => {
                let mean = Init::Constant((block as f64).recip());
                self.add(format!("{prefix}.weight"), &[block, groups], ParamKind::Vector, mean);
            }
            CompressKind::Linear => {
                let shape = [groups, block * dim, dim];
                self.add(format!("{prefix}.weight"), &shape, ParamKind::Matrix, products(block * dim));
            }
            CompressKind::Mlp => {
                let hidden = nsa.compress_hidden().expect("a checked `mlp` has a hidden width");
                for (stage, rows, columns) in [(0, block * dim, hidden), (2, hidden, dim)] {
                    let shape = [groups, rows, columns];
                    self.add(format!("{prefix}.{stage}.weight"), &shape, ParamKind::Matrix, products(rows));
                    if self.config.compress_bias() {
                        self.add(format!("{prefix}.{stage}.bias"), &[groups, columns], ParamKind::Vector, zero);
                    }
                }
            }
        }
    }

    fn mlp(&mut self, prefix: &str, layer: usize) {
        let Some(moe) = self.config.moe().filter(|_| self.config.is_moe_layer(layer)) else {
            return self.swiglu(prefix, self.config.intermediate_size());
        };
        self.matrix(format!("{prefix}.gate.weight"), moe.routed, self.config.hidden_size());
        for expert in 0..moe.routed {
            self.swiglu(&format!("{prefix}.experts.{expert}"), moe.intermediate);
        }
        // As in DeepSeekMoE, the shared experts are one MLP of their summed width.
        if moe.shared > 0 {
            self.swiglu(&format!("{prefix}.shared_experts"), moe.shared * moe.intermediate);
        }
    }

    fn swiglu(&mut self, prefix: &str, intermediate: usize) {
        let width = self.config.hidden_size();
        self.matrix(format!("{prefix}.gate_proj.weight"), intermediate, width);
        self.matrix(format!("{prefix}.up_proj.weight"), intermediate, width);
        self.residual_matrix(format!("{prefix}.down_proj.weight"), intermediate);
    }
}

/// Parameters of a model, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ParamCounts {
    /// All of them.
    pub total: u64,
    /// Those that one token passes: all but the routed experts that it does not visit.
    pub active: u64,
    /// Embedding and, unless tied, head.
    pub embedding: u64,
    /// Attention of all layers, φ and gates included.
    pub attention: u64,
    /// MLPs and experts of all layers.
    pub mlp: u64,
    /// MLPs and experts of all layers that one token passes.
    pub active_mlp: u64,
}

/// Counts the parameters of a model.
pub fn param_counts(config: &ModelConfig) -> ParamCounts {
    let mut counts = ParamCounts::default();
    let mut routed = 0u64;
    for spec in manifest(config) {
        let numel = spec.numel() as u64;
        let part = match () {
            () if spec.name.contains(".self_attn.") => Some(&mut counts.attention),
            () if spec.name.contains(".mlp.") => Some(&mut counts.mlp),
            () if spec.name.ends_with("norm.weight") => None,
            () => Some(&mut counts.embedding),
        };
        if let Some(part) = part {
            *part = part.saturating_add(numel);
        }
        counts.total = counts.total.saturating_add(numel);
        if spec.is_routed_expert() {
            routed = routed.saturating_add(numel);
        }
    }
    let idle = match config.moe() {
        Some(moe) => routed / moe.routed as u64 * (moe.routed - moe.per_token) as u64,
        None => 0,
    };
    counts.active = counts.total - idle;
    counts.active_mlp = counts.mlp - idle;
    counts
}
