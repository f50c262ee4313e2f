//! The gradients of an operation checked by anyone: along a random direction, the loss changes as the gradient says.
//! Runs the window branch in f64, forward and backward.
//!
//! `cargo run --release -p nsa-kernels --example 02-backward-check`

use nsa_core::{CompressKind, CuSeqlens, NsaConfig, Packing};
use nsa_kernels::op::win;
use nsa_kernels::{Backend, Result, Rows, Tensor, TensorMut};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Queries, keys, values.
type Inputs = [Vec<f64>; 3];

struct Problem {
    backend: Backend,
    config: NsaConfig,
    packing: Packing,
    shapes: [[usize; 3]; 3],
}

impl Problem {
    fn forward(&self, [q, k, v]: &Inputs) -> Result<(Vec<f64>, Vec<f64>)> {
        let [n, heads, _] = self.shapes[0];
        let dim_v = self.shapes[2][2];
        let (mut o, mut lse) = (vec![0.0; n * heads * dim_v], vec![0.0; n * heads]);
        let args = win::Forward {
            config: &self.config,
            packing: &self.packing,
            q: Tensor::host(q, self.shapes[0])?,
            k: Rows::packed(Tensor::host(k, self.shapes[1])?, self.packing.cu_seqlens()),
            v: Rows::packed(Tensor::host(v, self.shapes[2])?, self.packing.cu_seqlens()),
            o: TensorMut::host(&mut o, [n, heads, dim_v])?,
            lse: TensorMut::host(&mut lse, [n, heads])?,
        };
        win::forward(&self.backend, args)?;
        Ok((o, lse))
    }

    fn backward(&self, inputs: &Inputs, d_o: &[f64]) -> Result<Inputs> {
        let (o, lse) = self.forward(inputs)?;
        let [n, heads, _] = self.shapes[0];
        let output = [n, heads, self.shapes[2][2]];
        let mut grads = inputs.each_ref().map(|x| vec![0.0; x.len()]);
        let [dq, dk, dv] = &mut grads;
        let args = win::Backward {
            config: &self.config,
            packing: &self.packing,
            q: Tensor::host(&inputs[0], self.shapes[0])?,
            k: Tensor::host(&inputs[1], self.shapes[1])?,
            v: Tensor::host(&inputs[2], self.shapes[2])?,
            o: Tensor::host(&o, output)?,
            lse: Tensor::host(&lse, [n, heads])?,
            d_o: Tensor::host(d_o, output)?,
            gates: None,
            d_gates: None,
            dq: TensorMut::host(dq, self.shapes[0])?,
            accumulate: false,
            dk: TensorMut::host(dk, self.shapes[1])?,
            dv: TensorMut::host(dv, self.shapes[2])?,
        };
        win::backward(&self.backend, args)?;
        Ok(grads)
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

fn main() -> Result<()> {
    let (backend, _) = Backend::pick(None)?;
    let config = NsaConfig::builder(6, 2, 24, 16).compress_kind(CompressKind::Mean).window(40).build()?;
    let packing = Packing::new(CuSeqlens::from_lengths([150, 0, 77])?);
    let n = packing.num_tokens();
    let problem = Problem { backend, config, packing, shapes: [[n, 6, 24], [n, 2, 24], [n, 2, 16]] };

    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut random = |len: usize| -> Vec<f64> { (0..len).map(|_| rng.random_range(-1.0..1.0)).collect() };
    let inputs = problem.shapes.map(|shape| random(shape.iter().product()));
    let d_o = random(n * 6 * 16);
    let grads = problem.backward(&inputs, &d_o)?;

    for (i, name) in ["q", "k", "v"].into_iter().enumerate() {
        let direction = random(inputs[i].len());
        let loss = |step: f64| -> Result<f64> {
            let mut moved = inputs.clone();
            moved[i].iter_mut().zip(&direction).for_each(|(x, d)| *x += step * d);
            Ok(dot(&problem.forward(&moved)?.0, &d_o))
        };
        let (measured, claimed) = ((loss(1e-5)? - loss(-1e-5)?) / 2e-5, dot(&grads[i], &direction));
        println!("d{name}: measured {measured:+.9}, gradient says {claimed:+.9}");
        assert!((measured - claimed).abs() < 1e-6 * (1.0 + claimed.abs()), "the gradient of {name} is wrong");
    }
    Ok(())
}
