//! φ: compression blocks of keys or values (SPEC 2.1).

use crate::{Arithmetic, Error, Result, Tensor};
use nsa_core::{CompressKind, NsaConfig, Packing};

/// The weights of φ, one set a KV head; D is Dk for keys and Dv for values.
#[derive(Clone, Debug, PartialEq)]
pub enum Phi {
    /// Average over the block.
    Mean,
    /// Σ_p a_p·token p.
    Weighted {
        /// `[l, G]`.
        weight: Tensor,
    },
    /// The flattened block (token-major) times a matrix.
    Linear {
        /// `[G, l·D, D]`.
        weight: Tensor,
    },
    /// Linear, GELU (erf form), linear.
    Mlp {
        /// `[G, l·D, H]`.
        weight1: Tensor,
        /// `[G, H]`.
        bias1: Option<Tensor>,
        /// `[G, H, D]`.
        weight2: Tensor,
        /// `[G, D]`.
        bias2: Option<Tensor>,
    },
}

impl Phi {
    /// The same kind with zeros for weights: where gradients are gathered.
    pub fn zeros_like(&self) -> Self {
        let zeros = |t: &Tensor| Tensor::zeros(&t.shape);
        match self {
            Self::Mean => Self::Mean,
            Self::Weighted { weight } => Self::Weighted { weight: zeros(weight) },
            Self::Linear { weight } => Self::Linear { weight: zeros(weight) },
            Self::Mlp { weight1, bias1, weight2, bias2 } => Self::Mlp {
                weight1: zeros(weight1),
                bias1: bias1.as_ref().map(zeros),
                weight2: zeros(weight2),
                bias2: bias2.as_ref().map(zeros),
            },
        }
    }

    /// Which φ it is.
    fn kind(&self) -> CompressKind {
        match self {
            Self::Mean => CompressKind::Mean,
            Self::Weighted { .. } => CompressKind::Weighted,
            Self::Linear { .. } => CompressKind::Linear,
            Self::Mlp { .. } => CompressKind::Mlp,
        }
    }

    /// Checks kind and shapes for tokens of `dim` elements; `name` is what errors call this φ.
    ///
    /// # Errors
    /// If the configuration has another φ, or a weight's shape does not fit.
    pub fn check(&self, op: &'static str, name: &str, config: &NsaConfig, dim: usize) -> Result<()> {
        if self.kind() != config.compress_kind() {
            let value = format!("{:?}", self.kind()).to_lowercase();
            let rule = "must be of the configuration's compress_kind";
            return Err(Error::Value { op, arg: name.to_owned(), value, rule });
        }
        let (l, groups) = (config.compress_block(), config.num_kv_heads());
        let check = |tensor: &Tensor, part: &str, shape: &[usize]| tensor.check(op, &format!("{name}.{part}"), shape);
        match self {
            Self::Mean => {}
            Self::Weighted { weight } => check(weight, "weight", &[l, groups])?,
            Self::Linear { weight } => check(weight, "weight", &[groups, l * dim, dim])?,
            Self::Mlp { weight1, bias1, weight2, bias2 } => {
                let hidden = config.compress_hidden().expect("a configuration with an mlp has it");
                check(weight1, "0.weight", &[groups, l * dim, hidden])?;
                check(weight2, "2.weight", &[groups, hidden, dim])?;
                bias1.as_ref().map_or(Ok(()), |b| check(b, "0.bias", &[groups, hidden]))?;
                bias2.as_ref().map_or(Ok(()), |b| check(b, "2.bias", &[groups, dim]))?;
            }
        }
        Ok(())
    }
}

/// Gradients of [`forward`], in the accumulator.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradients {
    /// `[N, G, D]`.
    pub dx: Tensor,
    /// `[l, G, D]`, if there is an embedding.
    pub d_position: Option<Tensor>,
    /// In the shapes of the weights.
    pub d_phi: Phi,
}

/// GELU in its erf form: x·Φ(x).
pub fn gelu(x: f64) -> f64 {
    x * normal(x)
}

/// Derivative of [`gelu`]: Φ(x) + x·φ(x).
pub fn gelu_derivative(x: f64) -> f64 {
    let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
    normal(x) + x * density
}

/// Φ(x) = (1 + erf(x/√2)) / 2, written so that far negative x keep their digits.
fn normal(x: f64) -> f64 {
    0.5 * libm::erfc(-x * std::f64::consts::FRAC_1_SQRT_2)
}

