//! Tensors out: names, shapes, rounding to the input's dtype.

use super::input::Plan;
use nsa_core::{Element, Packing};
use nsa_tests::generate::{PhiShapes, Side, Weights};
use nsa_tests::operator::{Branches, Compressed, Grads, Inputs, Outputs};
use safetensors::tensor::{Dtype, TensorView};

/// A tensor to write.
#[derive(Debug)]
pub struct Named {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Named {
    /// Name and view, as safetensors takes them.
    pub fn view(&self) -> Result<(&str, TensorView<'_>), safetensors::SafeTensorError> {
        Ok((&self.name, TensorView::new(self.dtype, self.shape.clone(), &self.bytes)?))
    }
}

fn named<T: Element>(name: impl Into<String>, dtype: Dtype, shape: &[usize], values: &[f64]) -> Named {
    let rounded: Vec<T> = values.iter().map(|&x| T::from_f64(x)).collect();
    let bytes = bytemuck::cast_slice(&rounded).to_vec();
    Named { name: name.into(), dtype, shape: shape.to_vec(), bytes }
}

/// Everything that the contract lists, from outputs widened to f64; floats are rounded to the input's dtype, lse to f32.
pub fn tensors<T: Element>(plan: &Plan, inputs: &Inputs<T>, outputs: &Outputs<f64, f64>) -> Vec<Named> {
    let (config, packing) = (&inputs.config, &inputs.packing);
    let (n, heads, groups) = (packing.num_tokens(), config.num_heads(), config.num_kv_heads());
    let dtype = plan.dtype;
    let shape = [n, heads, config.head_dim_v()];
    let mut list = vec![named::<T>("o", dtype, &shape, &outputs.o)];
    for (c, branch) in ["cmp", "slc", "win"].into_iter().enumerate() {
        list.push(named::<T>(format!("o_{branch}"), dtype, &shape, &outputs.branches[c]));
        list.push(named::<f32>(format!("lse_{branch}"), Dtype::F32, &[n, heads], &outputs.lse[c]));
    }
    list.push(Named {
        name: "block_indices".to_owned(),
        dtype: Dtype::I32,
        shape: vec![n, groups, config.select_count()],
        bytes: bytemuck::cast_slice(&outputs.block_indices).to_vec(),
    });
    if let Some(Grads { q, k, v, gates }) = &outputs.grads {
        list.push(named::<T>("dq", dtype, &[n, heads, config.head_dim_qk()], q));
        list.push(named::<T>("dgates", dtype, &[n, heads, 3], gates));
        for (side, branches) in [(Side::Key, k), (Side::Value, v)] {
            list.extend(side_grads::<T>(plan, inputs, side, branches));
        }
    }
    list
}

/// Gradients of keys or values; of the one tensor that stood for several branches: their sum.
fn side_grads<T: Element>(plan: &Plan, inputs: &Inputs<T>, side: Side, grads: &Branches<f64>) -> Vec<Named> {
    let (letter, dtype) = (side.letter(), plan.dtype);
    let tokens = [inputs.packing.num_tokens(), inputs.config.num_kv_heads(), side.dim(&inputs.config)];
    let branches = match &grads.cmp {
        Compressed::Tokens { x, .. } => vec![("cmp", x), ("slc", &grads.slc), ("win", &grads.win)],
        Compressed::Blocks(_) => vec![("slc", &grads.slc), ("win", &grads.win)],
    };
    let mut list = Vec::new();
    if plan.shared(side) {
        let sum = |i: usize| branches.iter().map(|(_, values)| values[i]).sum();
        let total: Vec<f64> = (0..grads.slc.len()).map(sum).collect();
        list.push(named::<T>(format!("d{letter}"), dtype, &tokens, &total));
    } else {
        list.extend(branches.iter().map(|(b, values)| named::<T>(format!("d{letter}_{b}"), dtype, &tokens, values)));
    }
    match &grads.cmp {
        Compressed::Blocks(values) => {
            let shape = [blocks(&inputs.config, &inputs.packing), tokens[1], tokens[2]];
            list.push(named::<T>(format!("d{letter}_cmp_blocks"), dtype, &shape, values));
        }
        Compressed::Tokens { position, phi, .. } => {
            let shapes = PhiShapes::new(&inputs.config, side);
            if let Some(values) = position {
                list.push(named::<T>(format!("dpe_{letter}"), dtype, &shapes.position, values));
            }
            list.extend(phi_grads::<T>(letter, dtype, &shapes, phi));
        }
    }
    list
}

fn blocks(config: &nsa_core::NsaConfig, packing: &Packing) -> usize {
    packing.seqs().map(|seq| nsa_core::index::num_blocks(config, seq.end())).sum()
}

fn phi_grads<T: Element>(letter: &str, dtype: Dtype, shapes: &PhiShapes, grads: &Weights<f64>) -> Vec<Named> {
    let part = |part: &str, shape: &[usize], values: &Vec<f64>| {
        named::<T>(format!("dphi_{letter}.{part}"), dtype, shape, values)
    };
    match grads {
        Weights::Mean => Vec::new(),
        Weights::Weighted(values) => vec![part("weight", &shapes.weighted, values)],
        Weights::Linear(values) => vec![part("weight", &shapes.linear, values)],
        Weights::Mlp { weight1, bias1, weight2, bias2 } => {
            let mut list = vec![part("0.weight", &shapes.weight1, weight1), part("2.weight", &shapes.weight2, weight2)];
            list.extend(bias1.as_ref().map(|values| part("0.bias", &shapes.bias1, values)));
            list.extend(bias2.as_ref().map(|values| part("2.bias", &shapes.bias2, values)));
            list
        }
    }
}
