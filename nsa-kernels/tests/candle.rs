//! The candle operations against candle's own autograd on a graph of its plain operations, written from SPEC 2.

use candle_core::{DType, Device, IndexOp, Result, Tensor, Var};
use nsa_core::{CompressKind, CuSeqlens, NsaConfig, Packing, index};
use nsa_kernels::candle::{Attention, Phi, compress, nsa_attention};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Every differentiable input.
struct Model {
    config: NsaConfig,
    cu_seqlens: CuSeqlens,
    /// By name; biases and position embeddings may be missing.
    inputs: Vec<(&'static str, Var)>,
}

fn config(kind: CompressKind) -> NsaConfig {
    let builder = NsaConfig::builder(4, 2, 6, 5).compress_block(6).compress_stride(3).select_block(9).select_count(3);
    builder.window(7).compress_kind(kind).compress_hidden(4).build().unwrap()
}

impl Model {
    fn new(config: NsaConfig, lengths: &[usize], dtype: DType, extras: bool) -> Result<Self> {
        let cu_seqlens = CuSeqlens::from_lengths(lengths.iter().copied()).unwrap();
        let (n, hq, g) = (cu_seqlens.total(), config.num_heads(), config.num_kv_heads());
        let (dk, dv, l) = (config.head_dim_qk(), config.head_dim_v(), config.compress_block());
        let mut shapes = vec![("q", vec![n, hq, dk]), ("gates", vec![n, hq, 3])];
        for (name, dim) in [("k_raw", dk), ("k_slc", dk), ("k_win", dk), ("v_raw", dv), ("v_slc", dv), ("v_win", dv)] {
            shapes.push((name, vec![n, g, dim]));
        }
        for (names, dim) in [(["w_k", "b_k", "w2_k", "b2_k", "e_k"], dk), (["w_v", "b_v", "w2_v", "b2_v", "e_v"], dv)] {
            let hidden = config.compress_hidden().unwrap();
            let [w, b, w2, b2, e] = names;
            match config.compress_kind() {
                CompressKind::Mean => {}
                CompressKind::Weighted => shapes.push((w, vec![l, g])),
                CompressKind::Linear => shapes.push((w, vec![g, l * dim, dim])),
                CompressKind::Mlp => {
                    shapes.extend([(w, vec![g, l * dim, hidden]), (w2, vec![g, hidden, dim])]);
                    if extras {
                        shapes.extend([(b, vec![g, hidden]), (b2, vec![g, dim])]);
                    }
                }
            }
            if extras {
                shapes.push((e, vec![l, g, dim]));
            }
        }
        let mut inputs = Vec::new();
        for (i, (name, shape)) in shapes.into_iter().enumerate() {
            let mut rng = ChaCha8Rng::seed_from_u64(i as u64);
            let factor = if name.starts_with('w') { 0.5 } else { 1.0 };
            let data: Vec<f64> =
                (0..shape.iter().product()).map(|_| factor * (2.0 * rng.random::<f64>() - 0.9)).collect();
            // Rounded to the type that the operation is to run in, whatever it runs in.
            inputs.push((name, Var::from_tensor(&Tensor::from_vec(data, shape, &Device::Cpu)?.to_dtype(dtype)?)?));
        }
        Ok(Self { config, cu_seqlens, inputs })
    }

    /// The same numbers in f64.
    fn widened(&self) -> Result<Self> {
        self.changed(|tensor| tensor.to_dtype(DType::F64))
    }

    fn changed(&self, change: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let mut inputs = Vec::new();
        for (name, var) in &self.inputs {
            inputs.push((*name, Var::from_tensor(&change(var)?)?));
        }
        Ok(Self { config: self.config.clone(), cu_seqlens: self.cu_seqlens.clone(), inputs })
    }

    fn find(&self, name: &str) -> Option<&Tensor> {
        self.inputs.iter().find(|(n, _)| *n == name).map(|(_, var)| var.as_tensor())
    }

    fn get(&self, name: &str) -> &Tensor {
        self.find(name).unwrap()
    }

    fn phi(&self, side: char) -> Phi {
        let get = |name: &str| self.find(&format!("{name}_{side}")).cloned();
        match self.config.compress_kind() {
            CompressKind::Mean => Phi::Mean,
            CompressKind::Weighted => Phi::Weighted { weight: get("w").unwrap() },
            CompressKind::Linear => Phi::Linear { weight: get("w").unwrap() },
            CompressKind::Mlp => {
                Phi::Mlp { weight1: get("w").unwrap(), bias1: get("b"), weight2: get("w2").unwrap(), bias2: get("b2") }
            }
        }
    }