/// Block i of each sequence = φ(x[i·d .. i·d + l] + e), `[M, G, D]` packed per sequence.
///
/// **Shapes**: x `[N, G, D]`, position embedding e `[l, G, D]`; every sequence starts at position 0.
///
/// **Source**: paper equation 7; SPEC 2.1.
///
/// # Errors
/// If a shape does not fit, φ is not of the configuration's kind, or a sequence has a context.
pub fn forward<A: Arithmetic>(
    a: &A,
    config: &NsaConfig,
    packing: &Packing,
    x: &Tensor,
    position: Option<&Tensor>,
    phi: &Phi,
) -> Result<Tensor> {
    let dim = check(config, packing, x, position, phi)?;
    let cu_blocks = packing.cu_blocks(config)?;
    let mut blocks = Tensor::zeros(&[cu_blocks.total(), config.num_kv_heads(), dim]);
    for_each_block(config, packing, |block, first, g| {
        let input = gather(a, config, x, position, first, g);
        let output = apply(a, phi, g, &input, dim).output;
        for (y, x) in blocks.row_mut(&[block, g]).iter_mut().zip(output) {
            *y = a.store(x);
        }
    })?;
    Ok(blocks)
}

/// Gradients of [`forward`] given that of the blocks `[M, G, D]`, in the accumulator. Tokens in no block get 0; one in
/// several sums over them, and so do e and the weights over all blocks.
///
/// **Source**: SPEC 3.
///
/// # Errors
/// If a shape does not fit, φ is not of the configuration's kind, or a sequence has a context.
pub fn backward<A: Arithmetic>(
    a: &A,
    config: &NsaConfig,
    packing: &Packing,
    x: &Tensor,
    position: Option<&Tensor>,
    phi: &Phi,
    d_blocks: &Tensor,
) -> Result<Gradients> {
    let dim = check(config, packing, x, position, phi)?;
    d_blocks.check("compress", "d_blocks", &[packing.cu_blocks(config)?.total(), config.num_kv_heads(), dim])?;
    let mut grads = Gradients {
        dx: Tensor::zeros(&x.shape),
        d_position: position.map(|e| Tensor::zeros(&e.shape)),
        d_phi: phi.zeros_like(),
    };
    for_each_block(config, packing, |block, first, g| {
        let input = gather(a, config, x, position, first, g);
        let d_input = apply_backward(a, phi, g, &input, d_blocks.row(&[block, g]), &mut grads.d_phi);
        for (p, d_token) in d_input.chunks(dim).enumerate() {
            a.add_scaled(grads.dx.row_mut(&[first + p, g]), 1.0, d_token);
            if let Some(d_position) = &mut grads.d_position {
                a.add_scaled(d_position.row_mut(&[p, g]), 1.0, d_token);
            }
        }
    })?;
    Ok(grads)
}

fn check(config: &NsaConfig, packing: &Packing, x: &Tensor, position: Option<&Tensor>, phi: &Phi) -> Result<usize> {
    const OP: &str = "compress";
    if let Some(seq) = packing.seqs().find(|seq| seq.context > 0) {
        let rule = "every sequence must start at position 0";
        return Err(Error::Value { op: OP, arg: "packing".to_owned(), value: format!("{seq:?}"), rule });
    }
    // A row of no elements is refused as one that should have at least one.
    let dim = x.shape.last().copied().unwrap_or(0).max(1);
    let groups = config.num_kv_heads();
    x.check(OP, "x", &[packing.num_tokens(), groups, dim])?;
    position.map_or(Ok(()), |e| e.check(OP, "position", &[config.compress_block(), groups, dim]))?;
    phi.check(OP, "phi", config, dim)?;
    Ok(dim)
}

/// Calls `f(packed block, first token's row, KV head)` for every block.
fn for_each_block(config: &NsaConfig, packing: &Packing, mut f: impl FnMut(usize, usize, usize)) -> Result<()> {
    let cu_blocks = packing.cu_blocks(config)?;
    for (s, seq) in packing.seqs().enumerate() {
        for (i, block) in cu_blocks.range(s).enumerate() {
            for g in 0..config.num_kv_heads() {
                f(block, seq.rows.start + i * config.compress_stride(), g);
            }
        }
    }
    Ok(())
}

/// The flattened block `[l·D]`, position embedding added.
fn gather<A: Arithmetic>(
    a: &A,
    config: &NsaConfig,
    x: &Tensor,
    position: Option<&Tensor>,
    first: usize,
    g: usize,
) -> Vec<f64> {
    let mut input = Vec::new();
    for p in 0..config.compress_block() {
        let mut token = x.row(&[first + p, g]).to_vec();
        if let Some(e) = position {
            a.add_scaled(&mut token, 1.0, e.row(&[p, g]));
        }
        input.extend(token);
    }
    input
}

