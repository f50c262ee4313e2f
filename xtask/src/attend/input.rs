//! Tensors in: which names belong to the run, their shapes and dtypes, all checked before anything is computed.

use anyhow::{Context, Result, bail, ensure};
use nsa_core::{CompressKind, CuSeqlens, Element, NsaConfig, Packing, index};
use nsa_tests::generate::{PhiShapes, Side, Weights};
use nsa_tests::operator::{Branches, Compressed, Inputs};
use safetensors::tensor::{Dtype, TensorView};
use std::collections::BTreeMap;

/// Tensors of a file by name.
pub type Tensors<'a> = BTreeMap<String, TensorView<'a>>;

/// How a tensor takes part in this run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    Required,
    Optional,
    /// Belongs to the contract, but this run computes without it: checked, then left alone.
    Unused,
}

#[derive(Debug)]
struct Spec {
    name: String,
    shape: Vec<usize>,
    dtype: Dtype,
    need: Need,
}

/// What the file describes, before its numbers are read.
#[derive(Debug)]
pub struct Plan {
    config: NsaConfig,
    packing: Packing,
    /// q's, and that of every other float tensor.
    pub dtype: Dtype,
    specs: Vec<Spec>,
    backward: bool,
}

impl Plan {
    /// Checks names, shapes and dtypes.
    ///
    /// # Errors
    /// Names the tensor, what was expected and what is there.
    pub fn new(config: NsaConfig, tensors: &Tensors, backward: bool) -> Result<Self> {
        let q = tensors.get("q").context("`q` is missing: expected [N, num_heads, head_dim_qk]")?;
        let dtype = q.dtype();
        if !matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            bail!("`q` has dtype {dtype}, expected F32, BF16, F16 or F64");
        }
        let n = match q.shape() {
            &[n, _, _] => n,
            shape => bail!("`q` has shape {shape:?}, expected [N, {}, {}]", config.num_heads(), config.head_dim_qk()),
        };
        let packing = packing(tensors, n)?;
        let mut plan = Self { specs: Vec::new(), config, packing, dtype, backward };
        plan.list(tensors)?;
        plan.check(tensors)?;
        Ok(plan)
    }

    /// Names of the tensors that are there and left alone.
    pub fn unused<'a>(&'a self, tensors: &'a Tensors) -> impl Iterator<Item = &'a str> {
        let unused = self.specs.iter().filter(|spec| spec.need == Need::Unused).map(|spec| spec.name.as_str());
        unused.filter(|name| tensors.contains_key(*name))
    }

    fn add(&mut self, name: &str, shape: &[usize], need: Need) {
        self.specs.push(Spec { name: name.to_owned(), shape: shape.to_vec(), dtype: self.dtype, need });
    }

    /// Every tensor of the contract that fits this configuration.
    fn list(&mut self, tensors: &Tensors) -> Result<()> {
        let config = self.config.clone();
        let (n, heads, groups) = (self.packing.num_tokens(), config.num_heads(), config.num_kv_heads());
        self.add("q", &[n, heads, config.head_dim_qk()], Need::Required);
        self.add("gates", &[n, heads, 3], Need::Required);
        let output = [n, heads, config.head_dim_v()];
        self.add("do", &output, if self.backward { Need::Required } else { Need::Unused });
        for side in [Side::Key, Side::Value] {
            self.list_side(tensors, side)?;
        }
        let offsets = vec![self.packing.num_seqs() + 1];
        let indices = vec![n, groups, config.select_count()];
        for (name, shape) in [("cu_seqlens", offsets), ("block_indices", indices)] {
            self.specs.push(Spec { name: name.to_owned(), shape, dtype: Dtype::I32, need: Need::Optional });
        }
        Ok(())
    }

    /// Keys or values: of each branch or of all, and φ's weights.
    fn list_side(&mut self, tensors: &Tensors, side: Side) -> Result<()> {
        let letter = side.letter();
        let name = |branch: &str| format!("{letter}_{branch}");
        let (groups, dim) = (self.config.num_kv_heads(), side.dim(&self.config));
        let tokens = [self.packing.num_tokens(), groups, dim];
        let blocks = self.packing.cu_blocks(&self.config)?.total();
        let compressed = tensors.contains_key(&name("cmp_blocks"));
        let shared = tensors.contains_key(letter);
        if shared {
            for branch in ["cmp", "slc", "win"].map(name) {
                let both = tensors.contains_key(&branch);
                ensure!(!both, "`{letter}` and `{branch}` are both there: `{letter}` stands for all branches");
            }
            self.add(letter, &tokens, Need::Required);
        } else {
            self.add(&name("cmp"), &tokens, if compressed { Need::Unused } else { Need::Required });
            self.add(&name("slc"), &tokens, Need::Required);
            self.add(&name("win"), &tokens, Need::Required);
        }
        self.add(&name("cmp_blocks"), &[blocks, groups, dim], Need::Optional);
        let (required, optional) =
            if compressed { (Need::Unused, Need::Unused) } else { (Need::Required, Need::Optional) };
        let shapes = PhiShapes::new(&self.config, side);
        let phi = |part: &str| format!("phi_{letter}.{part}");
        match self.config.compress_kind() {
            CompressKind::Mean => {}
            CompressKind::Weighted => self.add(&phi("weight"), &shapes.weighted, required),
            CompressKind::Linear => self.add(&phi("weight"), &shapes.linear, required),
            CompressKind::Mlp => {
                self.add(&phi("0.weight"), &shapes.weight1, required);
                self.add(&phi("0.bias"), &shapes.bias1, optional);
                self.add(&phi("2.weight"), &shapes.weight2, required);
                self.add(&phi("2.bias"), &shapes.bias2, optional);
            }
        }
        self.add(&format!("pe_{letter}"), &shapes.position, optional);
        Ok(())
    }

    fn check(&self, tensors: &Tensors) -> Result<()> {
        for name in tensors.keys() {
            if !self.specs.iter().any(|spec| spec.name == *name) {
                let known: Vec<&str> = self.specs.iter().map(|spec| spec.name.as_str()).collect();
                let kind = format!("{:?}", self.config.compress_kind()).to_lowercase();
                bail!("unknown tensor `{name}`: with compress_kind `{kind}` there can be {}", known.join(", "));
            }
        }
        for Spec { name, shape, dtype, need } in &self.specs {
            match tensors.get(name) {
                None if *need == Need::Required => bail!("`{name}` is missing: expected {dtype} {shape:?}"),
                None => {}
                Some(view) => {
                    ensure!(view.shape() == shape, "`{name}` has shape {:?}, expected {shape:?}", view.shape());
                    let (got, of_q) = (view.dtype(), if *dtype == Dtype::I32 { "" } else { ", that of `q`" });
                    ensure!(got == *dtype, "`{name}` has dtype {got}, expected {dtype}{of_q}");
                }
            }
        }
        Ok(())
    }

    /// Reads the numbers.
    ///
    /// # Errors
    /// If given block indices break the policy's form.
    pub fn read<T: Element>(&self, tensors: &Tensors) -> Result<Inputs<T>> {
        let get = |name: &str| tensors.get(name).map(numbers::<T>);
        let must = |name: &str| get(name).expect("checked");
        let block_indices = tensors.get("block_indices").map(numbers::<i32>);
        if let Some(indices) = &block_indices {
            check_indices(&self.config, &self.packing, indices)?;
        }
        Ok(Inputs {
            q: must("q"),
            k: self.side(tensors, Side::Key),
            v: self.side(tensors, Side::Value),
            gates: must("gates"),
            d_o: self.backward.then(|| must("do")),
            block_indices,
            config: self.config.clone(),
            packing: self.packing.clone(),
        })
    }

    fn side<T: Element>(&self, tensors: &Tensors, side: Side) -> Branches<T> {
        let letter = side.letter();
        let get = |name: &str| tensors.get(name).map(numbers::<T>);
        let branch = |name: &str| get(&format!("{letter}_{name}")).or_else(|| get(letter)).expect("checked");
        let phi = |part: &str| get(&format!("phi_{letter}.{part}"));
        let weight = |part: &str| phi(part).expect("checked");
        let cmp = match get(&format!("{letter}_cmp_blocks")) {
            Some(blocks) => Compressed::Blocks(blocks),
            None => Compressed::Tokens {
                x: branch("cmp"),
                position: get(&format!("pe_{letter}")),
                phi: match self.config.compress_kind() {
                    CompressKind::Mean => Weights::Mean,
                    CompressKind::Weighted => Weights::Weighted(weight("weight")),
                    CompressKind::Linear => Weights::Linear(weight("weight")),
                    CompressKind::Mlp => Weights::Mlp {
                        weight1: weight("0.weight"),
                        bias1: phi("0.bias"),
                        weight2: weight("2.weight"),
                        bias2: phi("2.bias"),
                    },
                },
            },
        };
        Branches { cmp, slc: branch("slc"), win: branch("win") }
    }

    /// Whether one `k` (or `v`) stands for all branches.
    pub fn shared(&self, side: Side) -> bool {
        self.specs.iter().any(|spec| spec.name == side.letter())
    }
}