    /// This crate's operations.
    fn ours(&self) -> Result<Tensor> {
        let (config, cu) = (&self.config, &self.cu_seqlens);
        let k_cmp = compress(config, cu, self.get("k_raw"), self.find("e_k"), &self.phi('k'))?;
        let v_cmp = compress(config, cu, self.get("v_raw"), self.find("e_v"), &self.phi('v'))?;
        let inputs = Attention {
            q: self.get("q"),
            k: [&k_cmp, self.get("k_slc"), self.get("k_win")],
            v: [&v_cmp, self.get("v_slc"), self.get("v_win")],
            gates: self.get("gates"),
        };
        nsa_attention(config, cu, inputs)
    }

    /// The same by plain operations, one sequence and head at a time.
    fn naive(&self) -> Result<Tensor> {
        let (hq, r) = (self.config.num_heads(), self.config.group_size());
        let mut sequences = Vec::new();
        for s in 0..self.cu_seqlens.num_seqs() {
            let range = self.cu_seqlens.range(s);
            if range.is_empty() {
                continue;
            }
            let tokens = |name: &str| self.get(name).narrow(0, range.start, range.len());
            let k_cmp = self.naive_compress(&tokens("k_raw")?, 'k')?;
            let v_cmp = self.naive_compress(&tokens("v_raw")?, 'v')?;
            let (q, gates) = (tokens("q")?, tokens("gates")?);
            let mut heads = Vec::new();
            for g in 0..hq / r {
                let visible =
                    mask(range.len(), rows(&k_cmp), |t, i| index::block_tokens(&self.config, i).end <= t + 1)?;
                let cmp: Vec<_> = (g * r..(g + 1) * r)
                    .map(|h| self.naive_branch(&q.i((.., h))?, k_cmp.as_ref(), v_cmp.as_ref(), g, &visible))
                    .collect::<Result<_>>()?;
                let selected = self.naive_selection(&cmp)?;
                let in_block = mask(range.len(), range.len(), |t, s| {
                    s <= t && selected[t].contains(&((s / self.config.select_block()) as i32))
                })?;
                let in_window = mask(range.len(), range.len(), |t, s| s <= t && t < s + self.config.window())?;
                for (h, (o_cmp, _)) in (g * r..).zip(cmp) {
                    let branch = |k: &str, v: &str, mask: &Tensor| -> Result<Tensor> {
                        Ok(self.naive_branch(&q.i((.., h))?, Some(&tokens(k)?), Some(&tokens(v)?), g, mask)?.0)
                    };
                    let branches = [o_cmp, branch("k_slc", "v_slc", &in_block)?, branch("k_win", "v_win", &in_window)?];
                    let mut o = branches[0].zeros_like()?;
                    for (c, branch) in branches.iter().enumerate() {
                        o = (o + branch.broadcast_mul(&gates.i((.., h, c..c + 1))?)?)?;
                    }
                    heads.push(o);
                }
            }
            sequences.push(Tensor::stack(&heads, 1)?);
        }
        Tensor::cat(&sequences, 0)
    }

    /// Output `[T, Dv]` and probabilities `[T, rows]` of a head over what the mask lets through.
    fn naive_branch(
        &self,
        q: &Tensor,
        k: Option<&Tensor>,
        v: Option<&Tensor>,
        g: usize,
        mask: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let (Some(k), Some(v)) = (k, v) else {
            let (t, dtype) = (q.dim(0)?, q.dtype());
            let zeros = |columns: usize| Tensor::zeros((t, columns), dtype, &Device::Cpu);
            return Ok((zeros(self.config.head_dim_v())?, zeros(0)?));
        };
        let (k, v) = (k.i((.., g))?.contiguous()?, v.i((.., g))?.contiguous()?);
        let scores = (q.contiguous()?.matmul(&k.t()?)? * self.config.scale())?;
        let weights = (scores.exp()? * mask.to_dtype(q.dtype())?)?;
        let sums = weights.sum_keepdim(1)?;
        // A query that sees nothing divides 0 by 1.
        let nothing = sums.eq(0.0)?.to_dtype(q.dtype())?;
        let p = weights.broadcast_div(&(sums + nothing)?)?;
        Ok((p.matmul(&v)?, p))
    }

