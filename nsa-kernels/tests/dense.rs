//! Full attention against the reference.

mod case;

use case::*;
use half::{bf16, f16};
use nsa_core::{Element, NsaConfig, Packing, Real};
use nsa_kernels::{Result, Rows, op::dense};
use nsa_ref::branch::{Inputs, Output};

/// Operands of one call.
struct Operands<T> {
    config: NsaConfig,
    packing: Packing,
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
}

impl<T: Element> Operands<T> {
    fn new(config: NsaConfig, packing: Packing) -> Self {
        let keys = packing.cu_keys().unwrap().total();
        let (n, g) = (packing.num_tokens(), config.num_kv_heads());
        let q = random(1, n * config.num_heads() * config.head_dim_qk());
        let k = random(2, keys * g * config.head_dim_qk());
        let v = random(3, keys * g * config.head_dim_v());
        Self { config, packing, q, k, v }
    }

    fn shapes(&self) -> ([usize; 3], [usize; 3], [usize; 3], [usize; 3]) {
        let (n, keys) = (self.packing.num_tokens(), self.packing.cu_keys().unwrap().total());
        let (h, g) = (self.config.num_heads(), self.config.num_kv_heads());
        let (dk, dv) = (self.config.head_dim_qk(), self.config.head_dim_v());
        ([n, h, dk], [keys, g, dk], [keys, g, dv], [n, h, dv])
    }

    fn forward(&self) -> Result<(Vec<T>, Vec<T::Acc>)> {
        let (qs, ks, vs, os) = self.shapes();
        let mut o = vec![T::from_f64(f64::NAN); os.iter().product()];
        let mut lse = vec![T::Acc::of(f64::NAN); os[0] * os[1]];
        let keys = self.packing.cu_keys()?;
        let args = dense::Forward {
            config: &self.config,
            packing: &self.packing,
            q: tensor(&self.q, qs),
            k: Rows::packed(tensor(&self.k, ks), &keys),
            v: Rows::packed(tensor(&self.v, vs), &keys),
            o: tensor_mut(&mut o, os),
            lse: tensor_mut(&mut lse, [os[0], os[1]]),
        };
        dense::forward(&backend(), args)?;
        Ok((o, lse))
    }

    fn truth(&self) -> Output {
        let (qs, ks, vs, _) = self.shapes();
        let (q, k, v) = (truth(&self.q, qs), truth(&self.k, ks), truth(&self.v, vs));
        nsa_ref::dense::forward(&nsa_ref::Exact, &self.config, &self.packing, &Inputs { q: &q, k: &k, v: &v }).unwrap()
    }
}

fn check<T: Element>(config: NsaConfig, lengths: &[usize], contexts: &[usize]) {
    let operands = Operands::<T>::new(config, packing(lengths, contexts));
    let (o, lse) = operands.forward().unwrap();
    let truth = operands.truth();
    compare("o", &o, &truth.o);
    compare("lse", &lse, &truth.lse);
}

#[test]
fn forward_equals_the_reference() {
    for config in configs() {
        check::<f32>(config.clone(), &[1, 0, 111, 64], &[0; 4]);
        check::<f32>(config.clone(), &[3, 70], &[130, 61]);
    }
    check::<f64>(config(4, 2, 16, 16), &[5, 140], &[0, 0]);
    check::<bf16>(config(4, 2, 16, 16), &[5, 140], &[0, 0]);
    check::<f16>(config(4, 2, 16, 16), &[5, 140], &[7, 0]);
    check::<f32>(config(4, 2, 16, 16), &[], &[]);
    check::<f32>(config(4, 2, 16, 16), &[0, 0], &[0, 5]);
}