/// `cu_seqlens`, or one sequence of all `n` tokens.
fn packing(tensors: &Tensors, n: usize) -> Result<Packing> {
    let Some(view) = tensors.get("cu_seqlens") else { return Ok(Packing::new(CuSeqlens::single(n)?)) };
    ensure!(view.dtype() == Dtype::I32, "`cu_seqlens` has dtype {}, expected I32", view.dtype());
    ensure!(view.shape().len() == 1, "`cu_seqlens` has shape {:?}, expected [S + 1]", view.shape());
    let offsets = CuSeqlens::new(numbers(view)).context("`cu_seqlens`")?;
    offsets.check_end(n).context("`cu_seqlens`")?;
    Ok(Packing::new(offsets))
}

/// Numbers of a tensor whose dtype was checked; files need not be aligned.
fn numbers<T: bytemuck::Pod>(view: &TensorView) -> Vec<T> {
    view.data().chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
}

/// Block lists ascend, end in −1 and hold no block after the query's own.
fn check_indices(config: &NsaConfig, packing: &Packing, indices: &[i32]) -> Result<()> {
    let (groups, count) = (config.num_kv_heads(), config.select_count());
    for seq in packing.seqs() {
        for (t, row) in seq.rows.clone().enumerate() {
            let candidates = index::num_candidates(config, t);
            for (g, list) in indices[row * groups * count..][..groups * count].chunks(count).enumerate() {
                let used = list.iter().position(|&j| j < 0).unwrap_or(count);
                let ascending = list[..used].windows(2).all(|pair| pair[0] < pair[1]);
                let padded = list[used..].iter().all(|&j| j == -1);
                let seen = list[..used].last().is_none_or(|&j| (j as usize) < candidates);
                ensure!(
                    ascending && padded && seen,
                    "`block_indices`[{row}, {g}] = {list:?}: expected blocks below {candidates}, ascending, \
                     then -1 (the query is at position {t} of its sequence)"
                );
            }
        }
    }
    Ok(())
}
