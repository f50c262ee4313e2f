//! Trains a small byte-level language model whose layers are candle's and whose attention is this crate's.
//!
//! `cargo run --release -p nsa-kernels --features candle --example candle_train [TEXT] [STEPS]`
//!
//! Without a text it makes up a few hundred lines of arithmetic. Prints the loss in bits per byte, which must fall.

use candle_core::{D, DType, Device, Result, Tensor, Var, bail};
use nsa_core::{CompressKind, CuSeqlens, NsaConfig};
use nsa_kernels::candle::{Attention, Phi, compress, nsa_attention};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::fmt::Write as _;
use std::time::Instant;

/// Tokens of a sequence, sequences of a batch, width, layers.
const LEN: usize = 256;
const BATCH: usize = 4;
const WIDTH: usize = 64;
const LAYERS: usize = 2;
const LEARNING_RATE: f64 = 3e-3;

/// All parameters, in the order in which they were made.
struct Params(Vec<Var>);

impl Params {
    fn normal(&mut self, shape: &[usize], scale: f64) -> Result<Tensor> {
        let var = Var::randn_f64(0.0, scale, shape, DType::F32, &Device::Cpu)?;
        self.0.push(var.clone());
        Ok(var.as_tensor().clone())
    }

    fn ones(&mut self, len: usize) -> Result<Tensor> {
        let var = Var::ones(len, DType::F32, &Device::Cpu)?;
        self.0.push(var.clone());
        Ok(var.as_tensor().clone())
    }

    /// A matrix `[inputs, outputs]`.
    fn linear(&mut self, inputs: usize, outputs: usize) -> Result<Tensor> {
        self.normal(&[inputs, outputs], (inputs as f64).sqrt().recip())
    }
}

struct Layer {
    norm: [Tensor; 2],
    q: Tensor,
    /// Keys and values of the three branches.
    kv: [[Tensor; 3]; 2],
    gates: Tensor,
    out: Tensor,
    /// φ and position embedding of keys and values.
    phi: [(Phi, Tensor); 2],
    mlp: [Tensor; 3],
}

impl Layer {
    fn new(params: &mut Params, config: &NsaConfig) -> Result<Self> {
        let (heads, groups) = (config.num_heads(), config.num_kv_heads());
        let (l, hidden) = (config.compress_block(), config.compress_hidden().unwrap_or_default());
        let dims = [config.head_dim_qk(), config.head_dim_v()];
        let mut branches = |dim: usize| -> Result<[Tensor; 3]> {
            let mut linear = || params.linear(WIDTH, groups * dim);
            Ok([linear()?, linear()?, linear()?])
        };
        let kv = [branches(dims[0])?, branches(dims[1])?];
        let mut side = |dim: usize| -> Result<(Phi, Tensor)> {
            let weight1 = params.normal(&[groups, l * dim, hidden], ((l * dim) as f64).sqrt().recip())?;
            let weight2 = params.normal(&[groups, hidden, dim], (hidden as f64).sqrt().recip())?;
            Ok((Phi::Mlp { weight1, bias1: None, weight2, bias2: None }, params.normal(&[l, groups, dim], 0.1)?))
        };
        let phi = [side(dims[0])?, side(dims[1])?];
        Ok(Self {
            norm: [params.ones(WIDTH)?, params.ones(WIDTH)?],
            q: params.linear(WIDTH, heads * dims[0])?,
            kv,
            gates: params.linear(WIDTH, heads * 3)?,
            out: params.linear(heads * dims[1], WIDTH)?,
            phi,
            mlp: [params.linear(WIDTH, 4 * WIDTH)?, params.linear(WIDTH, 4 * WIDTH)?, params.linear(4 * WIDTH, WIDTH)?],
        })
    }

    /// Residual stream in, residual stream out: `[N, WIDTH]`.
    fn forward(&self, config: &NsaConfig, cu_seqlens: &CuSeqlens, x: &Tensor) -> Result<Tensor> {
        let (n, groups) = (x.dim(0)?, config.num_kv_heads());
        let normed = rms_norm(x, &self.norm[0])?;
        let heads = |weight: &Tensor, heads: usize| normed.matmul(weight)?.reshape((n, heads, ()));
        let mut sides = Vec::new();
        for (weights, (phi, position)) in self.kv.iter().zip(&self.phi) {
            let raw = heads(&weights[0], groups)?;
            let blocks = compress(config, cu_seqlens, &raw, Some(position), phi)?;
            sides.push([blocks, heads(&weights[1], groups)?, heads(&weights[2], groups)?]);
        }
        let inputs = Attention {
            q: &heads(&self.q, config.num_heads())?,
            k: sides[0].each_ref(),
            v: sides[1].each_ref(),
            gates: &sigmoid(&heads(&self.gates, config.num_heads())?)?,
        };
        let attended = nsa_attention(config, cu_seqlens, inputs)?;
        let x = (x + attended.flatten_from(1)?.matmul(&self.out)?)?;
        let normed = rms_norm(&x, &self.norm[1])?;
        let [gate, up, down] = &self.mlp;
        x + (normed.matmul(gate)?.silu()? * normed.matmul(up)?)?.matmul(down)?
    }
}

fn rms_norm(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let size = (x.sqr()?.mean_keepdim(D::Minus1)? + 1e-6)?.sqrt()?;
    x.broadcast_div(&size)?.broadcast_mul(weight)
}

fn sigmoid(x: &Tensor) -> Result<Tensor> {
    (x.neg()?.exp()? + 1.0)?.recip()
}

struct Model {
    config: NsaConfig,
    embedding: Tensor,
    positions: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Tensor,
}