    /// Blocks of each query from the probabilities of a group's heads, by SPEC 2.2's sums.
    fn naive_selection(&self, heads: &[(Tensor, Tensor)]) -> Result<Vec<Vec<i32>>> {
        let config = &self.config;
        let probabilities: Vec<Vec<Vec<f64>>> =
            heads.iter().map(|(_, p)| p.to_dtype(DType::F64)?.to_vec2()).collect::<Result<_>>()?;
        let (chunks, span) =
            (config.select_block() / config.compress_stride(), config.compress_block() / config.compress_stride());
        let blocks = probabilities[0].first().map_or(0, Vec::len);
        let score = |t: usize, j: usize| -> f64 {
            let terms = (0..chunks).flat_map(|m| (0..span).map(move |r| (chunks * j + m).checked_sub(r)));
            let inside = terms.flatten().filter(|&i| i < blocks);
            inside.map(|i| probabilities.iter().map(|p| p[t][i]).sum::<f64>()).sum()
        };
        let lists = (0..probabilities[0].len()).map(|t| {
            let mut order: Vec<usize> = (0..index::num_candidates(config, t)).collect();
            let candidates = order.len();
            let forced = |j: &usize| index::is_forced(config, *j, candidates);
            order.sort_by(|a, b| forced(b).cmp(&forced(a)).then(score(t, *b).total_cmp(&score(t, *a))).then(a.cmp(b)));
            order.into_iter().take(config.select_count()).map(|j| j as i32).collect()
        });
        Ok(lists.collect())
    }

