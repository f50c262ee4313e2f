//! Kernels that a peer compiled: its reply read and checked, and they run on the simulator.

use super::beside::DEVICE;
use super::counts::Counts;
use super::ours::Op;
use cuda_sim::driver::device::Profile;
use cuda_sim::exec::{Fault, Launch, Options};
use cuda_sim::memory::{DeviceMemory, MemoryError};
use cuda_sim::{LoadError, Module};
use half::bf16;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::Deserialize;
use thiserror::Error;

/// Tensors of ours that a peer's kernels read; the others that it names are compared with ours afterwards.
const INPUTS: [&str; 7] = ["q", "k", "v", "do", "k_cmp", "v_cmp", "block_indices"];
/// How far a peer's result may be from ours: the norm of the difference over that of ours. Both round to bf16 on the way,
/// 2^-9 each time.
const MAX_DISTANCE: f64 = 1.0 / 64.0;
/// Parameters that Triton adds to a kernel's own: scratch memory, that of a profiler. Kernels without either do not read them.
const TRITON_PARAMETERS: usize = 2;
const WARP: u32 = 32;

/// Why a peer's kernels cannot be counted.
#[derive(Debug, Error)]
pub enum Unfit {
    /// Not the form of a reply.
    #[error("the peer's reply is not as expected: {0}")]
    Reply(#[from] serde_json::Error),
    /// A number that breaks a rule.
    #[error("{what} of the peer: {field} {value}: must be {rule}")]
    Value {
        /// The kernel or tensor.
        what: String,
        /// Of it.
        field: &'static str,
        /// What the peer said.
        value: String,
        /// What would do.
        rule: String,
    },
    /// PTX that the simulator does not load.
    #[error("{kernel} of the peer does not load: {source}")]
    Load {
        /// The kernel.
        kernel: String,
        /// Why.
        source: LoadError,
    },
    /// A launch that failed.
    #[error("{kernel} of the peer fails: {source}")]
    Fault {
        /// The kernel.
        kernel: String,
        /// Why.
        source: Box<Fault>,
    },
    /// The simulator's memory.
    #[error("tensors of the peer: {0}")]
    Memory(#[from] MemoryError),
    /// A result that is not ours.
    #[error("{name} of the peer is {distance:.4} of its size away from ours: must be at most {MAX_DISTANCE:.4}")]
    Differs {
        /// The tensor.
        name: String,
        /// The norm of the difference over that of ours.
        distance: f64,
    },
}

fn unfit(what: &str, field: &'static str, value: impl ToString, rule: impl ToString) -> Unfit {
    Unfit::Value { what: what.to_owned(), field, value: value.to_string(), rule: rule.to_string() }
}

/// A peer's answer: tensors by number, and what is done with them in this order.
#[derive(Debug, Deserialize)]
pub struct Kernels {
    tensors: Vec<Tensor>,
    pub steps: Vec<Step>,
}

#[derive(Debug, Deserialize)]
struct Tensor {
    name: Option<String>,
    dtype: Type,
    len: usize,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Type {
    Bf16,
    F32,
    I32,
}

impl Type {
    const fn bytes(self) -> usize {
        if matches!(self, Self::Bf16) { 2 } else { 4 }
    }

    const fn stored(self) -> Dtype {
        match self {
            Self::Bf16 => Dtype::BF16,
            Self::F32 => Dtype::F32,
            Self::I32 => Dtype::I32,
        }
    }
}

/// A step of an operation.
#[derive(Debug, Deserialize)]
pub struct Step {
    pub op: Op,
    #[serde(flatten)]
    pub work: Work,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    Launch(Kernel),
    /// Replaces a tensor by its prefix sums: PyTorch's, between kernels.
    PrefixSum(usize),
}

/// A kernel in every configuration that its autotuner would try.
#[derive(Debug, Deserialize)]
pub struct Kernel {
    pub kernel: String,
    /// What the choice depends on; none if there is no choice.
    pub key: Option<String>,
    pub configs: Vec<Compiled>,
}

#[derive(Debug, Deserialize)]
pub struct Compiled {
    pub config: String,
    entry: String,
    ptx: String,
    grid: [u32; 3],
    warps: u32,
    shared_bytes: u32,
    /// Of a thread: registers spilled.
    pub stack_bytes: u32,
    arguments: Vec<Argument>,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Argument {
    Tensor(usize),
    Int(i64),
    Float(f64),
}

impl Kernels {
    /// Reads and checks a reply. Configurations that need more shared memory than the device has are left out, as the
    /// autotuner does.
    pub fn read(reply: serde_json::Value) -> Result<Self, Unfit> {
        let mut kernels: Self = serde_json::from_value(reply)?;
        let tensors = kernels.tensors.len();
        let known = |what: &str, number: usize| {
            let rule = || format!("one of {tensors}");
            if number < tensors { Ok(()) } else { Err(unfit(what, "tensor", number, rule())) }
        };
        let most = profile().shared_optin;
        for step in &mut kernels.steps {
            let kernel = match &mut step.work {
                Work::PrefixSum(tensor) => {
                    known("prefix sum", *tensor)?;
                    if kernels.tensors[*tensor].dtype != Type::I32 {
                        return Err(unfit("prefix sum", "tensor", tensor, "of i32"));
                    }
                    continue;
                }
                Work::Launch(kernel) => kernel,
            };
            kernel.configs.retain(|config| config.shared_bytes <= most);
            if kernel.configs.is_empty() {
                let rule = format!("one at least that needs at most {most} bytes of shared memory");
                return Err(unfit(&kernel.kernel, "configurations", 0, rule));
            }
            for config in &kernel.configs {
                config.check(&kernel.kernel)?;
                for argument in &config.arguments {
                    if let Argument::Tensor(number) = argument {
                        known(&kernel.kernel, *number)?;
                    }
                }
            }
        }
        Ok(kernels)
    }
}

impl Compiled {
    fn check(&self, kernel: &str) -> Result<(), Unfit> {
        if self.grid.contains(&0) {
            return Err(unfit(kernel, "grid", format!("{:?}", self.grid), "of blocks of threads"));
        }
        if !(1..=32).contains(&self.warps) {
            return Err(unfit(kernel, "warps", self.warps, "1 to 32"));
        }
        Ok(())
    }
}

fn profile() -> Profile {
    Profile::named(DEVICE).expect("the simulator knows it")
}

/// Compute capability that peers compile for, as in `sm_80`.
pub fn capability() -> u32 {
    let (major, minor) = profile().capability;
    10 * major + minor
}

/// The simulated device with a peer's tensors.
pub struct Device<'a> {
    memory: DeviceMemory,
    tensors: &'a [Tensor],
    addresses: Vec<u64>,
}

impl<'a> Device<'a> {
    /// Inputs have our values, other tensors are zero.
    pub fn new(kernels: &'a Kernels, ours: &SafeTensors) -> Result<Self, Unfit> {
        let memory = DeviceMemory::new(profile().memory_bytes);
        let tensors = &kernels.tensors;
        let mut addresses = Vec::new();
        for tensor in tensors {
            let bytes = tensor.len * tensor.dtype.bytes();
            let address = memory.allocate(bytes as u64, false)?;
            match tensor.name.as_deref().filter(|name| INPUTS.contains(name)) {
                None => memory.copy_in(address, &vec![0; bytes])?,
                Some(name) => {
                    let view = named(ours, name, tensor.len)?;
                    if view.dtype() != tensor.dtype.stored() {
                        let value = format!("{:?}", tensor.dtype);
                        return Err(unfit(name, "type", value, format!("{:?}", view.dtype())));
                    }
                    memory.copy_in(address, view.data())?;
                }
            }
            addresses.push(address);
        }
        Ok(Self { memory, tensors, addresses })
    }

    /// Runs a configuration of a kernel.
    pub fn launch(&self, name: &str, compiled: &Compiled) -> Result<Counts, Unfit> {
        let load = |source| Unfit::Load { kernel: name.to_owned(), source };
        let module = Module::load(&compiled.ptx, &self.memory).map_err(load)?;
        let Some(kernel) = module.kernels.get(&compiled.entry) else {
            return Err(unfit(name, "entry", &compiled.entry, "in its PTX"));
        };
        let params = self.params(name, compiled, kernel)?;
        let options =
            Options { check: false, count: true, multiprocessors: profile().multiprocessors, ..Options::default() };
        let shape = (compiled.grid, [compiled.warps * WARP, 1, 1]);
        let launch = Launch::new(kernel, shape, compiled.shared_bytes, &params, self.memory.snapshot(), &options);
        let fault = |source| Unfit::Fault { kernel: name.to_owned(), source };
        let summary = launch.run().map_err(fault)?;
        module.unload(&self.memory);
        Ok(summary.counts.as_ref().map(Counts::from).unwrap_or_default())
    }

    /// Arguments as they lie in memory.
    fn params(&self, name: &str, compiled: &Compiled, kernel: &cuda_sim::code::Kernel) -> Result<Vec<u8>, Unfit> {
        let (given, wanted) = (compiled.arguments.len(), kernel.params.len());
        if given > wanted || wanted > given + TRITON_PARAMETERS {
            return Err(unfit(
                name,
                "arguments",
                given,
                format!("those of {wanted} parameters, Triton's own included"),
            ));
        }
        let mut params = vec![0; kernel.param_bytes as usize];
        for ((offset, bytes), argument) in kernel.params.iter().zip(&compiled.arguments) {
            let (offset, bytes) = (*offset as usize, *bytes as usize);
            let value = match *argument {
                Argument::Tensor(number) if bytes == 8 => self.addresses[number].to_le_bytes(),
                Argument::Int(int) if bytes == 8 || i32::try_from(int).is_ok() && bytes == 4 => int.to_le_bytes(),
                Argument::Float(float) if bytes == 4 => u64::from((float as f32).to_bits()).to_le_bytes(),
                other => return Err(unfit(name, "argument", format!("{other:?}"), format!("of {bytes} bytes"))),
            };
            params[offset..offset + bytes].copy_from_slice(&value[..bytes]);
        }
        Ok(params)
    }

    /// Replaces a tensor by its prefix sums.
    pub fn prefix_sum(&self, number: usize) -> Result<(), Unfit> {
        let mut bytes = self.bytes(number)?;
        let mut sum = 0i32;
        for value in bytes.chunks_exact_mut(4) {
            sum = sum.wrapping_add(i32::from_le_bytes([value[0], value[1], value[2], value[3]]));
            value.copy_from_slice(&sum.to_le_bytes());
        }
        Ok(self.memory.copy_in(self.addresses[number], &bytes)?)
    }

    fn bytes(&self, number: usize) -> Result<Vec<u8>, Unfit> {
        let tensor = &self.tensors[number];
        let mut bytes = vec![0; tensor.len * tensor.dtype.bytes()];
        self.memory.copy_out(self.addresses[number], &mut bytes)?;
        Ok(bytes)
    }

    /// Checks that the peer's named results are ours, but for rounding; returns the largest distance.
    pub fn compare(&self, ours: &SafeTensors) -> Result<f64, Unfit> {
        let mut largest = 0.0f64;
        for (number, tensor) in self.tensors.iter().enumerate() {
            let Some(name) = tensor.name.as_deref().filter(|name| !INPUTS.contains(name)) else { continue };
            let want = values(name, &named(ours, name, tensor.len)?)?;
            let bytes = self.bytes(number)?;
            let got =
                values(name, &TensorView::new(tensor.dtype.stored(), vec![tensor.len], &bytes).expect("as long"))?;
            let distance = distance(&got, &want);
            if distance.is_nan() || distance > MAX_DISTANCE {
                return Err(Unfit::Differs { name: name.to_owned(), distance });
            }
            largest = largest.max(distance);
        }
        Ok(largest)
    }
}

/// A tensor of ours, of which the peer has as many elements.
fn named<'t>(ours: &'t SafeTensors, name: &str, len: usize) -> Result<TensorView<'t>, Unfit> {
    let view = ours.tensor(name).map_err(|_| unfit(name, "name", name, format!("one of {:?}", ours.names())))?;
    let want: usize = view.shape().iter().product();
    if len == want { Ok(view) } else { Err(unfit(name, "elements", len, want)) }
}

fn values(name: &str, view: &TensorView) -> Result<Vec<f64>, Unfit> {
    let data = view.data();
    match view.dtype() {
        Dtype::BF16 => Ok(data.chunks_exact(2).map(|x| bf16::from_le_bytes([x[0], x[1]]).to_f64()).collect()),
        Dtype::F32 => {
            Ok(data.chunks_exact(4).map(|x| f64::from(f32::from_le_bytes([x[0], x[1], x[2], x[3]]))).collect())
        }
        other => Err(unfit(name, "type", format!("{other:?}"), "of floats")),
    }
}

/// The norm of the difference over that of `want`.
fn distance(got: &[f64], want: &[f64]) -> f64 {
    let difference: f64 = got.iter().zip(want).map(|(a, b)| (a - b).powi(2)).sum();
    let size: f64 = want.iter().map(|b| b.powi(2)).sum();
    if difference == 0.0 { 0.0 } else { (difference / size).sqrt() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// Copies `n` elements of two bytes; the last two parameters are Triton's.
    const COPY: &str = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry copy(.param .u64 from, .param .u64 to, \
        .param .u32 n, .param .u64 scratch, .param .u64 profile)\n{\n.reg .b64 a<4>;\n.reg .b32 r<2>;\n.reg .b16 h;\n.reg .pred p;\n\
        mov.u32 r0, %tid.x;\nld.param.u32 r1, [n];\nsetp.ge.u32 p, r0, r1;\n@p ret;\nld.param.u64 a0, [from];\n\
        ld.param.u64 a1, [to];\nmul.wide.u32 a2, r0, 2;\nadd.u64 a0, a0, a2;\nadd.u64 a1, a1, a2;\nld.global.u16 h, [a0];\n\
        st.global.u16 [a1], h;\nret;\n}\n";
    const LEN: usize = 40;

    fn reply() -> Value {
        let config = json!({
            "config": "num_warps=2", "entry": "copy", "ptx": COPY, "grid": [1, 1, 1], "warps": 2, "shared_bytes": 0,
            "stack_bytes": 0, "arguments": [{"tensor": 0}, {"tensor": 1}, {"int": LEN}]
        });
        json!({
            "tensors": [
                {"name": "q", "dtype": "bf16", "len": LEN},
                {"name": "o_slc", "dtype": "bf16", "len": LEN},
                {"name": null, "dtype": "i32", "len": 3}
            ],
            "steps": [
                {"op": "slc forward", "launch": {"kernel": "copy", "key": "copy [1]", "configs": [config]}},
                {"op": "slc backward", "prefix_sum": 2}
            ]
        })
    }

    /// Ours: q, and o_slc as `factor` times it.
    fn ours(factor: f32) -> Vec<u8> {
        let values = |factor: f32| -> Vec<u8> {
            (0..LEN).flat_map(|i| bf16::from_f32(factor * (1.0 + i as f32)).to_le_bytes()).collect()
        };
        let [q, o] = [1.0, factor].map(values);
        let views = [("q", &q), ("o_slc", &o)]
            .map(|(name, bytes)| (name, TensorView::new(Dtype::BF16, vec![LEN], bytes).expect("as long")));
        safetensors::serialize(views, None).expect("bytes")
    }

    fn launch(kernels: &Kernels) -> &Compiled {
        let Work::Launch(kernel) = &kernels.steps[0].work else { panic!("a launch") };
        &kernel.configs[0]
    }

    #[test]
    fn a_kernel_runs_on_our_tensors_and_its_result_is_compared() {
        let kernels = Kernels::read(reply()).expect("fits");
        let file = ours(1.0);
        let ours = SafeTensors::deserialize(&file).expect("whole");
        let device = Device::new(&kernels, &ours).expect("room");
        assert!(matches!(device.compare(&ours), Err(Unfit::Differs { distance, .. }) if distance == 1.0));
        let counts = device.launch("copy", launch(&kernels)).expect("it runs");
        // Two bytes of 40 elements, read and written: three sectors each.
        assert_eq!((counts.unique_bytes, counts.global_sectors), (192.0, 6.0));
        assert_eq!(device.compare(&ours).expect("the same"), 0.0);
    }

    #[test]
    fn results_may_differ_by_rounding_and_not_more() {
        let kernels = Kernels::read(reply()).expect("fits");
        for (factor, fits) in [(1.01, true), (1.03, false)] {
            let file = ours(factor);
            let ours = SafeTensors::deserialize(&file).expect("whole");
            let device = Device::new(&kernels, &ours).expect("room");
            device.launch("copy", launch(&kernels)).expect("it runs");
            assert_eq!(device.compare(&ours).is_ok(), fits, "{factor}");
        }
    }

    #[test]
    fn prefix_sums_replace_a_tensor() {
        let kernels = Kernels::read(reply()).expect("fits");
        let file = ours(1.0);
        let device = Device::new(&kernels, &SafeTensors::deserialize(&file).expect("whole")).expect("room");
        let bytes: Vec<u8> = [3i32, 0, 4].into_iter().flat_map(i32::to_le_bytes).collect();
        device.memory.copy_in(device.addresses[2], &bytes).expect("room");
        device.prefix_sum(2).expect("of i32");
        let sums: Vec<u8> = [3i32, 3, 7].into_iter().flat_map(i32::to_le_bytes).collect();
        assert_eq!(device.bytes(2).expect("three"), sums);
    }

    #[test]
    fn unfit_replies_are_named_with_their_values_and_rules() {
        let config = "/steps/0/launch/configs/0";
        let cases = [
            ("/steps/1/prefix_sum".to_owned(), json!(3), "tensor 3: must be one of 3"),
            ("/steps/1/prefix_sum".to_owned(), json!(0), "of i32"),
            ("/steps/1/op".to_owned(), json!("win forward"), "unknown variant `win forward`"),
            ("/tensors/0/dtype".to_owned(), json!("f16"), "unknown variant `f16`"),
            (format!("{config}/grid"), json!([1, 0, 1]), "grid [1, 0, 1]"),
            (format!("{config}/warps"), json!(33), "warps 33: must be 1 to 32"),
            (format!("{config}/shared_bytes"), json!(200_000), "at most 166912 bytes of shared memory"),
            (format!("{config}/arguments/1"), json!({"tensor": 7}), "tensor 7"),
            (format!("{config}/arguments/1"), json!({"text": "x"}), "unknown variant `text`"),
        ];
        for (place, value, words) in cases {
            let mut reply = reply();
            *reply.pointer_mut(&place).expect("a field") = value;
            let error = Kernels::read(reply).expect_err("unfit").to_string();
            assert!(error.contains(words), "{place}: {error}");
        }
    }

    #[test]
    fn unfit_launches_are_named() {
        let config = "/steps/0/launch/configs/0";
        let cases = [
            ("entry", json!("paste"), "entry paste: must be in its PTX"),
            ("ptx", json!("no PTX"), "copy of the peer does not load"),
            ("arguments", json!([{"tensor": 0}]), "arguments 1: must be those of 5 parameters"),
            ("arguments", json!([{"tensor": 0}, {"tensor": 1}, {"int": 1i64 << 32}]), "must be of 4 bytes"),
            ("arguments", json!([{"tensor": 0}, {"float": 1.0}, {"int": 1}]), "must be of 8 bytes"),
            ("arguments", json!([{"tensor": 0}, {"tensor": 2}, {"int": LEN}]), "copy of the peer fails"),
        ];
        let file = ours(1.0);
        let ours = SafeTensors::deserialize(&file).expect("whole");
        for (field, value, words) in cases {
            let mut reply = reply();
            *reply.pointer_mut(&format!("{config}/{field}")).expect("a field") = value;
            let kernels = Kernels::read(reply).expect("fits so far");
            let device = Device::new(&kernels, &ours).expect("room");
            let error = device.launch("copy", launch(&kernels)).expect_err("unfit").to_string();
            assert!(error.contains(words), "{field}: {error}");
        }
    }

    #[test]
    fn unfit_tensors_are_named() {
        let file = ours(1.0);
        let ours = SafeTensors::deserialize(&file).expect("whole");
        for (place, value, words) in [
            ("/tensors/0/len", json!(41), "q of the peer: elements 41: must be 40"),
            ("/tensors/0/dtype", json!("f32"), "q of the peer: type F32: must be BF16"),
            ("/tensors/0/name", json!("k"), "k of the peer: name k: must be one of"),
        ] {
            let mut reply = reply();
            *reply.pointer_mut(place).expect("a field") = value;
            let kernels = Kernels::read(reply).expect("fits so far");
            let error = Device::new(&kernels, &ours).map(|_| ()).expect_err("unfit").to_string();
            assert!(error.contains(words), "{place}: {error}");
        }
    }
}