impl Model {
    fn new(params: &mut Params, config: NsaConfig) -> Result<Self> {
        Ok(Self {
            embedding: params.normal(&[256, WIDTH], 0.5)?,
            positions: params.normal(&[LEN, WIDTH], 0.1)?,
            layers: (0..LAYERS).map(|_| Layer::new(params, &config)).collect::<Result<_>>()?,
            norm: params.ones(WIDTH)?,
            head: params.linear(WIDTH, 256)?,
            config,
        })
    }

    /// Mean cross-entropy of the next bytes, in nats.
    fn loss(&self, bytes: &Tensor, next: &Tensor) -> Result<Tensor> {
        let cu_seqlens = CuSeqlens::from_lengths([LEN; BATCH]).map_err(candle_core::Error::wrap)?;
        let mut x = (self.embedding.embedding(bytes)? + self.positions.repeat((BATCH, 1))?)?;
        for layer in &self.layers {
            x = layer.forward(&self.config, &cu_seqlens, &x)?;
        }
        let logits = rms_norm(&x, &self.norm)?.matmul(&self.head)?;
        let of_next = logits.gather(&next.unsqueeze(1)?, 1)?.squeeze(1)?;
        (logits.log_sum_exp(D::Minus1)? - of_next)?.mean_all()
    }
}

/// Adam with the usual constants.
struct Adam {
    moments: Vec<[Tensor; 2]>,
    step: i32,
}

impl Adam {
    fn new(params: &Params) -> Result<Self> {
        let moments = params.0.iter().map(|var| Ok([var.zeros_like()?, var.zeros_like()?]));
        Ok(Self { moments: moments.collect::<Result<_>>()?, step: 0 })
    }

    fn step(&mut self, params: &Params, loss: &Tensor) -> Result<()> {
        let gradients = loss.backward()?;
        self.step += 1;
        let (bias1, bias2) = (1.0 - 0.9f64.powi(self.step), 1.0 - 0.99f64.powi(self.step));
        for (var, [m, v]) in params.0.iter().zip(&mut self.moments) {
            let Some(gradient) = gradients.get(var) else { bail!("a parameter has no gradient") };
            *m = ((&*m * 0.9)? + (gradient * 0.1)?)?;
            *v = ((&*v * 0.99)? + (gradient.sqr()? * 0.01)?)?;
            let size = ((&*v / bias2)?.sqrt()? + 1e-8)?;
            var.set(&(var.as_tensor() - ((&*m / bias1)? / size)? * LEARNING_RATE)?)?;
        }
        Ok(())
    }
}

/// A few hundred lines of arithmetic, in words.
fn made_up_text(rng: &mut ChaCha8Rng) -> String {
    const NUMBERS: [&str; 19] = [
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
        "fifteen",
        "sixteen",
        "seventeen",
        "eighteen",
    ];
    let mut text = String::new();
    for _ in 0..400 {
        let (a, b) = (rng.random_range(0..10), rng.random_range(0..10));
        writeln!(text, "{} plus {} is {}.", NUMBERS[a], NUMBERS[b], NUMBERS[a + b]).expect("memory");
    }
    text
}

/// Random windows of the text and the bytes that follow, `[BATCH · LEN]` each.
fn batch(text: &[u8], rng: &mut ChaCha8Rng) -> Result<(Tensor, Tensor)> {
    let (mut bytes, mut next) = (Vec::new(), Vec::new());
    for _ in 0..BATCH {
        let start = rng.random_range(0..text.len() - LEN);
        bytes.extend(text[start..start + LEN].iter().map(|&b| u32::from(b)));
        next.extend(text[start + 1..=start + LEN].iter().map(|&b| u32::from(b)));
    }
    let tensor = |data: Vec<u32>| Tensor::from_vec(data, BATCH * LEN, &Device::Cpu);
    Ok((tensor(bytes)?, tensor(next)?))
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let text = match arguments.next() {
        Some(path) => std::fs::read(path)?,
        None => made_up_text(&mut rng).into_bytes(),
    };
    let steps = arguments.next().map_or(Ok(100), |steps| steps.parse()).map_err(candle_core::Error::wrap)?;
    if text.len() <= LEN {
        bail!("the text has {} bytes: more than {LEN} are needed", text.len());
    }
    let config = NsaConfig::builder(4, 2, 16, 16)
        .compress_block(16)
        .compress_stride(8)
        .select_block(16)
        .select_count(4)
        .window(32)
        .compress_kind(CompressKind::Mlp)
        .compress_hidden(32)
        .build()
        .map_err(candle_core::Error::wrap)?;
    let mut params = Params(Vec::new());
    let model = Model::new(&mut params, config)?;
    let mut adam = Adam::new(&params)?;
    let (start, mut losses) = (Instant::now(), Vec::new());
    for step in 1..=steps {
        let (bytes, next) = batch(&text, &mut rng)?;
        let loss = model.loss(&bytes, &next)?;
        adam.step(&params, &loss)?;
        losses.push(f64::from(loss.to_scalar::<f32>()?) / std::f64::consts::LN_2);
        if step == 1 || step % 10 == 0 {
            let rate = (step * BATCH * LEN) as f64 / start.elapsed().as_secs_f64();
            println!("step {step:4}  {:.3} bits per byte  {rate:.0} tokens/s", losses[step - 1]);
        }
    }
    let (Some(first), Some(last)) = (losses.first(), losses.last()) else { return Ok(()) };
    if steps >= 50 && *last > 0.6 * first {
        bail!("the loss did not fall: {first:.3} to {last:.3} bits per byte");
    }
    Ok(())
}