/// φ of one block, with what its backward needs.
struct Applied {
    output: Vec<f64>,
    /// Input of GELU, its output (mlp only).
    hidden: Option<(Vec<f64>, Vec<f64>)>,
}

fn apply<A: Arithmetic>(a: &A, phi: &Phi, g: usize, input: &[f64], dim: usize) -> Applied {
    let tokens = input.chunks(dim);
    let mut output = vec![0.0; dim];
    match phi {
        Phi::Mean => {
            let factor = 1.0 / tokens.len() as f64;
            tokens.for_each(|token| a.add_scaled(&mut output, 1.0, token));
            output.iter_mut().for_each(|x| *x = a.acc(*x * factor));
        }
        Phi::Weighted { weight } => {
            tokens.enumerate().for_each(|(p, token)| a.add_scaled(&mut output, weight.row(&[p])[g], token));
        }
        Phi::Linear { weight } => {
            input.iter().enumerate().for_each(|(i, &x)| a.add_scaled(&mut output, x, weight.row(&[g, i])));
        }
        Phi::Mlp { weight1, bias1, weight2, bias2 } => {
            let mut before = bias1.as_ref().map_or(vec![0.0; weight2.shape[1]], |b| b.row(&[g]).to_vec());
            input.iter().enumerate().for_each(|(i, &x)| a.add_scaled(&mut before, x, weight1.row(&[g, i])));
            let after: Vec<f64> = before.iter().map(|&x| a.acc(gelu(x))).collect();
            if let Some(b) = bias2 {
                output.copy_from_slice(b.row(&[g]));
            }
            after.iter().enumerate().for_each(|(i, &x)| a.add_scaled(&mut output, x, weight2.row(&[g, i])));
            return Applied { output, hidden: Some((before, after)) };
        }
    }
    Applied { output, hidden: None }
}

/// Gradient of one block's input `[l·D]`; adds those of the weights.
fn apply_backward<A: Arithmetic>(
    a: &A,
    phi: &Phi,
    g: usize,
    input: &[f64],
    d_output: &[f64],
    d_phi: &mut Phi,
) -> Vec<f64> {
    let dim = d_output.len();
    let mut d_input = vec![0.0; input.len()];
    match (phi, d_phi) {
        (Phi::Mean, _) => {
            let factor = dim as f64 / input.len() as f64;
            d_input.chunks_mut(dim).for_each(|d_token| a.add_scaled(d_token, factor, d_output));
        }
        (Phi::Weighted { weight }, Phi::Weighted { weight: d_weight }) => {
            for (p, (token, d_token)) in input.chunks(dim).zip(d_input.chunks_mut(dim)).enumerate() {
                a.add_scaled(d_token, weight.row(&[p])[g], d_output);
                let entry = &mut d_weight.row_mut(&[p])[g];
                *entry = a.acc(*entry + a.dot(token, d_output));
            }
        }
        (Phi::Linear { weight }, Phi::Linear { weight: d_weight }) => {
            linear_backward(a, weight, g, input, d_output, d_weight, &mut d_input);
        }
        (
            Phi::Mlp { weight1, weight2, .. },
            Phi::Mlp { weight1: d_weight1, bias1: d_bias1, weight2: d_weight2, bias2: d_bias2 },
        ) => {
            let (before, after) = apply(a, phi, g, input, dim).hidden.expect("an mlp has a hidden layer");
            let mut d_hidden = vec![0.0; after.len()];
            linear_backward(a, weight2, g, &after, d_output, d_weight2, &mut d_hidden);
            d_hidden.iter_mut().zip(&before).for_each(|(d, &x)| *d = a.acc(*d * gelu_derivative(x)));
            linear_backward(a, weight1, g, input, &d_hidden, d_weight1, &mut d_input);
            d_bias1.iter_mut().for_each(|d| a.add_scaled(d.row_mut(&[g]), 1.0, &d_hidden));
            d_bias2.iter_mut().for_each(|d| a.add_scaled(d.row_mut(&[g]), 1.0, d_output));
        }
        _ => unreachable!("the gradient has the kind of its φ"),
    }
    d_input
}

fn linear_backward<A: Arithmetic>(
    a: &A,
    weight: &Tensor,
    g: usize,
    input: &[f64],
    d_output: &[f64],
    d_weight: &mut Tensor,
    d_input: &mut [f64],
) {
    for (i, (&x, d)) in input.iter().zip(d_input).enumerate() {
        *d = a.acc(*d + a.dot(weight.row(&[g, i]), d_output));
        a.add_scaled(d_weight.row_mut(&[g, i]), x, d_output);
    }
}