    /// Compression blocks of one sequence, one at a time; none if it is too short.
    fn naive_compress(&self, x: &Tensor, side: char) -> Result<Option<Tensor>> {
        let mut blocks = Vec::new();
        for i in 0..index::num_blocks(&self.config, x.dim(0)?) {
            let tokens = index::block_tokens(&self.config, i);
            let mut block = x.narrow(0, tokens.start, tokens.len())?;
            if let Some(position) = self.find(&format!("e_{side}")) {
                block = (block + position)?;
            }
            let (l, g, dim) = block.dims3()?;
            let flat = block.transpose(0, 1)?.contiguous()?.reshape((g, 1, l * dim))?;
            blocks.push(match self.phi(side) {
                Phi::Mean => block.mean(0)?,
                Phi::Weighted { weight } => block.broadcast_mul(&weight.unsqueeze(2)?)?.sum(0)?,
                Phi::Linear { weight } => flat.matmul(&weight)?.squeeze(1)?,
                Phi::Mlp { weight1, bias1, weight2, bias2 } => {
                    let mut hidden = flat.matmul(&weight1)?;
                    if let Some(bias) = bias1 {
                        hidden = (hidden + bias.unsqueeze(1)?)?;
                    }
                    // From erf, since the constant in candle's derivative of GELU has six digits.
                    let normal = ((&hidden * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)?;
                    let mut y = ((hidden * normal)? * 0.5)?.matmul(&weight2)?.squeeze(1)?;
                    if let Some(bias) = bias2 {
                        y = (y + bias)?;
                    }
                    y
                }
            });
        }
        if blocks.is_empty() { Ok(None) } else { Ok(Some(Tensor::stack(&blocks, 0)?)) }
    }
}

fn rows(tensor: &Option<Tensor>) -> usize {
    tensor.as_ref().map_or(0, |t| t.dims()[0])
}

/// 1 where row t sees column s.
fn mask(rows: usize, columns: usize, sees: impl Fn(usize, usize) -> bool) -> Result<Tensor> {
    let data: Vec<f64> = (0..rows * columns).map(|at| f64::from(u8::from(sees(at / columns, at % columns)))).collect();
    Tensor::from_vec(data, (rows, columns), &Device::Cpu)
}

/// Output and every gradient of Σ o·w, in f64.
fn run(model: &Model, o: Tensor) -> Result<Vec<(&'static str, Vec<f64>)>> {
    let weights: Vec<f64> = (0..o.elem_count()).map(|i| ((i * 37 + 11) % 101) as f64 / 50.0 - 1.0).collect();
    let weights = Tensor::from_vec(weights, o.shape(), &Device::Cpu)?.to_dtype(o.dtype())?.to_device(o.device())?;
    let gradients = (&o * weights)?.backward()?;
    let wide = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1();
    let mut results = vec![("o", wide(&o)?)];
    for (name, var) in &model.inputs {
        let gradient = gradients.get(var).unwrap_or_else(|| panic!("no gradient reaches {name}"));
        results.push((*name, wide(gradient)?));
    }
    Ok(results)
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

fn error(results: &[f64], truth: &[f64]) -> f64 {
    norm(results.iter().zip(truth).map(|(a, b)| a - b))
}

/// Asserts that every result's error is at most `tolerance` of its size, or of 1 where it is small.
fn assert_close(ours: &[(&str, Vec<f64>)], truth: &[(&str, Vec<f64>)], tolerance: f64) {
    assert_no_worse(ours, truth, truth, tolerance);
}

/// Asserts that every result's error is at most that of candle's own operations in the same type, or as [`assert_close`].
fn assert_no_worse(ours: &[(&str, Vec<f64>)], plain: &[(&str, Vec<f64>)], truth: &[(&str, Vec<f64>)], tolerance: f64) {
    for (((name, ours), (_, plain)), (_, truth)) in ours.iter().zip(plain).zip(truth) {
        let (size, limit) = (norm(truth.iter().copied()), error(plain, truth));
        let error = error(ours, truth);
        assert!(
            error <= limit.max(tolerance * size.max(1.0)),
            "{name}: error {error:.2e} of {size:.2e}, plain {limit:.2e}"
        );
        // What shifts all keys alike shifts all scores alike, and the softmax does not see it.
        let shifts_keys = ["e_k", "b2_k"].contains(name);
        assert!((size > 1e-3 || shifts_keys) && ours.len() == truth.len(), "{name} is nothing");
    }
}

const KINDS: [CompressKind; 4] = [CompressKind::Mean, CompressKind::Weighted, CompressKind::Linear, CompressKind::Mlp];

#[test]
fn output_and_gradients_equal_those_of_plain_operations() -> Result<()> {
    for kind in KINDS {
        for extras in [false, true] {
            let model = Model::new(config(kind), &[40, 0, 4, 23], DType::F64, extras)?;
            assert_close(&run(&model, model.ours()?)?, &run(&model, model.naive()?)?, 1e-12);
        }
    }
    Ok(())
}

/// Gradients of φ sum terms that cancel: some 20 roundings of f32 are left of them, and in 16 bits what any arithmetic
/// leaves.
const TOLERANCES: [(DType, f64); 3] = [(DType::F32, 5e-6), (DType::BF16, 1.5e-2), (DType::F16, 2e-3)];

/// Every block is selected, so rounding k̃ moves no selection.
fn all_blocks(kind: CompressKind) -> NsaConfig {
    config(kind).to_builder().select_count(10).build().unwrap()
}

#[test]
fn every_element_type() -> Result<()> {
    for (dtype, tolerance) in TOLERANCES {
        let model = Model::new(all_blocks(CompressKind::Mlp), &[40, 23], dtype, true)?;
        let wide = model.widened()?;
        let (ours, plain, truth) =
            (run(&model, model.ours()?)?, run(&model, model.naive()?)?, run(&wide, wide.naive()?)?);
        assert_no_worse(&ours, &plain, &truth, tolerance);
    }
    Ok(())
}

#[test]
fn one_tensor_for_several_branches_gathers_all_gradients() -> Result<()> {
    let mut model = Model::new(config(CompressKind::Mean), &[31], DType::F64, false)?;
    let share = |model: &mut Model, from: &str, to: &str| {
        let var = model.inputs.iter().find(|(name, _)| *name == from).unwrap().1.clone();
        model.inputs.iter_mut().find(|(name, _)| *name == to).unwrap().1 = var;
    };
    share(&mut model, "k_raw", "k_slc");
    share(&mut model, "k_raw", "k_win");
    share(&mut model, "v_slc", "v_win");
    assert_close(&run(&model, model.ours()?)?, &run(&model, model.naive()?)?, 1e-12);
    Ok(())
}

#[test]
fn sequences_without_a_block_or_a_token() -> Result<()> {
    let model = Model::new(config(CompressKind::Linear), &[5, 2], DType::F32, true)?;
    let o = model.ours()?;
    assert!(o.flatten_all()?.to_vec1::<f32>()?.iter().all(|x| x.is_finite()));
    let gradients = o.sum_all()?.backward()?;
    let of_weight = gradients.get(model.get("w_k")).unwrap().abs()?.sum_all()?.to_scalar::<f32>()?;
    assert_eq!(of_weight, 0.0);
    let packing = Packing::new(model.cu_seqlens.clone());
    assert_eq!(packing.cu_blocks(&model.config).unwrap().total(), 0);
    let empty = Model::new(config(CompressKind::Mean), &[], DType::F32, false)?;
    assert_eq!(empty.ours()?.dims(), [0, 4, 5]);
    Ok(())
}

#[test]
fn inputs_that_do_not_fit_are_named() -> Result<()> {
    let model = Model::new(config(CompressKind::Mean), &[20], DType::F32, false)?;
    let (config, cu, q) = (&model.config, &model.cu_seqlens, model.get("q"));
    let (k, v) = (model.get("k_slc"), model.get("v_slc"));
    let k_cmp = compress(config, cu, model.get("k_raw"), None, &Phi::Mean)?;
    let v_cmp = compress(config, cu, model.get("v_raw"), None, &Phi::Mean)?;
    let inputs = Attention { q, k: [&k_cmp, k, k], v: [&v_cmp, v, v], gates: model.get("gates") };
    let message = |inputs| nsa_attention(config, cu, inputs).unwrap_err().to_string();
    let wrong = message(Attention { k: [k, k, k], ..inputs });
    assert!(wrong.contains("`k_cmp` has shape [20, 2, 6], expected [5, 2, 6]"), "{wrong}");
    let wide = v.to_dtype(DType::F64)?;
    let wrong = message(Attention { v: [&v_cmp, v, &wide], ..inputs });
    assert!(wrong.contains("`v_win` has dtype F64, expected F32"), "{wrong}");
    let whole = q.to_dtype(DType::U32)?;
    assert!(message(Attention { q: &whole, ..inputs }).contains("dtype U32 is none of"));
    let weight = Tensor::ones((6, 2), DType::F32, &Device::Cpu)?;
    let wrong = compress(config, cu, k, None, &Phi::Weighted { weight }).unwrap_err().to_string();
    assert!(wrong.contains("`phi` = Weighted"), "{wrong}");
    Ok(())
}

/// On the first CUDA device that there is: a GPU or the simulator.
#[cfg(feature = "candle-cuda")]
mod on_cuda {
    use super::*;

    #[test]
    fn output_and_gradients_equal_those_of_plain_operations_on_the_cpu() -> Result<()> {
        let devices = [Device::new_cuda(0)?, Device::new_cuda_with_stream(0)?];
        for (i, kind) in KINDS.into_iter().enumerate() {
            for (dtype, tolerance) in TOLERANCES {
                let device = &devices[i % 2];
                let model = Model::new(all_blocks(kind), &[40, 0, 4, 23], dtype, i % 2 == 1)?;
                let wide = model.widened()?;
                let (plain, truth) = (run(&model, model.naive()?)?, run(&wide, wide.naive()?)?);
                let there = model.changed(|tensor| tensor.to_device(device))?;
                let o = there.ours()?;
                assert!(o.device().same_device(device));
                assert_no_worse(&run(&there, o)?, &plain, &truth, tolerance);
            }
        }
        Ok(())
    }

    #[test]
    fn what_there_is_no_kernel_for_and_other_places_are_named() -> Result<()> {
        let (device, other) = (Device::new_cuda(0)?, Device::new_cuda_with_stream(0)?);
        let model = Model::new(config(CompressKind::Mean), &[20], DType::F64, false)?;
        let wrong = model.changed(|tensor| tensor.to_device(&device))?.ours().unwrap_err().to_string();
        assert!(wrong.contains("has no kernel for tensors of f64"), "{wrong}");
        let model = Model::new(config(CompressKind::Mean), &[20], DType::F32, true)?;
        let (k, e) = (model.get("k_raw").to_device(&device)?, model.get("e_k"));
        for (place, e) in [("the host", e.clone()), ("Cuda", e.to_device(&other)?)] {
            let wrong = compress(&model.config, &model.cu_seqlens, &k, Some(&e), &Phi::Mean).unwrap_err().to_string();
            assert!(wrong.contains(&format!("`position` is in the memory of {place}")), "{wrong}");
        }
        Ok(())
    }
}
